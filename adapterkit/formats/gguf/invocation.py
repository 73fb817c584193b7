"""Read and write the tokens that activate an activated LoRA: one key-value of the file for all modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ...core.adapter import Target
from ...errors import Malformed, Unsupported
from ...io.gguf_file import Gguf, GgufValue
from ...io.lazy import Lazy, as_lazy, from_numpy
from ...methods.alora import ALoRA
from .._pairs import DAMAGED

if TYPE_CHECKING:
    from .._pairs import Pair

INVOCATION = "adapter.alora.invocation_tokens"
LARGEST = (1 << 32) - 1
"""The largest token number, because the file stores u32."""


def invocation_of(file: Gguf) -> Lazy | None:
    """Return the tokens in a file, one leaf for all its updates; None if the file has no activated LoRA.

    Raises:
        Malformed: the value is not a list of tokens, or is empty.
    """
    value = file.values.get(INVOCATION)
    if value is None:
        return None
    if value.type not in ("[u32]", "[i32]") or not value.value or min(value.value) < 0:
        raise Malformed(
            f"the value of type {value.type} is not a list of tokens, or is empty", where=INVOCATION, cure=DAMAGED
        )
    import numpy as np

    return from_numpy(np.array(value.value, dtype=np.int64))


def activated(target: Target, update: Pair, invocation: Lazy | None) -> Pair:
    """Turn the update into an activated LoRA if the file has invocation tokens.

    Raises:
        Unsupported: the update is on an embedding, which the method does not support.
    """
    if invocation is None:
        return update
    if target.layout != "out *in":
        why = "an activated LoRA cannot adapt an embedding or a Conv1D"
        raise Unsupported(why, where=str(target), cure="Run the adapter with llama.cpp, or remove this module")
    leaves: dict[str, Any] = {"A": update.A, "B": update.B, "invocation": invocation}
    return ALoRA(**leaves, scaling=update.scaling)


class Invocation:
    """The invocation tokens of a file to write: those of the first update."""

    def __init__(self, updates: Iterable[object]) -> None:
        first = next(iter(updates), None)
        self.tokens = _tokens(first)

    def why_not(self, update: Pair) -> str:
        """Return the reason why an update cannot be in the same file as the first one; empty if it can."""
        own = _tokens(update)
        if own != self.tokens:
            return "its invocation differs from the first update's; a file has one for all"
        return (
            "its invocation has token numbers that are not u32" if any(not 0 <= n <= LARGEST for n in own or ()) else ""
        )

    def values(self) -> dict[str, GgufValue]:
        """Return the key-value with the tokens; empty if there are none."""
        return {} if self.tokens is None else {INVOCATION: GgufValue("[u32]", list(self.tokens))}


def _tokens(update: object) -> tuple[int, ...] | None:
    return tuple(as_lazy(update.invocation).numpy().tolist()) if isinstance(update, ALoRA) else None

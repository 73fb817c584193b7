"""Encode an `Adapter` as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.adapter import Adapter, Target
from ...io.ggml_blocks import BLOCKS, decoded, encoded
from ...io.gguf_file import GgufValue, write_gguf
from ...io.lazy import Lazy, as_array, as_lazy
from ...methods.alora import ALoRA
from ...methods.lora import LoRA
from ...naming.architectures import of_gguf
from ...naming.by_family import translate
from ...naming.gguf import NAMING, family_of, name_for
from .._leftovers import Leftovers, in_order, remembered
from .._one_number import one_number
from .._pairs import expressible
from .place import GgufPlace
from .reader import ALPHA, ARCHITECTURE, FORMAT, INVOCATION, KIND, TYPE, Invocation

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...naming.architectures import Architecture
    from .._pairs import Pair

METHODS = (LoRA, ALoRA)


class GgufHints(Leftovers, total=False):
    """The leftovers of a GGUF file.

    `values` are the (key, type, value) triples of the file, `types` the block types of quantized tensors.
    """

    architecture: str
    alpha: float
    heads: dict[str, int]
    experts: int
    values: list[tuple[str, str, Any]]
    types: dict[str, str]


def save(adapter: Adapter, path: Path, on_loss: str, base: Checkpoint | None) -> list[str]:
    """Write the file, and return one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: llama.cpp cannot express an update, and `on_loss` does not allow rewriting the update.
    """
    hints = remembered(adapter, FORMAT, GgufHints)
    place = _place(hints, adapter, base)
    invocation = Invocation(update for _, update in adapter if isinstance(update, METHODS))
    moves = place.moves(adapter.updates)

    def why_not(target: Target, update: Pair) -> str:
        return place.why_not(target, update, moves) or invocation.why_not(update)

    pairs, lines = expressible(adapter, "llama.cpp", on_loss, why_not, METHODS)
    pairs = place.placed(pairs, moves)
    alpha, pairs, folded = one_number(
        pairs, _exact_alpha, _scaling, dialect="a GGUF adapter", on_loss=on_loss,
        default=float(_rank(next(iter(pairs.values())))), first=hints.get("alpha"),
    )  # fmt: skip
    tensors: dict[str, Lazy] = {}
    for target, update in pairs.items():
        tensors |= place.spelled(target, update)
    kept = {} if adapter.foreign is None or not hints else adapter.foreign.tensors
    tensors |= {name: as_lazy(leaf) for name, leaf in kept.items()}
    types = {
        name: kind for name, kind in hints.get("types", {}).items() if name in tensors and _holds(kind, tensors[name])
    }
    write_gguf(path, _values(hints, place.name, alpha) | invocation.values(), in_order(tensors, hints), types)
    return lines + folded


def _holds(kind: str, tensor: Lazy) -> bool:
    """Whether a quantized block type stores a tensor's values without rounding.

    This is true for values that llama.cpp quantized and that are unchanged since then: each is a multiple of 1/127 of
    the largest value in its block. Other values would be rounded, so their tensors are written in their own dtype.
    """
    import numpy as np

    values = as_array(tensor)
    if values.size % BLOCKS[kind][1]:
        return False
    return np.array_equal(decoded(kind, encoded(kind, values)), values.reshape(-1))


def _place(hints: GgufHints, adapter: Adapter, base: Checkpoint | None) -> GgufPlace:
    """Return the file's names and orders, from the base's config or, without a config, from the source file."""
    if (base is not None and base.config is not None) or not hints:
        return GgufPlace.of_base(base) if base is not None else GgufPlace(*name_for(None))
    name = str(hints.get("architecture"))
    paths = {target.path for target in adapter.updates}
    families = of_gguf(name) or [family_of(name, ())]
    family = max(families, key=lambda each: sum(_has(each, path) for path in paths))
    return GgufPlace(name, family, None, dict(hints.get("heads", {})), int(hints.get("experts", 0)))


def _has(family: Architecture, path: str) -> bool:
    return translate(path, family, NAMING, 1) is not None


def _rank(update: Pair) -> int:
    """Return the rank of an update; for a stack of experts, the rank of each expert."""
    return int(update.B.shape[-1])


def _exact_alpha(update: Pair) -> float | None:
    """Return the f32 alpha for which llama.cpp computes exactly the update's scaling.

    None if there is no such alpha.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        alpha = float(np.float32(update.scaling * _rank(update)))
    return alpha if alpha and alpha / _rank(update) == update.scaling else None


def _scaling(alpha: float, update: Pair) -> float:
    return alpha / _rank(update)


def _values(hints: GgufHints, architecture: str, alpha: float) -> dict[str, GgufValue]:
    read = {key: GgufValue(kind, value) for key, kind, value in hints.get("values", ()) if key != INVOCATION}
    start = read or {
        ARCHITECTURE: GgufValue("string", architecture),
        TYPE: GgufValue("string", "adapter"),
        KIND: GgufValue("string", "lora"),
    }
    told = ALPHA in start or alpha != hints.get("alpha")
    return {
        **start,
        ARCHITECTURE: GgufValue("string", architecture),
        **({ALPHA: GgufValue("f32", alpha)} if told else {}),
    }

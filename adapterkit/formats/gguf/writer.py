"""An `Adapter` in, a GGUF file out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapter import Adapter, Target
from ...methods.alora import ALoRA
from ...methods.lora import LoRA
from ...tensors.ggml_blocks import decoded, encoded
from ...tensors.gguf import Value, write_gguf
from ...tensors.lazy import Lazy, as_array, as_lazy
from .._leftovers import Leftovers, in_order, remembered
from .._one_number import one_number
from .._pairs import Pairs, expressible, rank_of, to_rank
from .invocation import INVOCATION, Invocation
from .place import Place
from .reader import ALPHA, ARCHITECTURE, FORMAT, KIND, TYPE

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint
    from .._pairs import Pair

METHODS = (LoRA, ALoRA)


class Hints(Leftovers, total=False):
    """Architecture, alpha and heads, key-values as (key, type, value), types of tensors that differ from their own."""

    architecture: str
    alpha: float
    heads: dict[str, int]
    experts: int
    values: list[tuple[str, str, Any]]
    types: dict[str, str]


def save(adapter: Adapter, path: Path, on_loss: str, base: Checkpoint | None) -> list[str]:
    """Writes the file, and returns one line for each thing left out or rewritten.

    Raises:
        Unrepresentable: llama.cpp cannot say it, and `on_loss` does not allow otherwise.
    """
    hints = remembered(adapter, FORMAT, Hints)
    place = Place.of(hints, base)
    invocation = Invocation(update for _, update in adapter if isinstance(update, METHODS))

    def why_not(target: Target, update: Pair) -> str:
        return place.why_not(target, update) or invocation.why_not(update)

    pairs, lines = expressible(adapter, "llama.cpp", on_loss, why_not, METHODS)
    pairs = _of_one_rank(pairs, place)
    alpha, pairs, folded = one_number(
        pairs, _exact_alpha, _scaling, dialect="a GGUF adapter", on_loss=on_loss,
        default=float(rank_of(next(iter(pairs.values())))), first=hints.get("alpha"),
    )  # fmt: skip
    tensors = place.spelled(pairs)
    kept = {} if adapter.foreign is None or not hints else adapter.foreign.tensors
    tensors |= {name: as_lazy(leaf) for name, leaf in kept.items()}
    types = {
        name: kind for name, kind in hints.get("types", {}).items() if name in tensors and _holds(kind, tensors[name])
    }
    write_gguf(path, _values(hints, place.name, alpha) | invocation.values(), in_order(tensors, hints), types)
    return lines + folded


def _holds(kind: str, tensor: Lazy) -> bool:
    """Whether blocks of a type hold a tensor's numbers exactly, which is what the file had before it was changed.

    llama.cpp gives the largest number of a block 127 steps. Blocks of other tools, and numbers that were computed with
    since, are rounded: they are written in the tensor's own type.
    """
    import numpy as np

    values = as_array(tensor)
    return np.array_equal(decoded(kind, encoded(kind, values)), values.reshape(-1))


def _of_one_rank(pairs: Pairs, place: Place) -> Pairs:
    """The same pairs, with zeros so that the experts of one stack have one rank."""
    ranks: dict[str, int] = {}
    for target, update in pairs.items():
        foreign = place.foreign(target)
        ranks[foreign] = max(ranks.get(foreign, 0), rank_of(update))
    return {t: to_rank(u, ranks[place.foreign(t)]) if place.is_stack(place.foreign(t)) else u for t, u in pairs.items()}


def _exact_alpha(update: Pair) -> float | None:
    """The f32 that llama.cpp divides by the rank to exactly this scaling."""
    import numpy as np

    with np.errstate(over="ignore"):
        alpha = float(np.float32(update.scaling * rank_of(update)))
    return alpha if alpha and alpha / rank_of(update) == update.scaling else None


def _scaling(alpha: float, update: Pair) -> float:
    return alpha / rank_of(update)


def _values(hints: Mapping[str, Any], architecture: str, alpha: float) -> dict[str, Value]:
    read = {key: Value(kind, value) for key, kind, value in hints.get("values", ()) if key != INVOCATION}
    start = read or {
        ARCHITECTURE: Value("string", architecture), TYPE: Value("string", "adapter"), KIND: Value("string", "lora"),
    }  # fmt: skip
    told = ALPHA in start or alpha != hints.get("alpha")
    return {**start, ARCHITECTURE: Value("string", architecture), **({ALPHA: Value("f32", alpha)} if told else {})}

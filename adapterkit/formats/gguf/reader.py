"""Decode a GGUF file into an `Adapter`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ...core.adapter import Adapter, Foreign, Step, Target
from ...errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ...io.arrange import reordered, turned
from ...io.ggla import read_ggla
from ...io.gguf_file import Gguf, GgufValue
from ...io.lazy import Lazy, as_lazy, from_numpy
from ...methods.alora import ALoRA
from ...methods.lora import LoRA
from ...naming.architectures import WEIGHT
from ...naming.binding import bind
from ...naming.binding.translating import moves_of, translated
from ...naming.gguf import family_of, name_for
from ...naming.heads import undone
from ...naming.layouts import stored_in_out
from ...naming.tables import modules_of, without_prefix
from ...naming.ties import aliases, is_embedding
from .._pairs import DAMAGED, check_factors, grouped, in_row_order, pair
from .place import EMBEDDING, SLOTS, GgufPlace

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...naming.architectures import Architecture
    from ...naming.heads import Rows
    from .._pairs import Pair, Slots

FORMAT = "gguf"
ARCHITECTURE, TYPE, KIND, ALPHA = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"


def decode(file: Gguf, base: Checkpoint | None, *, outline: bool = False) -> Adapter:
    """Return the adapter in a GGUF file.

    Args:
        file: the file.
        base: the base; its config has the numbers of heads, which determine the order of rows.
        outline: accept a file whose order of rows is unknown without a base. Loading such values then raises the error.

    Raises:
        Malformed, Unsupported: the file is not llama.cpp's LoRA, or its architecture is unknown.
        TargetNotFound: the family or the base has no weight for a name in the file.
        UsageError: the order of rows depends on the numbers of heads, and no base provides them.
    """
    name = _text(file, ARCHITECTURE)
    for key, word in ((TYPE, "adapter"), (KIND, "lora")):
        if _text(file, key) != word:
            raise Unsupported(f"{key} is {_text(file, key)!r}, not {word!r}", where=key, cure="Give a LoRA adapter")
    invocation = invocation_of(file)
    alpha = file.values.get(ALPHA, GgufValue("f32", 0.0))
    if alpha.type != "f32" or not abs(alpha.value) < float("inf"):
        raise Malformed(f"{alpha.value!r} is not a finite f32", where=ALPHA, cure=DAMAGED)
    kept = {name: tensor for name, tensor in file.tensors.items() if name.endswith("_norm.weight")}
    pairs = {name: tensor for name, tensor in file.tensors.items() if name not in kept}
    groups = grouped(pairs, SLOTS, "a GGUF adapter")
    place = GgufPlace(name, _family(name, groups, base), None if base is None else base.config)
    held: dict[Target, tuple[Pair, ...]] = {}
    for foreign, slots in groups.items():
        target, update = _update(place, foreign, slots, alpha.value, outline)
        held[target] = (update,)
    updates = _own(held, place, invocation)
    if base is not None:
        _check_alone(updates, base)
        bound = bind(Adapter(updates), base, aliases=aliases(base))
        updates = dict(bound.adapter.updates)
    data = {
        "architecture": name, "alpha": alpha.value, "heads": place.known, "experts": place.experts,
        "values": [[key, value.type, value.value] for key, value in file.values.items()],
        "order": list(file.tensors), "types": {key: kind for key, kind in file.types.items() if kind == "Q8_0"},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data, kept))


def _check_alone(updates: Mapping[Target, object], base: Checkpoint) -> None:
    """Refuse a base that contains the same module name several times, under different prefixes.

    Raises:
        TargetNotFound: a name in the file fits two modules of the base.
    """
    places: dict[str, list[str]] = {}
    for name in dict.fromkeys(modules_of(base.tensors)):
        for bare in dict.fromkeys(without_prefix(name)):
            places.setdefault(bare, []).append(name)
    for target in updates:
        if len(found := places.get(target.path, ())) > 1:
            why = f"the base has {len(found)} modules with this name: {', '.join(found)}"
            raise TargetNotFound(why, where=target.path, cure="Is this the base that the adapter was trained on?")


def _family(name: str, modules: Collection[str], base: Checkpoint | None) -> Architecture:
    """Find the family of models of an adapter file.

    Some families, such as Granite 4, can only be recognised if the base is given.
    """
    with suppress(Unsupported, UsageError):
        own, family = name_for(None if base is None else base.config)
        if own == name and family.record.gguf_key is not None:
            return family
    return family_of(name, modules)


def _update(place: GgufPlace, foreign: str, slots: Slots, alpha: float, outline: bool) -> tuple[Target, Pair]:
    """Create the update of one tensor, with the file's module name as target, and with rows in the base's order.

    Raises:
        TargetNotFound: the family has no weight for this module name.
        ShapeMismatch: the tensors do not have the shapes of A and B.
    """
    where = place.where(foreign)
    if where is None:
        why = f"{place.family.family} has no known weight with this name"
        raise TargetNotFound(
            why, where=foreign, cure=f"Is the architecture {place.name} right? Or merge the adapter with llama.cpp"
        )
    if where.stacked:
        A, B = slots["A"], slots["B"]
        if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or not A.shape[1]:
            raise ShapeMismatch(f"A is {list(A.shape)}, B is {list(B.shape)}", where=foreign, cure=DAMAGED)
        place.experts = A.shape[0]
        return Target(foreign, "e out *in"), LoRA(**slots, scaling=alpha / A.shape[1] if alpha else 1.0)
    if foreign == EMBEDDING and len(slots["A"].shape) == 2:
        slots = {**slots, "A": turned(slots["A"])}
    rank = check_factors(foreign, slots)
    update = pair(slots, alpha / rank if alpha else 1.0)
    try:
        order = place.order(foreign, update.B.shape[0])
        columns = place.columns(foreign, update.A.shape[-1])
    except UsageError as error:
        if not outline:
            raise
        return Target(foreign), _unordered(update, error)
    if columns is not None:
        update = update.replace(A=reordered(as_lazy(update.A), lambda: undone(columns), 1))
    return Target(foreign), update if order is None else in_row_order(update, lambda: undone(order))


def _unordered(update: Pair, error: UsageError) -> Pair:
    """Return an update that has the right shapes, but raises `error` when a value is loaded."""

    def order() -> NoReturn:
        raise error

    return update.replace(A=reordered(as_lazy(update.A), order, 1), B=reordered(as_lazy(update.B), order))


def _own(
    held: Mapping[Target, tuple[Pair, ...]], place: GgufPlace, invocation: Lazy | None
) -> dict[Target, tuple[Update, ...]]:
    """Rename targets from the file's to the family's names, with the layout in which the family stores each weight."""
    config = {"model_type": place.family.record.model_types[0]}
    found: dict[Target, tuple[Update, ...]] = {}
    for target, (update,) in translated(held, moves_of(held, place.family, WEIGHT)).items():
        inputs_first = is_embedding(f"{target.path}.weight") or stored_in_out(target.path, config)
        layout = "in out *k" if inputs_first and not target.stacked else target.layout
        own = Target(target.path, layout, target.rows)
        found[own] = (activated(own, update, invocation),)  # type: ignore[arg-type]
    return found


def _text(file: Gguf, key: str) -> str:
    value = file.values.get(key)
    if value is None or value.type != "string":
        raise Malformed("the file has no text under this key", where=key, cure="Give an adapter for llama.cpp")
    return str(value.value)


# Read `ggla` files, the format before GGUF. It supports only Llama, stores A transposed, and has one rank and one alpha
# for all modules.


def read_legacy(path: Path, compat: str | None, base: Checkpoint | None) -> Adapter:
    """Read the adapter in a `ggla` file; `compat` is the tool that wrote the file, or None."""
    file = read_ggla(path)
    place = GgufPlace("llama", family_of("llama", ()), None if base is None else base.config)
    held: dict[Target, tuple[Pair, ...]] = {}
    for name, slots in grouped(file.tensors, {".weight.loraA": "A", ".weight.loraB": "B"}, "a ggla file").items():
        foreign = _modern(name)
        slots = {**slots, "A": turned(slots["A"])} if len(slots["A"].shape) == 2 else slots
        if check_factors(name, slots) != file.rank:
            raise ShapeMismatch(f"the rank is not the file's {file.rank}", where=name, cure=DAMAGED)
        update = LoRA(**slots, scaling=file.alpha / file.rank)
        order = _legacy_order(place, name, foreign, compat, update.B.shape[0])
        held[Target(foreign)] = (
            update if order is None else in_row_order(update, lambda order=order: undone(order)),  # type: ignore[misc]
        )  # fmt: skip
    moves = moves_of(held, place.family, WEIGHT)
    if unknown := next((target.path for target in held if target.path not in moves), None):
        raise TargetNotFound("a Llama has no weight with this name", where=unknown, cure=DAMAGED)
    updates = translated(held, moves)
    if base is not None:
        updates = dict(bind(Adapter(updates), base).adapter.updates)
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT, "container": "ggla"}),))


def _legacy_order(place: GgufPlace, name: str, foreign: str, compat: str | None, rows: int) -> Rows | None:
    """Return the order in which a `ggla` file has the rows of a weight; None if the order is the base's.

    llama.cpp's converter kept PEFT's order of rows. llama.cpp's training used the order of the GGUF base.
    """
    where = place.where(foreign)
    if where is None or where.rows is None or compat == "convert-lora-to-ggml":
        return None
    if name.startswith("layers.") and compat is None:
        return None
    if compat is None:
        why = "the order of these rows depends on the tool that wrote the file, which the file does not state"
        cure = (
            "State the tool with --compat (compat=): convert-lora-to-ggml for PEFT, finetune for llama.cpp's training"
        )
        raise UsageError(why, where=name, cure=cure)
    return place.order(foreign, rows)


_OLD = {
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip


def _modern(name: str) -> str:
    """Translate a module name in `ggla` files to the name in GGUF files."""
    first, _, rest = name.partition(".")
    number, _, module = rest.partition(".")
    return f"blk.{number}.{_OLD[module]}" if first == "layers" and module in _OLD else name


# Read and write the tokens that activate an activated LoRA. A file stores them once, for all modules.


INVOCATION = "adapter.alora.invocation_tokens"
LARGEST = (1 << 32) - 1
"""The largest token id, because the file stores token ids as u32."""


def invocation_of(file: Gguf) -> Lazy | None:
    """Return the activation tokens in a file, as one tensor for all updates; None if the file has no activated LoRA.

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
    """Convert an update to an activated LoRA if the file has activation tokens.

    Raises:
        Unsupported: the update is of an embedding, which activated LoRA does not support.
    """
    if invocation is None:
        return update
    if target.layout != "out *in":
        why = "an activated LoRA cannot adapt an embedding or a Conv1D"
        raise Unsupported(why, where=str(target), cure="Run the adapter with llama.cpp, or remove this module")
    leaves: dict[str, Any] = {"A": update.A, "B": update.B, "invocation": invocation}
    return ALoRA(**leaves, scaling=update.scaling)


class Invocation:
    """The activation tokens to write: the tokens of the adapter's first update."""

    def __init__(self, updates: Iterable[object]) -> None:
        first = next(iter(updates), None)
        self.tokens = _tokens(first)

    def why_not(self, update: Pair) -> str:
        """Return the reason why a file cannot contain both this update and the first update; empty if it can."""
        own = _tokens(update)
        if own != self.tokens:
            return "its invocation differs from the first update's; a file has one invocation for all"
        return (
            "its invocation has token numbers that are not u32" if any(not 0 <= n <= LARGEST for n in own or ()) else ""
        )

    def values(self) -> dict[str, GgufValue]:
        """Return the key and the value that store the tokens; empty if there are no tokens."""
        return {} if self.tokens is None else {INVOCATION: GgufValue("[u32]", list(self.tokens))}


def _tokens(update: object) -> tuple[int, ...] | None:
    return tuple(as_lazy(update.invocation).numpy().tolist()) if isinstance(update, ALoRA) else None

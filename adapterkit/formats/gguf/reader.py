"""Decode a GGUF file into an `Adapter`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

from ...core.adapter import Adapter, Foreign, Step, Target
from ...errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ...io.arrange import reordered, turned
from ...io.gguf_file import Gguf, GgufValue
from ...io.lazy import as_lazy
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
from .invocation import activated, invocation_of
from .place import EMBEDDING, SLOTS, GgufPlace

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from ...naming.architectures import Architecture
    from .._pairs import Pair, Slots

FORMAT = "gguf"
ARCHITECTURE, TYPE, KIND, ALPHA = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"


def decode(file: Gguf, base: Checkpoint | None, *, outline: bool = False) -> Adapter:
    """Return the adapter in a file.

    Args:
        file: the file.
        base: the base; its config states the heads, which determine the order of rows.
        outline: whether values whose order depends on the base raise an error only when they are loaded.

    Raises:
        Malformed, Unsupported: the file is not llama.cpp's LoRA, or its architecture is unknown.
        TargetNotFound: a name has no weight in the family or the base.
        UsageError: the order of rows depends on the heads, and no base states them.
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
    """Refuse a base that has the family's names several times, with different prefixes.

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
    """Find the family of an adapter file; some families, such as Granite 4, can only be recognised from the base."""
    with suppress(Unsupported, UsageError):
        own, family = name_for(None if base is None else base.config)
        if own == name and family.record.gguf_key is not None:
            return family
    return family_of(name, modules)


def _update(place: GgufPlace, foreign: str, slots: Slots, alpha: float, outline: bool) -> tuple[Target, Pair]:
    """Create the update of one tensor, with the file's name and with rows in the weight's own order.

    Raises:
        TargetNotFound: the family has no weight with this name.
        ShapeMismatch: the factors are not a pair.
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
    """Return an update with shapes, but whose values raise an error when they are loaded."""

    def order() -> NoReturn:
        raise error

    return update.replace(A=reordered(as_lazy(update.A), order, 1), B=reordered(as_lazy(update.B), order))


def _own(
    held: Mapping[Target, tuple[Pair, ...]], place: GgufPlace, invocation: Lazy | None
) -> dict[Target, tuple[Update, ...]]:
    """Return the updates with the family's own names, in the layout in which the family stores each weight."""
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

"""A GGUF file in, an `Adapter` out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ...adapter import Adapter, Foreign, Step, Target
from ...errors import Malformed, ShapeMismatch, TargetNotFound, Unsupported
from ...methods.lora import LoRA
from ...naming.heads import undone
from ...tensors.arrange import item, turned
from ...tensors.gguf import Gguf, Value
from .._pairs import DAMAGED, check_factors, grouped, in_row_order, pair
from .invocation import activated, invocation_of
from .place import EMBEDDING, SLOTS, Place, expert_number, template

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint
    from .._pairs import Pair, Slots

FORMAT = "gguf"
ARCHITECTURE, TYPE, KIND, ALPHA = "general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"


def decode(file: Gguf, base: Checkpoint | None) -> Adapter:
    """The adapter in a file.

    Raises:
        Malformed, Unsupported: it is no LoRA of llama.cpp's, or of an architecture that is not known.
        TargetNotFound: a name has no place.
        UsageError: the order of rows depends on heads, and there is no base to tell.
    """
    name = _text(file, ARCHITECTURE)
    for key, word in ((TYPE, "adapter"), (KIND, "lora")):
        if _text(file, key) != word:
            raise Unsupported(f"{key} is {_text(file, key)!r}, not {word!r}", where=key, cure="Give a LoRA adapter")
    invocation = invocation_of(file)
    alpha = file.values.get(ALPHA, Value("f32", 0.0))
    if alpha.type != "f32" or not abs(alpha.value) < float("inf"):
        raise Malformed(f"{alpha.value!r} is no finite f32", where=ALPHA, cure=DAMAGED)
    place = Place(name, base, {}, 0)
    kept = {name: tensor for name, tensor in file.tensors.items() if name.endswith("_norm.weight")}
    pairs = {name: tensor for name, tensor in file.tensors.items() if name not in kept}
    updates: dict[Target, tuple[Pair, ...]] = {}
    for foreign, slots in grouped(pairs, SLOTS, "a GGUF adapter").items():
        for target, update in _updates(place, foreign, slots, alpha.value):
            updates[target] = (activated(target, update, invocation),)
    data = {
        "architecture": name, "alpha": alpha.value, "heads": place.known, "experts": place.experts,
        "values": [[key, value.type, value.value] for key, value in file.values.items()],
        "order": list(file.tensors), "types": {key: kind for key, kind in file.types.items() if kind == "Q8_0"},
    }  # fmt: skip
    return Adapter(updates, recipe=(Step("read", {"format": FORMAT}),), foreign=Foreign(FORMAT, data, kept))


def _updates(place: Place, foreign: str, slots: Slots, alpha: float) -> Iterator[tuple[Target, Pair]]:
    if place.is_stack(foreign):
        yield from _experts(place, foreign, slots, alpha)
        return
    if foreign == EMBEDDING and len(slots["A"].shape) == 2:
        slots = {**slots, "A": turned(slots["A"])}
    rank = check_factors(foreign, slots)
    own = place.names.back(foreign)
    update = pair(slots, alpha / rank if alpha else 1.0)
    order = place.order(foreign, update.B.shape[0])
    layout = "in out *k" if foreign == EMBEDDING or own.startswith("transformer.h.") else "out *in"
    yield Target(own, layout), update if order is None else in_row_order(update, lambda: undone(order))


def _experts(place: Place, foreign: str, slots: Slots, alpha: float) -> Iterator[tuple[Target, Pair]]:
    A, B = slots["A"], slots["B"]
    if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[:2] != (B.shape[0], B.shape[2]) or not A.shape[1]:
        raise ShapeMismatch(f"A is {list(A.shape)}, B is {list(B.shape)}", where=foreign, cure=DAMAGED)
    count, rank = A.shape[:2]
    place.experts = count
    for index, own in enumerate(_expert_names(place, foreign, count)):
        one: Slots = {name: item(leaf, index) for name, leaf in slots.items()}
        yield Target(own), LoRA(**one, scaling=alpha / rank if alpha else 1.0)


def _expert_names(place: Place, foreign: str, count: int) -> list[str]:
    """The modules of all experts of a stack, by number."""
    if place.names.walked is not None:
        found = sorted(place.names.walked.get(foreign, []), key=expert_number)
        if [expert_number(own) for own in found] != list(range(count)):
            why = f"{count} experts in the file, {len(found)} in the base"
            raise TargetNotFound(why, where=foreign, cure="Is this the base that the adapter was trained on?")
        return found
    own = [own for own, name in place.architecture.experts.items() if name == template(foreign)]
    number = foreign.split(".")[1]
    return [own[0].replace("{n}", number).replace("{e}", str(index)) for index in range(count)]


def _text(file: Gguf, key: str) -> str:
    value = file.values.get(key)
    if value is None or value.type != "string":
        raise Malformed("no such text", where=key, cure="This is no adapter of llama.cpp's")
    return str(value.value)

"""Convert LoRA in Megatron's layout: one pair A, B for each fused weight or, in canonical LoRA, for each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..core.adapter import Target
from ..errors import Malformed, ShapeMismatch, TargetNotFound, UsageError
from ..io.arrange import equal
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..naming.heads import Heads, by_group, undone
from ..naming.megatron import LAYER, OWN, QKV
from ..naming.tables import modules_of
from ._pairs import DAMAGED, Pairs, check_factors, grouped, in_row_order, of_rows, over_rows, unfit  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._pairs import Pair

SLOTS = {".linear_in.weight": "A", ".linear_out.weight": "B"}
Modules = Mapping[str, tuple[str, ...]]


def is_of(keys: list[str], modules: Modules) -> bool:
    """Whether at least one key belongs to one of these modules."""
    ends = tuple(module + end for module in modules for end in SLOTS)
    return any(key.endswith(ends) for key in keys)


def decode(
    tensors: Mapping[str, Lazy], modules: Modules, alpha: float, heads: Callable[[], Heads], base: Checkpoint | None
) -> tuple[dict[Target, tuple[Pair, ...]], dict[str, JsonValue]]:
    """Return the updates, and the leftovers for the writer: prefix of names, order of keys, whether pairs are fused.

    Raises:
        Malformed: a key belongs to none of these modules.
        ShapeMismatch: the shapes do not fit the base's numbers of heads.
    """
    own = _OwnNames(base)
    updates: dict[Target, tuple[Pair, ...]] = {}
    prefix, fused = "", False
    for name, slots in grouped(tensors, SLOTS, "Megatron").items():
        found = LAYER.fullmatch(name)
        if found is None or found["module"] not in modules:
            raise Malformed("adapterkit cannot convert this Megatron module", where=name, cure=DAMAGED)
        prefix, weights = found["prefix"], modules[found["module"]]
        fused = fused or len(weights) > 1
        update = LoRA(**slots, scaling=alpha / check_factors(name, slots))
        for weight, part in zip(weights, _split(name, update, weights, heads), strict=True):
            target = Target(own.named(f"model.layers.{found['n']}.{weight}"))
            if target in updates:
                raise Malformed("the weight has a second pair", where=name, cure=DAMAGED)
            updates[target] = (part,)
    return updates, {"prefix": prefix, "fused": fused, "order": list(tensors)}


def _split(name: str, update: LoRA, weights: tuple[str, ...], heads: Callable[[], Heads]) -> Iterator[Pair]:
    out = update.B.shape[0]
    if len(weights) == 1:
        yield update
        return
    sizes = heads().sizes if weights == QKV else (out // 2, out - out // 2)
    if sum(sizes) != out or (weights != QKV and out % 2):
        why = f"it has {out} outputs, which do not fit {' and '.join(weights)}"
        raise ShapeMismatch(why, where=name, cure="Is this the base that the adapter was trained on?")
    whole: Pair = update
    if weights == QKV:
        whole = in_row_order(update, lambda: undone(by_group(heads())))
    start = 0
    for size in sizes:
        yield of_rows(whole, start, start + size)
        start += size


def why_not(modules: Modules) -> Callable[[Target, Pair], str]:
    """Return a function that returns the reason why these modules cannot express an update, or an empty text."""
    known = {weight for weights in modules.values() for weight in weights}

    def why(target: Target, update: Pair) -> str:
        found = OWN.fullmatch(target.path)
        if found is None or found["module"] not in known:
            return "its module is not in a Megatron layer"
        return unfit(target, update)

    return why


def encode(
    pairs: Pairs, modules: Modules, prefix: str, heads: Callable[[], Heads], fused: bool | None
) -> tuple[dict[str, Lazy], bool]:
    """Return the tensors by key, and whether the pairs are fused.

    Pairs of a fused weight's parts are fused if they share A.
    """
    if LAYER.fullmatch(f"{prefix}0.x") is None:
        why = f"the stored data of the Megatron file is damaged: names begin with {prefix!r}"
        raise Malformed(why, cure="Remove the data: adapter.replace(foreign=None)")
    layers = _by_layer(pairs)
    groups = [weights for weights in modules.values() if len(weights) > 1]
    possible = all(_fits(found, weights) for found in layers.values() for weights in groups)
    fuse = possible if fused is None else possible and fused
    tensors: dict[str, Lazy] = {}
    for layer, found in layers.items():
        for module, weights in modules.items():
            single = len(weights) == 1
            in_group = single and any(weights[0] in group for group in groups)
            if not all(weight in found for weight in weights) or (in_group if fuse else not single):
                continue
            update = found[weights[0]] if single else _joined([found[weight] for weight in weights], weights, heads)
            for end, field in SLOTS.items():
                tensors[f"{prefix}{layer}.{module}{end}"] = as_lazy(update.tensors[field])
    return tensors, fuse


def _joined(updates: list[Pair], weights: tuple[str, ...], heads: Callable[[], Heads]) -> Pair:
    whole = over_rows(updates)
    if weights != QKV:
        return whole
    if sum(heads().sizes) != whole.B.shape[0]:
        why = f"{whole.B.shape[0]} outputs of q, k and v do not fit the base's heads"
        raise ShapeMismatch(why, where="linear_qkv", cure="Is this the base that the adapter was trained on?")
    return in_row_order(whole, lambda: by_group(heads()))


def _by_layer(pairs: Pairs) -> dict[int, dict[str, Pair]]:
    layers: dict[int, dict[str, Pair]] = {}
    for target, update in pairs.items():
        found = OWN.fullmatch(target.path)
        assert found is not None
        layers.setdefault(int(found["n"]), {})[found["module"]] = update
    return layers


def _fits(found: Mapping[str, Pair], weights: tuple[str, ...]) -> bool:
    """Whether the pairs of a fused weight's parts can be fused into one pair; true if no part has a pair."""
    own = [found[weight] for weight in weights if weight in found]
    if not own:
        return True
    first = own[0]
    return len(own) == len(weights) and all(
        u.scaling == first.scaling and equal(as_lazy(u.A), as_lazy(first.A)) for u in own[1:]
    )


class _OwnNames:
    """Translates module names to the base's names, which may have a prefix; without a base, the names stay the same."""

    def __init__(self, base: Checkpoint | None) -> None:
        self.modules: dict[str, list[str]] | None = None
        if base is not None:
            self.modules = {}
            for name in dict.fromkeys(modules_of(base.tensors)):
                found = OWN.fullmatch(name)
                if found is not None:
                    self.modules.setdefault(f"model.layers.{found['n']}.{found['module']}", []).append(name)

    def named(self, name: str) -> str:
        if self.modules is None:
            return name
        found = self.modules.get(name, [])
        if len(found) != 1:
            why = f"exactly one module must have this name, but the base has {len(found)}"
            raise TargetNotFound(why, where=name, cure="Is this the base that the adapter was trained on?")
        return found[0]


def heads_again(kept: tuple[int, int, int] | None, base: Checkpoint | None, where: str) -> Callable[[], Heads]:
    """Return a function that returns the base's numbers of heads or, without a base, the numbers in `kept`."""
    from ..naming.heads import heads_of

    def heads() -> Heads:
        if base is None and kept:
            return Heads(*kept)
        if base is None:
            why = "the order of this weight's rows depends on the base's numbers of heads"
            raise UsageError(why, where=where, cure="Give the base, with its config.json: --base (base=)")
        return heads_of(base.config, where)

    return heads

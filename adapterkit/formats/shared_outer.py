"""Experts that share their outer factors: PEFT's folder, in which a stack has one A, or one B, for all experts.

SGLang serves it with `--experts-shared-outer-loras`, Megatron-Bridge trains it. A of gate and up, which read the hidden
states, and B of down, which writes them, have the shape `[1, ...]`; their partners have one slice an expert. A stack
that shares nothing has the shapes `[e, r, in]` and `[e, out, r]`, which SGLang reads, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter import Adapter, BaseRef, Foreign, Step, Target
from ..binding import bind
from ..binding.translating import moves_of, translated
from ..errors import AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, Unsupported, UsageError
from ..methods.lora import LoRA
from ..naming.architectures import WEIGHT, architecture_of, expert_count
from ..naming.shared_outer import EXPERT, OUTER, STACK, is_shared_outer
from ..naming.tables import modules_of
from ..naming.ties import is_embedding
from ..tensors import arrange, safetensors
from ..tensors.lazy import Lazy, as_lazy
from ._folders import folder_of
from ._format import Format
from ._leftovers import Leftovers, in_order, remembered
from ._one_number import of_one_alpha, whole_number
from ._pairs import DAMAGED, Pairs, check_factors, finite, rank_of, unfit, whole_rank
from .peft.container import CONFIG, SAFETENSORS, load, save

if TYPE_CHECKING:
    from ..tensors.checkpoint import Checkpoint
    from ._pairs import Pair, Slots

FORMAT = "shared_outer"
PREFIX = "base_model.model."
_SLOTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_OFF = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
"""Fields of PEFT's that would change what the tensors mean."""


class Hints(Leftovers, total=False):
    """The config."""

    config: dict[str, Any]


class SharedOuter(Format):
    """Folders of adapters whose experts share their outer factors."""

    url = "https://github.com/sgl-project/sglang/pull/21466"
    description = "SGLang, Megatron-Bridge: PEFT's folder with experts in stacks that share A of gate and up, B of down"
    methods = frozenset({"lora"})
    owns = frozenset({CONFIG, SAFETENSORS})

    def sniff(self, path: Path) -> bool:
        folder = folder_of(path)
        if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS):
            return False
        try:
            return (folder / CONFIG).is_file() and is_shared_outer(
                safetensors.read_header(folder / SAFETENSORS).entries
            )
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            config, tensors = load(path)
            rank, alpha = _numbers(config)
            updates = dict(_decode(tensors, rank, alpha, base))
            if base is not None:
                updates = _bound(updates, base)
        except AdapterkitError as error:
            raise error.at(path=path) from None
        data = {"config": dict(config), "order": list(tensors)}
        name = config.get("base_model_name_or_path")
        ref = BaseRef(str(name)) if name else None
        return Adapter(updates, ref, (Step("read", {"format": FORMAT}),), Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = remembered(adapter, FORMAT, Hints)
        before = hints.get("config", {})
        alpha, pairs, lines = of_one_alpha(
            _apart(adapter, base), lambda target, update: unfit(target, update), dialect="SGLang", on_loss=on_loss,
            first=before.get("lora_alpha"), one_rank=True,
        )  # fmt: skip
        config_of_base = None if base is None else base.config
        tensors, rank, promoted = _spelled(pairs, expert_count(config_of_base), on_loss == "promote")
        # Where a promotion made ranks grow, alpha grows alike: the scaling, alpha / r, stays.
        alpha *= rank / rank_of(next(iter(pairs.values())))
        base_id = adapter.base.id if adapter.base else None
        modules = sorted({target.path.rpartition(".")[2] for target in pairs})
        config = {
            "base_model_name_or_path": base_id, "bias": "none", "peft_type": "LORA", "target_modules": modules,
            **before, "r": rank, "lora_alpha": whole_number(alpha),
        }  # fmt: skip
        save(path, config, in_order(tensors, hints))
        return lines + promoted


def _numbers(config: Mapping[str, Any]) -> tuple[int, float]:
    wrong = next((name for name in _OFF if config.get(name)), None)
    if wrong is not None:
        why = f"{wrong} is {config[wrong]!r} beside stacks that share factors"
        raise Unsupported(why, where=f"{CONFIG}: {wrong}", cure="Export the adapter again without it")
    return whole_rank(config.get("r"), f"{CONFIG}: r"), finite(config.get("lora_alpha"), f"{CONFIG}: lora_alpha")


def _decode(
    tensors: Mapping[str, Lazy], rank: int, alpha: float, base: Checkpoint | None
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    modules: dict[str, Slots] = {}
    for key, leaf in tensors.items():
        end = next((end for end in _SLOTS if key.endswith(end)), None)
        if end is None or not key.startswith(PREFIX):
            raise Malformed(f"does not begin with {PREFIX} or end in {' or '.join(_SLOTS)}", where=key, cure=DAMAGED)
        modules.setdefault(key.removeprefix(PREFIX).removesuffix(end), {})[_SLOTS[end]] = leaf
    stacks = {name: slots for name, slots in modules.items() if any(len(leaf.shape) == 3 for leaf in slots.values())}
    partners: dict[str, dict[int, str]] = {}
    for name in modules:
        found = EXPERT.fullmatch(name)
        if found and (stack := f"{found['stem']}.{found['leaf']}") in stacks:
            partners.setdefault(stack, {})[int(found["e"])] = name
    for name, slots in stacks.items():
        numbered = {e: modules[partner] for e, partner in partners.get(name, {}).items()}
        yield from _experts(name, slots, numbered, rank, alpha, base)
    alone = set(modules) - set(stacks) - {name for found in partners.values() for name in found.values()}
    for name in (name for name in modules if name in alone):
        slots = modules[name]
        if set(slots) != {"A", "B"}:
            raise Malformed("a factor without its partner", where=name, cure=DAMAGED)
        if check_factors(name, slots) != rank:
            raise ShapeMismatch(f"a rank other than the config's {rank}", where=name, cure=DAMAGED)
        yield (
            Target(name, "in out *k" if is_embedding(f"{name}.weight") else "out *in"),
            (LoRA(**slots, scaling=alpha / rank),),
        )


def _experts(
    name: str, slots: Slots, numbered: Mapping[int, Slots], rank: int, alpha: float, base: Checkpoint | None
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    """One stack, whose second factor may be in keys of single experts."""
    found = STACK.fullmatch(name)
    if found is None:
        raise Malformed("a factor with three axes at no experts", where=name, cure=DAMAGED)
    shapes = {field: leaf.shape for field, leaf in slots.items()}
    counts = {shape[0] for shape in shapes.values()} | ({len(numbered)} if numbered else set())
    count = max(counts)
    if any(len(shape) != 3 for shape in shapes.values()) or counts - {1, count}:
        raise ShapeMismatch(f"factors of {shapes}", where=name, cure=DAMAGED)
    if count == 1:
        count = expert_count(None if base is None else base.config)
        if not count:
            why = "one A and one B for all experts, and nothing tells how many experts there are"
            raise UsageError(why, where=name, cure="Give the base by base= or --base")
    # One factor of all experts is one leaf, so that it is stored once wherever it goes.
    only = {field: arrange.item(leaf, 0) for field, leaf in slots.items() if leaf.shape[0] == 1}
    stacked = found["leaf"] == "gate_up_proj"
    factors = []
    for e in range(count):
        one: Slots = {f: only[f] if f in only else arrange.item(leaf, e) for f, leaf in slots.items()}
        one |= {field: leaf for field, leaf in numbered.get(e, {}).items() if field not in one}
        if set(one) != {"A", "B"}:
            raise Malformed(f"expert {e} has no {'B' if 'A' in one else 'A'}", where=name, cure=DAMAGED)
        if check_factors(f"{name}: expert {e}", one) != rank:
            raise ShapeMismatch(f"a rank other than the config's {rank}", where=name, cure=DAMAGED)
        factors.append(one)
    if stacked:
        whole: Slots = {field: arrange.stacked([one[field] for one in factors]) for field in ("A", "B")}
        yield Target(name, "e out *in"), (LoRA(**whole, scaling=alpha / rank),)
        return
    for e, one in enumerate(factors):
        yield Target(f"{found['stem']}.{e}.{found['leaf']}"), (LoRA(**one, scaling=alpha / rank),)


def _bound(updates: dict[Target, tuple[LoRA, ...]], base: Checkpoint) -> dict[Target, Any]:
    """The updates where the base has them; what is there by its own name stays."""
    own = set(modules_of(base.tensors))
    lost = {target: found for target, found in updates.items() if target.path not in own}
    placed = bind(Adapter(lost), base).adapter.updates if lost else {}
    return {target: found for target, found in updates.items() if target not in lost} | dict(placed)


def _apart(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """The adapter with one LoRA an expert, under the names of a hub.

    Raises:
        UsageError: experts are in a stack, and no config of a base tells the family.
    """
    stacks = {target: found for target, found in adapter.updates.items() if target.stacked}
    if not stacks:
        return adapter
    family = architecture_of(None if base is None else base.config)
    if family is None:
        why = "experts in a stack, and the family tells which of its rows are gate and up"
        raise UsageError(
            why, where=str(next(iter(stacks))), cure="Give the base, with its config.json, by base= or --base"
        )
    apart = translated(stacks, moves_of(stacks, family, WEIGHT))
    updates: dict[Target, Any] = {}
    for target, found in adapter.updates.items():
        updates |= {target: found} if target not in stacks else {}
    return adapter.replace(updates=updates | apart)


def _spelled(pairs: Pairs, experts: int, promote: bool) -> tuple[dict[str, Lazy], int, list[str]]:
    """The tensors by key, the rank of all, and a line for each stack that was promoted."""
    plain: Pairs = {}
    stacks: dict[str, dict[int, Pair]] = {}
    for target, update in pairs.items():
        found = EXPERT.fullmatch(target.path)
        if found:
            stacks.setdefault(f"{found['stem']}.{found['leaf']}", {})[int(found["e"])] = update
        else:
            plain[target] = update
    rank = rank_of(next(iter(pairs.values())))
    counts = {name: max(experts, max(held) + 1) for name, held in stacks.items()}
    _check_all(stacks, counts, experts)
    apart = [name for name, held in stacks.items() if _shared(name, held) is None]
    if apart and not promote:
        items = [f"{name}: its experts have {'B' if _writes(name) else 'A'} of their own" for name in apart]
        cure = "Allow ranks to grow with on_loss='promote', which is exact, or write peft with --profile sglang"
        raise Unrepresentable("this layout has one outer factor for all experts", items=items, cure=cure)
    wide = rank * max([counts[name] for name in apart], default=1)
    tensors: dict[str, Lazy] = {}
    for name, held in stacks.items():
        only = _shared(name, held)
        tensors |= _stack(name, held, counts[name], only, rank, wide)
    for target, update in plain.items():
        A, B = arrange.padded(as_lazy(update.A), wide, 0), arrange.padded(as_lazy(update.B), wide, 1)
        tensors |= {f"{PREFIX}{target.path}{end}": leaf for end, leaf in zip(_SLOTS, (A, B), strict=True)}
    return tensors, wide, [f"promoted {name} to rank {wide}, of which each expert uses {rank}" for name in apart]


def _check_all(stacks: Mapping[str, Mapping[int, Pair]], counts: Mapping[str, int], experts: int) -> None:
    gaps = [f"{name}: has experts {sorted(held)}" for name, held in stacks.items() if len(held) < counts[name]]
    if gaps and not experts:
        why = "all experts are in one stack, and nothing tells how many there are"
        raise Unrepresentable(why, items=gaps, cure="Give the base by base= or --base")


def _writes(name: str) -> bool:
    """Whether the module writes the hidden states, so that its experts share B."""
    return name.rpartition(".")[2] in OUTER


def _shared(name: str, held: Mapping[int, Pair]) -> Lazy | None:
    """The outer factor of all experts; None where they have one each."""
    leaves = [as_lazy(each.B if _writes(name) else each.A) for each in held.values()]
    alike = all(leaf.shape == leaves[0].shape and arrange.equal(leaf, leaves[0]) for leaf in leaves[1:])
    return leaves[0] if alike else None


def _stack(name: str, held: Mapping[int, Pair], count: int, only: Lazy | None, rank: int, wide: int) -> dict[str, Lazy]:
    """The two tensors of a stack.

    Experts with outer factors of their own get one that holds all of them, side by side; the inner factor of an expert
    is zero but at its own.
    """
    writes, first = _writes(name), next(iter(held.values()))
    axis = 1 if writes else 0  # of the rank, in the outer factor; the inner one has it along the other axis
    outers, inners = [], []
    for e in range(count):
        given = held.get(e)
        like_outer, like_inner = (first.B, first.A) if writes else (first.A, first.B)
        outer = as_lazy(like_outer) if given is None else as_lazy(given.B if writes else given.A)
        zero = arrange.zeros(tuple(like_inner.shape), as_lazy(like_inner).dtype)
        inner = zero if given is None else as_lazy(given.A if writes else given.B)
        if only is None:
            outer = arrange.zeros(outer.shape, outer.dtype) if given is None else outer
            before, behind = (_blank(inner, size, 1 - axis) for size in (e * rank, (count - 1 - e) * rank))
            inner = arrange.joined([*before, inner, *behind], 1 - axis)
        outers.append(outer)
        inners.append(arrange.padded(inner, wide, 1 - axis))
    outer = only if only is not None else arrange.joined(outers, axis)
    outer = arrange.padded(outer, wide, axis)
    outer = outer.reshape(1, *outer.shape)
    A, B = (arrange.stacked(inners), outer) if writes else (outer, arrange.stacked(inners))
    return {f"{PREFIX}{name}{end}": leaf for end, leaf in zip(_SLOTS, (A, B), strict=True)}


def _blank(like: Lazy, size: int, axis: int) -> list[Lazy]:
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
    return [arrange.zeros(shape, like.dtype)] if size else []

"""Encode an `Adapter` as a folder with shared outer factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.adapter import Adapter, Target
from ...errors import Unrepresentable, UsageError
from ...io import arrange
from ...io.lazy import Lazy, as_lazy
from ...naming.architectures import WEIGHT, architecture_of, expert_count
from ...naming.binding.translating import moves_of, translated
from ...naming.shared_outer import EXPERT, OUTER
from .._leftovers import Leftovers, in_order, remembered
from .._one_number import of_one_alpha, whole_number
from .._pairs import Pairs, rank_of, unfit
from ..peft.container import save
from .reading import FORMAT, PREFIX, SLOTS

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from .._pairs import Pair


class SharedOuterHints(Leftovers, total=False):
    """The leftovers of a folder: its config."""

    config: dict[str, Any]


def write_folder(adapter: Adapter, path: Path, on_loss: str, base: Checkpoint | None) -> list[str]:
    """Write an adapter, and return one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: experts have different outer factors, and `on_loss` is not `promote`; or a method is not LoRA.
        UsageError: experts are in a stack, and no base is given, which shows the family of models.
    """
    hints = remembered(adapter, FORMAT, SharedOuterHints)
    before = hints.get("config", {})
    alpha, pairs, lines = of_one_alpha(
        _apart(adapter, base), lambda target, update: unfit(target, update), dialect="SGLang", on_loss=on_loss,
        first=before.get("lora_alpha"), one_rank=True,
    )  # fmt: skip
    config_of_base = None if base is None else base.config
    tensors, rank, promoted = _spelled(pairs, expert_count(config_of_base), on_loss == "promote")
    # If a promotion raised the rank, multiply alpha by the same factor, so that the scaling alpha / r stays the same.
    alpha *= rank / rank_of(next(iter(pairs.values())))
    base_id = adapter.base.id if adapter.base else None
    modules = sorted({target.path.rpartition(".")[2] for target in pairs})
    config = {
        "base_model_name_or_path": base_id, "bias": "none", "peft_type": "LORA", "target_modules": modules,
        **before, "r": rank, "lora_alpha": whole_number(alpha),
    }  # fmt: skip
    save(path, config, in_order(tensors, hints))
    return lines + promoted


def _apart(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """Split stacks of experts into one LoRA per expert, with the names in a hub's checkpoint.

    Raises:
        UsageError: experts are in a stack, and no base is given, which shows the family of models.
    """
    stacks = {target: found for target, found in adapter.updates.items() if target.stacked}
    if not stacks:
        return adapter
    family = architecture_of(None if base is None else base.config)
    if family is None:
        why = "the experts are in a stack, and only the base's family shows which rows of the stack are gate and up"
        raise UsageError(why, where=str(next(iter(stacks))), cure="Give the base, with its config.json: --base (base=)")
    apart = translated(stacks, moves_of(stacks, family, WEIGHT))
    updates: dict[Target, Any] = {}
    for target, found in adapter.updates.items():
        updates |= {target: found} if target not in stacks else {}
    return adapter.replace(updates=updates | apart)


def _spelled(pairs: Pairs, experts: int, promote: bool) -> tuple[dict[str, Lazy], int, list[str]]:
    """Return the tensors by key, the rank of all modules, and a line for each stack whose rank was raised."""
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
        items = [f"{name}: each of its experts has a separate {'B' if _writes(name) else 'A'}" for name in apart]
        cure = (
            "Allow ranks to grow, which is exact, with --on-loss promote (on_loss='promote'), or write --to peft "
            "--profile sglang (format='peft', profile='sglang')"
        )
        raise Unrepresentable("this layout has one outer factor for all experts", items=items, cure=cure)
    wide = rank * max([counts[name] for name in apart], default=1)
    tensors: dict[str, Lazy] = {}
    for name, held in stacks.items():
        only = _shared(name, held)
        tensors |= _stack(name, held, counts[name], only, rank, wide)
    for target, update in plain.items():
        A, B = arrange.padded(as_lazy(update.A), wide, 0), arrange.padded(as_lazy(update.B), wide, 1)
        tensors |= {f"{PREFIX}{target.path}{end}": leaf for end, leaf in zip(SLOTS, (A, B), strict=True)}
    return tensors, wide, [f"promoted {name} to rank {wide}, of which each expert uses {rank}" for name in apart]


def _check_all(stacks: Mapping[str, Mapping[int, Pair]], counts: Mapping[str, int], experts: int) -> None:
    gaps = [
        f"{name}: the adapter has experts {sorted(held)}" for name, held in stacks.items() if len(held) < counts[name]
    ]
    if gaps and not experts:
        why = "all experts of a module are in one stack, and their number is unknown"
        raise Unrepresentable(why, items=gaps, cure="Give the base with --base (base=)")


def _writes(name: str) -> bool:
    """Whether a module's outputs are hidden states, as for `down_proj`. Then the experts share B, otherwise A."""
    return name.rpartition(".")[2] in OUTER


def _shared(name: str, held: Mapping[int, Pair]) -> Lazy | None:
    """Return the outer factor if it is the same for all experts; otherwise None."""
    leaves = [as_lazy(each.B if _writes(name) else each.A) for each in held.values()]
    alike = all(leaf.shape == leaves[0].shape and arrange.equal(leaf, leaves[0]) for leaf in leaves[1:])
    return leaves[0] if alike else None


def _stack(name: str, held: Mapping[int, Pair], count: int, only: Lazy | None, rank: int, wide: int) -> dict[str, Lazy]:
    """Return the tensors A and B of a stack, by key.

    If the experts have different outer factors, these factors are concatenated into one. Then the inner
    factor of each expert is zero, except at the rank indices of this expert.
    """
    writes, first = _writes(name), next(iter(held.values()))
    axis = 1 if writes else 0  # The outer factor's axis of the rank; the inner factor's is 1 - axis.
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
    return {f"{PREFIX}{name}{end}": leaf for end, leaf in zip(SLOTS, (A, B), strict=True)}


def _blank(like: Lazy, size: int, axis: int) -> list[Lazy]:
    shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
    return [arrange.zeros(shape, like.dtype)] if size else []

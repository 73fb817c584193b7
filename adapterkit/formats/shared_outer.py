"""Read and write PEFT's folder for experts with shared outer factors: all experts of a stack have the same A or B.

SGLang serves such adapters with `--experts-shared-outer-loras`, and Megatron-Bridge trains them. The shared (outer)
factor is A in the gate and up projections, and B in the down projection; its shape is `[1, ...]`. The other (inner)
factor has one slice per expert. SGLang also reads stacks without shared factors, with the shapes `[e, r, in]` and
`[e, out, r]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, BaseRef, Foreign, Step, Target
from ..errors import (
    PASS_BASE,
    PASS_BASE_WITH_CONFIG,
    WRITE_AGAIN,
    AdapterkitError,
    Malformed,
    ShapeMismatch,
    Unrepresentable,
    Unsupported,
    UsageError,
)
from ..io import arrange, safetensors
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..naming.architectures import WEIGHT, architecture_of, expert_count
from ..naming.binding import bind
from ..naming.binding.moving import moves_of, translated
from ..naming.ties import is_embedding
from ..naming.tool_names import EXPERT, OUTER, STACK, is_shared_outer, modules_of
from ._containers import folder_of
from ._format import Format
from ._joining import blank
from ._kit import (
    Leftovers,
    Pairs,
    check_factors,
    in_order,
    is_finite,
    leftovers,
    of_one_alpha,
    rank_of,
    unfit,
    whole_number,
    whole_rank,
)
from .peft import CONFIG, SAFETENSORS, load, save

if TYPE_CHECKING:
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Slots


class SharedOuter(Format):
    """Folders of adapters whose experts share their outer factors."""

    url = "https://github.com/sgl-project/sglang/pull/21466"
    description = (
        "SGLang, Megatron-Bridge: PEFT's folder with stacked experts that share A of gate and up, and B of down"
    )
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

        return read_folder(path, base)

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:

        return write_folder(adapter, path, on_loss, base)


# Decode a folder with shared outer factors into an `Adapter`.


FORMAT = "shared_outer"
PREFIX = "base_model.model."
SLOTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}


def read_folder(path: Path, base: Checkpoint | None) -> Adapter:
    """Read an adapter. Its tensors are loaded when they are first used.

    Raises:
        Malformed, ShapeMismatch, Unsupported: the tensors do not have the layout of this format.
        UsageError: all experts share both factors, and no base shows the number of experts.
    """
    try:
        config, tensors = load(path)
        rank, alpha = _numbers(config)
        updates: dict[Target, tuple[Update, ...]] = dict(_decode(tensors, rank, alpha, base))
        if base is not None:
            updates = _bound(updates, base)
    except AdapterkitError as error:
        raise error.at(path=path) from None
    data: dict[str, JsonValue] = {"config": dict(config), "order": list(tensors)}
    name = config.get("base_model_name_or_path")
    ref = BaseRef(str(name)) if name else None
    return Adapter(updates, ref, (Step("read", {"format": FORMAT}),), Foreign(FORMAT, data))


def _numbers(config: Mapping[str, object]) -> tuple[int, float]:
    from .peft.config import field_of_another_formula

    wrong = field_of_another_formula(config)
    if wrong is not None:
        why = f"{wrong} is {config[wrong]!r}, but a folder with shared outer factors must not set this field"
        raise Unsupported(why, where=f"{CONFIG}: {wrong}", cure="Export the adapter again without this field")
    return whole_rank(config.get("r"), f"{CONFIG}: r"), is_finite(config.get("lora_alpha"), f"{CONFIG}: lora_alpha")


def _decode(
    tensors: Mapping[str, Lazy], rank: int, alpha: float, base: Checkpoint | None
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    modules: dict[str, Slots] = {}
    for key, leaf in tensors.items():
        end = next((end for end in SLOTS if key.endswith(end)), None)
        if end is None or not key.startswith(PREFIX):
            raise Malformed(
                f"the key does not begin with {PREFIX}, or does not end in {' or '.join(SLOTS)}",
                where=key,
                cure=WRITE_AGAIN,
            )
        modules.setdefault(key.removeprefix(PREFIX).removesuffix(end), {})[SLOTS[end]] = leaf
    stacks = {name: slots for name, slots in modules.items() if any(len(leaf.shape) == 3 for leaf in slots.values())}
    partners: dict[str, dict[int, str]] = {}
    for name in modules:
        match = EXPERT.fullmatch(name)
        if match and (stack := f"{match['stem']}.{match['leaf']}") in stacks:
            partners.setdefault(stack, {})[int(match["e"])] = name
    for name, slots in stacks.items():
        numbered = {e: modules[partner] for e, partner in partners.get(name, {}).items()}
        yield from _experts(name, slots, numbered, rank, alpha, base)
    alone = set(modules) - set(stacks) - {name for members in partners.values() for name in members.values()}
    for name in (name for name in modules if name in alone):
        slots = modules[name]
        if set(slots) != {"A", "B"}:
            raise Malformed("this module has only one of the factors A and B", where=name, cure=WRITE_AGAIN)
        if check_factors(name, slots) != rank:
            raise ShapeMismatch(f"the rank differs from the config's rank {rank}", where=name, cure=WRITE_AGAIN)
        yield (
            Target(name, "in out *k" if is_embedding(f"{name}.weight") else "out *in"),
            (LoRA(**slots, scaling=alpha / rank),),
        )


def _experts(
    name: str, slots: Slots, numbered: Mapping[int, Slots], rank: int, alpha: float, base: Checkpoint | None
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    """Yield the updates of one stack of experts.

    `numbered` maps an expert's number to its inner factor, if the file stores one tensor per expert.
    """
    match = STACK.fullmatch(name)
    if match is None:
        raise Malformed(
            "a factor has three axes, but the module's name is not that of a stack of experts",
            where=name,
            cure=WRITE_AGAIN,
        )
    shapes = {field: leaf.shape for field, leaf in slots.items()}
    # Refuse axes of size 0. Such tensors take no bytes, so a small file could claim any number of experts.
    if any(len(shape) != 3 or 0 in shape for shape in shapes.values()):
        raise ShapeMismatch(
            f"A must have the shape [e or 1, r, in], and B [e or 1, out, r]; the shapes are {shapes}",
            where=name,
            cure=WRITE_AGAIN,
        )
    counts = {shape[0] for shape in shapes.values()} | ({len(numbered)} if numbered else set())
    count = max(counts)
    if counts - {1, count}:
        raise ShapeMismatch(
            f"the numbers of experts differ: the shapes are {shapes}, and {len(numbered)} experts have separate keys",
            where=name,
            cure=WRITE_AGAIN,
        )
    if count == 1:
        count = expert_count(None if base is None else base.config)
        if not count:
            why = "all experts share one A and one B, and the number of experts is unknown"
            raise UsageError(why, where=name, cure=PASS_BASE)
    # All experts get the same object for a shared factor, so that a writer can store it as one tensor.
    only = {field: arrange.item(leaf, 0) for field, leaf in slots.items() if leaf.shape[0] == 1}
    stacked = match["leaf"] == "gate_up_proj"
    factors = []
    for e in range(count):
        one: Slots = {f: only[f] if f in only else arrange.item(leaf, e) for f, leaf in slots.items()}
        one |= {field: leaf for field, leaf in numbered.get(e, {}).items() if field not in one}
        if set(one) != {"A", "B"}:
            raise Malformed(f"expert {e} has no {'B' if 'A' in one else 'A'}", where=name, cure=WRITE_AGAIN)
        if check_factors(f"{name}: expert {e}", one) != rank:
            raise ShapeMismatch(f"the rank differs from the config's rank {rank}", where=name, cure=WRITE_AGAIN)
        factors.append(one)
    if stacked:
        whole: Slots = {field: arrange.stacked([one[field] for one in factors]) for field in ("A", "B")}
        yield Target(name, "e out *in"), (LoRA(**whole, scaling=alpha / rank),)
        return
    for e, one in enumerate(factors):
        yield Target(f"{match['stem']}.{e}.{match['leaf']}"), (LoRA(**one, scaling=alpha / rank),)


def _bound(updates: dict[Target, tuple[Update, ...]], base: Checkpoint) -> dict[Target, tuple[Update, ...]]:
    """If the base does not have a target's path, bind the target to the base. Leave the other targets unchanged."""
    modules_here = set(modules_of(base.tensors))
    lost = {target: group for target, group in updates.items() if target.path not in modules_here}
    placed = bind(Adapter(lost), base).adapter.updates if lost else {}
    return {target: group for target, group in updates.items() if target not in lost} | dict(placed)


# Encode an `Adapter` as a folder with shared outer factors.


class SharedOuterHints(Leftovers, total=False):
    """The source folder's config, kept for the writer."""

    config: dict[str, Any]


def write_folder(adapter: Adapter, path: Path, on_loss: str, base: Checkpoint | None) -> list[str]:
    """Write an adapter, and return one line for each omitted or rewritten update.

    Raises:
        Unrepresentable: experts have different outer factors, and `on_loss` is not `promote`; or a method is not LoRA.
        UsageError: experts are in a stack, and no base is given that shows the model family.
    """
    hints = leftovers(adapter, FORMAT, SharedOuterHints)
    before = hints.get("config", {})
    alpha, pairs, lines = of_one_alpha(
        _apart(adapter, base), lambda target, update: unfit(target, update), format_name="SGLang", on_loss=on_loss,
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
    """Split stacks of experts into one LoRA per expert, with the names that the model's checkpoints on the hub use.

    Raises:
        UsageError: experts are in a stack, and no base is given that shows the model family.
    """
    stacks = {target: group for target, group in adapter.updates.items() if target.stacked}
    if not stacks:
        return adapter
    family = architecture_of(None if base is None else base.config)
    if family is None:
        why = "the experts are in a stack, and only the base shows which rows of the stack are gate and up"
        raise UsageError(why, where=str(next(iter(stacks))), cure=PASS_BASE_WITH_CONFIG)
    apart = translated(stacks, moves_of(stacks, family, WEIGHT))
    updates: dict[Target, Any] = {}
    for target, group in adapter.updates.items():
        updates |= {target: group} if target not in stacks else {}
    return adapter.replace(updates=updates | apart)


def _spelled(pairs: Pairs, experts: int, promote: bool) -> tuple[dict[str, Lazy], int, list[str]]:
    """Return the tensors by key, the rank of all modules, and a line for each stack whose rank was raised."""
    plain: Pairs = {}
    stacks: dict[str, dict[int, Pair]] = {}
    for target, update in pairs.items():
        match = EXPERT.fullmatch(target.path)
        if match:
            stacks.setdefault(f"{match['stem']}.{match['leaf']}", {})[int(match["e"])] = update
        else:
            plain[target] = update
    rank = rank_of(next(iter(pairs.values())))
    counts = {name: max(experts, max(experts_here) + 1) for name, experts_here in stacks.items()}
    _check_all(stacks, counts, experts)
    apart = [name for name, experts_here in stacks.items() if _shared(name, experts_here) is None]
    if apart and not promote:
        items = [f"{name}: not all experts have the same {'B' if _writes(name) else 'A'}" for name in apart]
        cure = (
            "Allow ranks to grow, which is exact, with --on-loss promote (on_loss='promote'), or write --to peft "
            "--profile sglang (format='peft', profile='sglang')"
        )
        raise Unrepresentable(
            "a folder with shared outer factors stores one outer factor for all experts of a stack",
            items=items,
            cure=cure,
        )
    wide = rank * max([counts[name] for name in apart], default=1)
    tensors: dict[str, Lazy] = {}
    for name, experts_here in stacks.items():
        only = _shared(name, experts_here)
        tensors |= _stack(name, experts_here, counts[name], only, rank, wide)
    for target, update in plain.items():
        A, B = arrange.padded(as_lazy(update.A), wide, 0), arrange.padded(as_lazy(update.B), wide, 1)
        tensors |= {f"{PREFIX}{target.path}{end}": leaf for end, leaf in zip(SLOTS, (A, B), strict=True)}
    return tensors, wide, [f"promoted {name} to rank {wide}; each expert uses rank {rank}" for name in apart]


def _check_all(stacks: Mapping[str, Mapping[int, Pair]], counts: Mapping[str, int], experts: int) -> None:
    gaps = [
        f"{name}: the adapter has experts {sorted(experts_here)}"
        for name, experts_here in stacks.items()
        if len(experts_here) < counts[name]
    ]
    if gaps and not experts:
        why = "a stack has one slice for each expert of the model, and the number of experts is unknown"
        raise Unrepresentable(why, items=gaps, cure=PASS_BASE)


def _writes(name: str) -> bool:
    """Whether a module's outputs are hidden states, as for `down_proj`.

    The experts of such a module share B. The experts of other modules share A.
    """
    return name.rpartition(".")[2] in OUTER


def _shared(name: str, experts_here: Mapping[int, Pair]) -> Lazy | None:
    """Return the outer factor that all experts share; None if the experts have different outer factors."""
    leaves = [as_lazy(each.B if _writes(name) else each.A) for each in experts_here.values()]
    alike = all(leaf.shape == leaves[0].shape and arrange.equal(leaf, leaves[0]) for leaf in leaves[1:])
    return leaves[0] if alike else None


def _stack(
    name: str, experts_here: Mapping[int, Pair], count: int, only: Lazy | None, rank: int, wide: int
) -> dict[str, Lazy]:
    """Return the tensors A and B of a stack, by key.

    If the experts have different outer factors (`only` is None), the outer factors are concatenated along the axis of
    the rank. Each expert's inner factor is then zero at the rank indices of all other experts.
    """
    writes, first = _writes(name), next(iter(experts_here.values()))
    axis = 1 if writes else 0  # The rank's axis in the outer factor; the inner factor has the rank on the other axis.
    outers, inners = [], []
    for e in range(count):
        given = experts_here.get(e)
        like_outer, like_inner = (first.B, first.A) if writes else (first.A, first.B)
        outer = as_lazy(like_outer) if given is None else as_lazy(given.B if writes else given.A)
        zero = arrange.zeros(tuple(like_inner.shape), as_lazy(like_inner).dtype)
        inner = zero if given is None else as_lazy(given.A if writes else given.B)
        if only is None:
            outer = arrange.zeros(outer.shape, outer.dtype) if given is None else outer
            before, behind = (blank(inner, size, 1 - axis) for size in (e * rank, (count - 1 - e) * rank))
            inner = arrange.joined([*before, inner, *behind], 1 - axis)
        outers.append(outer)
        inners.append(arrange.padded(inner, wide, 1 - axis))
    outer = only if only is not None else arrange.joined(outers, axis)
    outer = arrange.padded(outer, wide, axis)
    outer = outer.reshape(1, *outer.shape)
    A, B = (arrange.stacked(inners), outer) if writes else (outer, arrange.stacked(inners))
    return {f"{PREFIX}{name}{end}": leaf for end, leaf in zip(SLOTS, (A, B), strict=True)}

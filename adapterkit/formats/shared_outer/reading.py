"""Decode a folder with shared outer factors into an `Adapter`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...core.adapter import Adapter, BaseRef, Foreign, Step, Target
from ...errors import AdapterkitError, Malformed, ShapeMismatch, Unsupported, UsageError
from ...io import arrange
from ...io.lazy import Lazy
from ...methods.lora import LoRA
from ...naming.architectures import expert_count
from ...naming.binding import bind
from ...naming.shared_outer import EXPERT, STACK
from ...naming.tables import modules_of
from ...naming.ties import is_embedding
from .._pairs import DAMAGED, check_factors, finite, whole_rank
from ..peft.container import CONFIG, load

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from .._pairs import Slots

FORMAT = "shared_outer"
PREFIX = "base_model.model."
SLOTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_OFF = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters")
"""Fields of PEFT's config that would change the meaning of the tensors; the reader refuses them if they are set."""


def read_folder(path: Path, base: Checkpoint | None) -> Adapter:
    """Read an adapter, lazily.

    Raises:
        Malformed, ShapeMismatch, Unsupported: the tensors do not have the layout of this format.
        UsageError: the number of experts is unknown.
    """
    try:
        config, tensors = load(path)
        rank, alpha = _numbers(config)
        updates: dict[Target, tuple[Update, ...]] = dict(_decode(tensors, rank, alpha, base))
        if base is not None:
            updates = _bound(updates, base)
    except AdapterkitError as error:
        raise error.at(path=path) from None
    data = {"config": dict(config), "order": list(tensors)}
    name = config.get("base_model_name_or_path")
    ref = BaseRef(str(name)) if name else None
    return Adapter(updates, ref, (Step("read", {"format": FORMAT}),), Foreign(FORMAT, data))


def _numbers(config: Mapping[str, object]) -> tuple[int, float]:
    wrong = next((name for name in _OFF if config.get(name)), None)
    if wrong is not None:
        why = f"{wrong} is {config[wrong]!r}, which cannot be combined with stacks that share factors"
        raise Unsupported(why, where=f"{CONFIG}: {wrong}", cure="Export the adapter again without this field")
    return whole_rank(config.get("r"), f"{CONFIG}: r"), finite(config.get("lora_alpha"), f"{CONFIG}: lora_alpha")


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
                cure=DAMAGED,
            )
        modules.setdefault(key.removeprefix(PREFIX).removesuffix(end), {})[SLOTS[end]] = leaf
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
            raise Malformed("this module has only one of the two factors", where=name, cure=DAMAGED)
        if check_factors(name, slots) != rank:
            raise ShapeMismatch(f"the rank is not the config's {rank}", where=name, cure=DAMAGED)
        yield (
            Target(name, "in out *k" if is_embedding(f"{name}.weight") else "out *in"),
            (LoRA(**slots, scaling=alpha / rank),),
        )


def _experts(
    name: str, slots: Slots, numbered: Mapping[int, Slots], rank: int, alpha: float, base: Checkpoint | None
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    """Yield the updates of one stack of experts; inner factors may also have separate keys for single experts."""
    found = STACK.fullmatch(name)
    if found is None:
        raise Malformed(
            "this factor has three axes, but its module is not a stack of experts", where=name, cure=DAMAGED
        )
    shapes = {field: leaf.shape for field, leaf in slots.items()}
    # Refuse axes of size 0. Such tensors take no bytes, so a small file could claim any number of experts.
    if any(len(shape) != 3 or 0 in shape for shape in shapes.values()):
        raise ShapeMismatch(f"the factors' shapes {shapes} are not those of a stack", where=name, cure=DAMAGED)
    counts = {shape[0] for shape in shapes.values()} | ({len(numbered)} if numbered else set())
    count = max(counts)
    if counts - {1, count}:
        raise ShapeMismatch(f"the factors' shapes {shapes} have different numbers of experts", where=name, cure=DAMAGED)
    if count == 1:
        count = expert_count(None if base is None else base.config)
        if not count:
            why = "all experts share one A and one B, and the number of experts is unknown"
            raise UsageError(why, where=name, cure="Give the base with --base (base=)")
    # All experts get the same tensor object, so that a writer also stores the factor only once.
    only = {field: arrange.item(leaf, 0) for field, leaf in slots.items() if leaf.shape[0] == 1}
    stacked = found["leaf"] == "gate_up_proj"
    factors = []
    for e in range(count):
        one: Slots = {f: only[f] if f in only else arrange.item(leaf, e) for f, leaf in slots.items()}
        one |= {field: leaf for field, leaf in numbered.get(e, {}).items() if field not in one}
        if set(one) != {"A", "B"}:
            raise Malformed(f"expert {e} has no {'B' if 'A' in one else 'A'}", where=name, cure=DAMAGED)
        if check_factors(f"{name}: expert {e}", one) != rank:
            raise ShapeMismatch(f"the rank is not the config's {rank}", where=name, cure=DAMAGED)
        factors.append(one)
    if stacked:
        whole: Slots = {field: arrange.stacked([one[field] for one in factors]) for field in ("A", "B")}
        yield Target(name, "e out *in"), (LoRA(**whole, scaling=alpha / rank),)
        return
    for e, one in enumerate(factors):
        yield Target(f"{found['stem']}.{e}.{found['leaf']}"), (LoRA(**one, scaling=alpha / rank),)


def _bound(updates: dict[Target, tuple[Update, ...]], base: Checkpoint) -> dict[Target, tuple[Update, ...]]:
    """Rename targets to the base's names; targets that the base already has stay unchanged."""
    own = set(modules_of(base.tensors))
    lost = {target: found for target, found in updates.items() if target.path not in own}
    placed = bind(Adapter(lost), base).adapter.updates if lost else {}
    return {target: found for target, found in updates.items() if target not in lost} | dict(placed)

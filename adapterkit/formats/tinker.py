"""Tinker's adapters: PEFT's folder with another name for the head, and with stacks of experts that share factors.

A folder without a head and without experts is the same as PEFT's folder, and is read as PEFT's format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, BaseRef, Foreign, Step, Target
from ..errors import WRITE_AGAIN, AdapterkitError, Malformed, ShapeMismatch, Unrepresentable, Unsupported
from ..io import safetensors
from ..io.arrange import item, stacked
from ..io.lazy import Lazy, as_lazy
from ..methods.lora import LoRA
from ..naming.architectures import expert_count
from ..naming.tool_names import EXPERTS, HEAD, PREFIXES, NameTable, TableNames, is_tinker, modules_of, without_prefix
from ._containers import folder_of
from ._format import Format
from ._kit import (
    Leftovers,
    Pairs,
    check_factors,
    grouped,
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
    from ..io.checkpoint import Checkpoint
    from ..io.strict_json import JsonValue
    from ._kit import Pair, Slots


# Map names of single experts to the name of a stack, and back. Some formats store a stack of experts even if the base
# has one tensor per expert.


class ExpertNames:
    """Maps our name of an expert's module to the stack's name and the expert's number, and back.

    Args:
        pairs: a map from our name of an expert's module to the stack's name. In the names, `{n}` stands for the layer,
            and `{e}` for the expert's number.
    """

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self._patterns_of_experts = {_regex(expert_name): stack for expert_name, stack in pairs.items()}
        self._stacks = {_regex(stack): expert_name for expert_name, stack in pairs.items()}

    def there(self, name: str) -> tuple[str, int] | None:
        """Return the stack's name and the expert's number; None if `name` is not the name of an expert's module."""
        for pattern, stack in self._patterns_of_experts.items():
            if match := pattern.fullmatch(name):
                return match["prefix"] + stack.replace("{n}", match["n"]), int(match["e"])
        return None

    def back(self, stack: str, count: int) -> list[str] | None:
        """Return our names of a stack's first `count` experts, in order; None if `stack` is not the name of a stack."""
        for pattern, template in self._stacks.items():
            if match := pattern.fullmatch(stack):
                name = match["prefix"] + template.replace("{n}", match["n"])
                return [name.replace("{e}", str(index)) for index in range(count)]
        return None


def _regex(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{n\}", r"(?P<n>\d{1,9})").replace(r"\{e\}", r"(?P<e>\d{1,9})")
    prefixes = "|".join(map(re.escape, sorted(PREFIXES, key=len, reverse=True)))
    return re.compile(f"(?P<prefix>(?:{prefixes})?){text}")


FORMAT = "tinker"
PREFIX = "base_model.model."
_SLOTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
_STACKS = ExpertNames(EXPERTS)


class TinkerHints(Leftovers, total=False):
    """The source folder's config, kept for the writer."""

    config: dict[str, Any]


class Tinker(Format):
    """Folders that Tinker exports."""

    url = "https://tinker-docs.thinkingmachines.ai/download-weights"
    description = "Tinker: PEFT's folder with stacked experts and the head named unembed_tokens"
    models = "language"
    methods = frozenset({"lora"})
    owns = frozenset({CONFIG, SAFETENSORS})

    def sniff(self, path: Path) -> bool:
        folder = folder_of(path)
        if not path.is_dir() and path.name not in (CONFIG, SAFETENSORS):
            return False
        try:
            return (folder / CONFIG).is_file() and is_tinker(safetensors.read_header(folder / SAFETENSORS).entries)
        except AdapterkitError:
            return False

    def read(self, path: Path, *, compat: str | None = None, base: Checkpoint | None = None) -> Adapter:
        try:
            config, tensors = load(path)
            rank, alpha = _numbers(config)
            updates = dict(_decode(tensors, rank, alpha, base))
        except AdapterkitError as error:
            raise error.at(path=path) from None
        data: dict[str, JsonValue] = {"config": dict(config), "order": list(tensors)}
        name = config.get("base_model_name_or_path")
        ref = BaseRef(str(name)) if name else None
        return Adapter(updates, ref, (Step("read", {"format": FORMAT}),), Foreign(FORMAT, data))

    def write(
        self, adapter: Adapter, path: Path, *, on_loss: str = "refuse", base: Checkpoint | None = None
    ) -> list[str]:
        hints = leftovers(adapter, FORMAT, TinkerHints)
        before = hints.get("config", {})
        first = before.get("lora_alpha")
        alpha, pairs, lines = of_one_alpha(
            adapter, _unfit, format_name="Tinker", on_loss=on_loss, first=first, one_rank=True
        )
        rank = rank_of(next(iter(pairs.values())))
        base_id = adapter.base.id if adapter.base else None
        config = {
            "base_model_name_or_path": base_id, "bias": "none", "peft_type": "LORA", "target_modules": "all-linear",
            **before, "r": rank, "lora_alpha": whole_number(alpha),
        }  # fmt: skip
        save(path, config, in_order(_spelled(pairs, base), hints))
        return lines


def _numbers(config: Mapping[str, object]) -> tuple[int, float]:
    from .peft.config import field_of_another_formula

    wrong = field_of_another_formula(config)
    if wrong is not None:
        cure = "Read the folder as PEFT's format with --from peft (format='peft')"
        raise Unsupported(
            f"{wrong} is {config[wrong]!r}, but Tinker does not write this field", where=f"{CONFIG}: {wrong}", cure=cure
        )
    rank = whole_rank(config.get("r"), f"{CONFIG}: r")
    alpha = is_finite(config.get("lora_alpha"), f"{CONFIG}: lora_alpha")
    if not alpha:
        raise Malformed("lora_alpha is 0, so the adapter would have no effect", where=CONFIG, cure=WRITE_AGAIN)
    return rank, alpha


def _decode(
    tensors: Mapping[str, Lazy], rank: int, alpha: float, base: Checkpoint | None
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    names_of_base = _TinkerNames(base)
    for key, slots in grouped(tensors, _SLOTS, "Tinker").items():
        if not key.startswith(PREFIX):
            raise Malformed(f"the key does not begin with {PREFIX}", where=key, cure=WRITE_AGAIN)
        name = key.removeprefix(PREFIX)
        if any(len(leaf.shape) == 3 for leaf in slots.values()):
            yield from _experts(name, slots, rank, alpha, names_of_base)
            continue
        if check_factors(name, slots) != rank:
            raise ShapeMismatch(f"its rank differs from the config's rank {rank}", where=name, cure=WRITE_AGAIN)
        path = next((mine for mine, theirs in HEAD.items() if theirs == name), name)
        layout = "in out *k" if path.rpartition(".")[2] == "embed_tokens" else "out *in"
        yield Target(names_of_base.named(path), layout), (LoRA(**slots, scaling=alpha / rank),)


def _experts(
    name: str, slots: Slots, rank: int, alpha: float, names_of_base: _TinkerNames
) -> Iterator[tuple[Target, tuple[LoRA, ...]]]:
    A, B = slots["A"], slots["B"]
    shapes = f"A is {list(A.shape)}, B is {list(B.shape)}"
    if len(A.shape) != 3 or len(B.shape) != 3 or A.shape[1] != rank or B.shape[2] != rank:
        raise ShapeMismatch(
            f"{shapes}, but they must be [experts, {rank}, in] and [experts, out, {rank}]", where=name, cure=WRITE_AGAIN
        )
    count = max(A.shape[0], B.shape[0])
    if {A.shape[0], B.shape[0]} - {1, count}:
        raise ShapeMismatch(f"{shapes}: the first axes must be equal, or one must be 1", where=name, cure=WRITE_AGAIN)
    paths = _STACKS.back(name, count)
    if paths is None:
        raise Malformed("the name of this stack of experts is unknown", where=name, cure=WRITE_AGAIN)
    # All experts get the same object for a shared factor, so that a writer can store it as one tensor.
    only = {field: item(leaf, 0) for field, leaf in slots.items() if leaf.shape[0] == 1}
    for index, path in enumerate(paths):
        one: Slots = {field: only.get(field) or item(leaf, index) for field, leaf in slots.items()}
        yield Target(names_of_base.named(path)), (LoRA(**one, scaling=alpha / rank),)


class _TinkerNames:
    """Translates Tinker's names to the base's names, which may have a prefix if the base is a multimodal model."""

    def __init__(self, base: Checkpoint | None) -> None:
        modules = None if base is None else dict.fromkeys(modules_of(base.tensors))
        self.names = None if modules is None else TableNames(_Same(), modules)

    def named(self, path: str) -> str:
        return path if self.names is None else self.names.back(path)


class _Same(NameTable):
    """A table that maps each module name of a language model to itself. It has no other names."""

    def __init__(self) -> None:
        super().__init__({})

    def there(self, name: str) -> str | None:
        return name if name.startswith("model.layers.") or name in ("lm_head", "model.embed_tokens") else None


def _unfit(target: Target, update: Pair) -> str:
    named = any(map(_Same().there, without_prefix(target.path)))
    return unfit(target, update) if named else "its module is not in a language model"


def _spelled(pairs: Pairs, base: Checkpoint | None) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    stacks: dict[str, dict[int, Pair]] = {}
    for target, update in pairs.items():
        bare = _Same()
        path = next(filter(None, map(bare.there, without_prefix(target.path))), target.path)
        stack = _STACKS.there(path)
        if stack:
            stacks.setdefault(stack[0], {})[stack[1]] = update
        else:
            name = PREFIX + HEAD.get(path, path)
            tensors |= {name + end: as_lazy(update.tensors[field]) for end, field in _SLOTS.items()}
    for name, experts_here in stacks.items():
        if sorted(experts_here) != list(range(len(experts_here))):
            items = [f"{name}: the adapter has experts {sorted(experts_here)}"]
            raise Unrepresentable(
                "Tinker stores the experts of a module in one stack, which must start at expert 0 and have no gaps",
                items=items,
                cure="Write another format, such as adapterkit's: --to adapterkit (format='adapterkit')",
            )
        count = expert_count(None if base is None else base.config)
        if count > len(experts_here):
            items = [f"{name}: the adapter has {len(experts_here)} experts, and the base has {count}"]
            raise Unrepresentable(
                "Tinker stores the experts of a module in one stack, which must have all experts of the base",
                items=items,
                cure="Write another format, such as adapterkit's: --to adapterkit (format='adapterkit')",
            )
        shared = [
            field
            for field in _SLOTS.values()
            if len({id(update.tensors[field]) for update in experts_here.values()}) == 1
        ]
        # Store at most one of the two factors once. Otherwise, the file would not show the number of experts.
        for end, field in _SLOTS.items():
            leaves = [as_lazy(experts_here[index].tensors[field]) for index in range(len(experts_here))]
            tensors[f"{PREFIX}{name}{end}"] = stacked(leaves[:1] if shared[:1] == [field] else leaves)
    return tensors

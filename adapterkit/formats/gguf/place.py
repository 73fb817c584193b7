"""Where an adapter lies in a GGUF file: names, the order of rows, stacks of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...adapter import Target
from ...errors import Unrepresentable, Unsupported, UsageError
from ...methods.alora import ALoRA
from ...naming.gguf import ARCHITECTURES, OF_MODEL, Architecture
from ...naming.heads import heads_of, rope_pairs
from ...naming.tables import Names, modules_of
from ...tensors.arrange import stacked, turned
from ...tensors.lazy import Lazy, as_lazy
from .._pairs import Pairs, in_row_order, unfit

if TYPE_CHECKING:
    from ...tensors.checkpoint import Checkpoint
    from .._pairs import Pair

SLOTS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
EMBEDDING = "token_embd"


class Place:
    """Where an adapter lies: the architecture, the base's names, its heads."""

    def __init__(self, name: str, base: Checkpoint | None, heads: Mapping[str, int], experts: int) -> None:
        if name not in ARCHITECTURES:
            known = f"Known: {', '.join(ARCHITECTURES)}"
            raise Unsupported(f"the architecture {name!r}", where="general.architecture", cure=known)
        self.name, self.base, self.known, self.experts = name, base, dict(heads), experts
        self.architecture: Architecture = ARCHITECTURES[name]
        self.names = Names(self.architecture.table, None if base is None else modules_of(base.tensors))

    @classmethod
    def of(cls, hints: Mapping[str, Any], base: Checkpoint | None) -> Place:
        """For writing: by the base's config, or by the file that was read."""
        if base is None or base.config is None:
            if not hints:
                why = "the base's architecture decides on names and the order of rows in a GGUF file"
                raise UsageError(
                    why, where="general.architecture", cure="Give the base, with its config.json, by base= or --base"
                )
            return cls(str(hints.get("architecture")), None, hints.get("heads", {}), hints.get("experts", 0))
        inner = base.config.get("text_config")
        config = inner if isinstance(inner, dict) else base.config
        model = config.get("model_type")
        if model not in OF_MODEL:
            known = f"Known: {', '.join(OF_MODEL)}"
            raise Unsupported(f"bases of model_type {model!r}", where="config.json", cure=known)
        experts = config.get("num_local_experts", config.get("num_experts", 0)) or 0
        return cls(OF_MODEL[model], base, {}, experts)

    def order(self, foreign: str, rows: int) -> Any:
        """The order of the file's rows, where it is not the base's own."""
        kind = self.architecture.turned.get(template(foreign))
        return None if kind is None else rope_pairs(rows, self.heads(kind, foreign), foreign)

    def heads(self, kind: str, where: str) -> int:
        if kind not in self.known:
            found = heads_of(None if self.base is None else self.base.config, where)
            self.known |= {"query": found.query, "kv": found.kv}
        return self.known[kind]

    def why_not(self, target: Target, update: Pair) -> str:
        """Why a file has no name for an update."""
        if self.names.there(target.path) is None:
            return f"no name in the table of {self.name}"
        if isinstance(update, ALoRA) and (target.layout != "out *in" or self.is_stack(self.foreign(target))):
            return "an activated LoRA on an embedding, a Conv1D or an expert"
        return unfit(target, update)

    def foreign(self, target: Target) -> str:
        name = self.names.there(target.path)
        assert name is not None
        return name

    def is_stack(self, foreign: str) -> bool:
        return template(foreign) in self.architecture.experts.values()

    def spelled(self, pairs: Pairs) -> dict[str, Lazy]:
        """The tensors as the file has them."""
        stacks: dict[str, dict[int, Pair]] = {}
        tensors: dict[str, Lazy] = {}
        for target, update in pairs.items():
            foreign = self.foreign(target)
            if self.is_stack(foreign):
                stacks.setdefault(foreign, {})[expert_number(target.path)] = update
                tensors |= dict.fromkeys(keys(foreign), as_lazy(update.A))
            else:
                tensors |= self.one(foreign, update)
        for foreign, found in stacks.items():
            tensors |= self.stack(foreign, found)
        return tensors

    def one(self, foreign: str, update: Pair) -> dict[str, Lazy]:
        order = self.order(foreign, update.B.shape[0])
        held = update if order is None else in_row_order(update, lambda: order)
        A = as_lazy(held.A)
        return dict(zip(keys(foreign), (turned(A) if foreign == EMBEDDING else A, as_lazy(held.B)), strict=True))

    def stack(self, foreign: str, found: Mapping[int, Pair]) -> dict[str, Lazy]:
        count = self.experts or max(found) + 1
        lacking = [index for index in range(count) if index not in found]
        if lacking or max(found) >= count:
            why = f"one tensor holds all {count} experts, and the adapter has {len(found)} of them"
            raise Unrepresentable(why, items=[f"{foreign}: expert {n}" for n in lacking or [max(found)]], cure=_EXPERTS)
        own = [found[index] for index in range(count)]
        parts = [stacked([as_lazy(u.A) for u in own]), stacked([as_lazy(u.B) for u in own])]
        return dict(zip(keys(foreign), parts, strict=True))


def keys(foreign: str) -> list[str]:
    """The keys of A and B."""
    return [foreign + end for end in SLOTS]


def template(foreign: str) -> str:
    """A name of a file with `{n}` for the number of its layer."""
    head, dot, rest = foreign.partition(".")
    return f"blk.{{n}}.{rest.partition('.')[2]}" if head == "blk" and dot else foreign


def expert_number(path: str) -> int:
    """The last number in an own name."""
    return int(next(part for part in reversed(path.split(".")) if part.isdigit()))


_EXPERTS = "Give the base, train every expert, or write another format"

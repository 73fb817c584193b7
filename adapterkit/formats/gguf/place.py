"""Place an adapter in a GGUF file: names, the order of rows, stacks of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ...core.adapter import Target
from ...errors import Unrepresentable, Unsupported
from ...io.arrange import reordered, turned
from ...io.lazy import Lazy, as_lazy
from ...methods.alora import ALoRA
from ...naming.architectures import Architecture, expert_count
from ...naming.binding.translating import moves_of, translated
from ...naming.gguf import NAMING, column_order, name_for, place_of, row_order
from ...naming.heads import LINEAR_FIELDS, Heads, heads_of, linear_of, sharing
from .._pairs import Pairs, in_row_order, unfit

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint
    from ...naming.architectures import Place as Where
    from ...naming.moves import Move
    from .._pairs import Pair

SLOTS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
EMBEDDING = "token_embd"


@dataclass(slots=True, eq=False)
class GgufPlace:
    """The place of an adapter in a GGUF file.

    Attributes:
        name: the file's `general.architecture`.
        family: the family of this architecture.
        config: the base's config, for its heads; None if there is no base.
        known: the numbers of heads, `query`, `kv` and `LINEAR_FIELDS`, as far as the file that was read stated them.
        experts: how many experts a stack has; 0 if not known.
    """

    name: str
    family: Architecture
    config: Mapping[str, Any] | None = None
    known: dict[str, int] = field(default_factory=dict)
    experts: int = 0

    @classmethod
    def of_base(cls, base: Checkpoint) -> GgufPlace:
        """Make the place for writing, from the base's config.

        Raises:
            UsageError: the base has no config.
            Unsupported: llama.cpp is not known to support its family.
        """
        name, family = name_for(base.config)
        return cls(name, family, base.config, {}, expert_count(base.config))

    def where(self, foreign: str) -> Where | None:
        """Return the place of a module of the file; None if the family has no such weight."""
        found = place_of(self.family, foreign)
        return None if found is None else found[1]

    def order(self, foreign: str, rows: int) -> Any:
        """Return the order of the file's rows, if it is not the weight's own."""
        where = self.where(foreign)
        if where is None or where.rows is None:
            return None
        heads = self.heads(foreign)
        if where.rows == "rope" and self.config is not None:
            self._check_width(rows, sharing(heads, where.heads, foreign), foreign)
        return row_order(where, rows, heads, foreign)

    def _check_width(self, rows: int, count: int, foreign: str) -> None:
        """Refuse rows that are no heads of the config's width: any number of heads gives an order, and one is right."""
        dim = heads_of(self.config, foreign).dim
        if rows != count * dim:
            why = f"{rows} rows, and the base's config says {count} heads of {dim}; the order of rows depends on it"
            raise Unsupported(why, where=foreign, cure="Merge into the GGUF model")

    def columns(self, foreign: str, columns: int) -> Any:
        """Return the order of the file's inputs, if it is not the weight's own."""
        where = self.where(foreign)
        return (
            None
            if where is None or where.columns is None
            else column_order(where, columns, self.heads(foreign), foreign)
        )

    def heads(self, where: str) -> Heads:
        """Return the base's heads.

        Raises:
            UsageError: there is no config of a base that states them.
        """
        if not {"query", "kv"} <= self.known.keys():
            found = heads_of(self.config, where)
            self.known |= {"query": found.query, "kv": found.kv}
            self.known |= {"rotary": found.rotary} if found.rotary else {}
            if found.linear is not None:
                counts = (found.linear.keys, found.linear.values, found.linear.key_dim, found.linear.value_dim)
                self.known |= dict(zip(LINEAR_FIELDS, counts, strict=True))
        return Heads(self.known["query"], self.known["kv"], 1, linear_of(self.known), self.known.get("rotary", 0))

    def moves(self, updates: Mapping[Target, tuple[Any, ...]]) -> dict[str, tuple[Move, ...]]:
        """Return the moves of each target into the file; targets without a place are left out."""
        return moves_of(updates, self.family, NAMING)

    def why_not(self, target: Target, update: Pair, moves: Mapping[str, tuple[Move, ...]]) -> str:
        """Say why a file has no place for an update."""
        if target.path not in moves:
            return f"no place for it is known in GGUF files of the architecture {self.name}"
        place = self.where(moves[target.path][0].path)
        if place is None:
            # Nomic's: of a tensor that holds several weights, an adapter file does not say which one is meant.
            return "the tensor holds several weights of the family: merge into the GGUF model"
        if place.beside is not None:
            return "llama.cpp keeps the weight in two tensors and takes no adapter there: merge into the GGUF model"
        if place.rows == "rotary":
            # GLM-4 and GLM-4V have the same architecture in files, and nothing tells them apart.
            return "an adapter file does not say in which of two orders its rows are: merge into the GGUF model"
        if any(move.take is not None and move.take.groups for move in moves[target.path]):
            # InternLM2: the rows of its queries are no single run in the base's tensor, so no target can name them.
            return "the base has queries, keys and values group by group in one tensor: merge into the GGUF model"
        experts = target.stacked or any(move.slot is not None for move in moves[target.path])
        if isinstance(update, ALoRA) and (target.layout != "out *in" or experts):
            return "an activated LoRA on an embedding, a Conv1D or an expert"
        # Rows are parts of a fused weight, which GGUF stores separately; `placed` refuses any others.
        return unfit(replace(target, rows=None), update, stacked=True)

    def placed(self, pairs: Pairs, moves: Mapping[str, tuple[Move, ...]]) -> Pairs:
        """Return the updates under the file's names, with experts in stacks.

        Raises:
            Unrepresentable: two updates belong to one tensor of the file.
        """
        found = translated({target: (update,) for target, update in pairs.items()}, moves, self.experts, self.config)
        twice = [f"{target}: {len(given)} updates" for target, given in found.items() if len(given) > 1 or target.rows]
        if twice:
            why = "a GGUF adapter has one pair of factors a tensor"
            raise Unrepresentable(why, items=twice, cure="Combine them first, or write another format")
        return {target: given[0] for target, given in found.items()}  # type: ignore[misc]

    def spelled(self, target: Target, update: Pair) -> dict[str, Lazy]:
        """Return the two tensors of an update under the file's name, with rows in the file's order."""
        A, B = as_lazy(update.A), as_lazy(update.B)
        if not target.stacked:
            order = self.order(target.path, B.shape[0])
            held = update if order is None else in_row_order(update, lambda: order)
            A, B = as_lazy(held.A), as_lazy(held.B)
            columns = self.columns(target.path, A.shape[-1])
            A = A if columns is None else reordered(A, lambda: columns, 1)
        return dict(zip(keys(target.path), (turned(A) if target.path == EMBEDDING else A, B), strict=True))


def keys(foreign: str) -> list[str]:
    """Return the keys of A and B."""
    return [foreign + end for end in SLOTS]

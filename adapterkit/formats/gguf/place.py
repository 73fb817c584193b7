"""Translate an adapter to a GGUF file: rename modules, reorder rows, stack experts."""

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
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...naming.architectures import Place as Where
    from ...naming.heads import Rows
    from ...naming.moves import Move
    from .._pairs import Pair

SLOTS = {".weight.lora_a": "A", ".weight.lora_b": "B"}
EMBEDDING = "token_embd"


@dataclass(slots=True, eq=False)
class GgufPlace:
    """The module names and the order of rows in GGUF files of one architecture.

    Attributes:
        name: the file's `general.architecture`.
        family: the family of models with this architecture.
        config: the base's config, which has the numbers of heads; None without a base.
        known: the numbers of heads that the source file or the config has, by `query`, `kv` and `LINEAR_FIELDS`.
        experts: the number of experts in a stack; 0 if unknown.
    """

    name: str
    family: Architecture
    config: Mapping[str, Any] | None = None
    known: dict[str, int] = field(default_factory=dict)
    experts: int = 0

    @classmethod
    def of_base(cls, base: Checkpoint) -> GgufPlace:
        """Create the object for writing, from the base's config.

        Raises:
            UsageError: the base has no config.
            Unsupported: no support for the base's family in llama.cpp is known.
        """
        name, family = name_for(base.config)
        return cls(name, family, base.config, {}, expert_count(base.config))

    def where(self, foreign: str) -> Where | None:
        """Return which weights of the base a module of the file contains; None if the family has no such weight."""
        found = place_of(self.family, foreign)
        return None if found is None else found[1]

    def order(self, foreign: str, rows: int) -> Rows | None:
        """Return the order in which the file has the rows of a weight; None if the order is the base's."""
        where = self.where(foreign)
        if where is None or where.rows is None:
            return None
        heads = self.heads(foreign)
        if where.rows == "rope" and self.config is not None:
            self._check_width(rows, sharing(heads, where.heads, foreign), foreign)
        return row_order(where, rows, heads, foreign)

    def _check_width(self, rows: int, count: int, foreign: str) -> None:
        """Refuse a number of rows other than heads * width in the config, because heads determine the order of rows."""
        dim = heads_of(self.config, foreign).dim
        if rows != count * dim:
            why = f"the base's config states {count} heads of {dim}, not {rows} rows; heads determine the order of rows"
            raise Unsupported(why, where=foreign, cure="Merge the adapter into the GGUF model")

    def columns(self, foreign: str, columns: int) -> Rows | None:
        """Return the order in which the file has the inputs of a weight; None if the order is the base's."""
        where = self.where(foreign)
        return (
            None
            if where is None or where.columns is None
            else column_order(where, columns, self.heads(foreign), foreign)
        )

    def heads(self, where: str) -> Heads:
        """Return the base's numbers of heads.

        Raises:
            UsageError: neither the source file nor a base's config contains the numbers.
        """
        if not {"query", "kv"} <= self.known.keys():
            found = heads_of(self.config, where)
            self.known |= {"query": found.query, "kv": found.kv}
            self.known |= {"rotary": found.rotary} if found.rotary else {}
            if found.linear is not None:
                counts = (found.linear.keys, found.linear.values, found.linear.key_dim, found.linear.value_dim)
                self.known |= dict(zip(LINEAR_FIELDS, counts, strict=True))
        return Heads(self.known["query"], self.known["kv"], 1, linear_of(self.known), self.known.get("rotary", 0))

    def moves(self, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, tuple[Move, ...]]:
        """Map each target to its modules, rows and experts in the file.

        Targets that no file can contain are omitted.
        """
        return moves_of(updates, self.family, NAMING)

    def why_not(self, target: Target, update: Pair, moves: Mapping[str, tuple[Move, ...]]) -> str:
        """Return the reason why a GGUF file cannot contain an update; empty if it can."""
        if target.path not in moves:
            return f"its name in GGUF files of the architecture {self.name} is unknown"
        place = self.where(moves[target.path][0].path)
        if place is None:
            # Nomic: one tensor of the GGUF file combines several weights, and an adapter file cannot say which is
            # adapted.
            return "its tensor has several weights of the family: merge the adapter into the GGUF model"
        if place.beside is not None:
            return (
                "llama.cpp splits its weight into two tensors, without adapters: merge the adapter into the GGUF model"
            )
        if place.rows == "rotary":
            # Refuse: GLM-4 and GLM-4V have the same architecture in GGUF files, but different orders of rows.
            why = "an adapter file does not state which of two orders its rows have"
            return f"{why}: merge the adapter into the GGUF model"
        if any(move.take is not None and move.take.groups for move in moves[target.path]):
            # InternLM2: the rows of the queries are not contiguous in the base's tensor, so a target cannot name them.
            why = "the base has queries, keys and values group by group in one tensor"
            return f"{why}: merge the adapter into the GGUF model"
        experts = target.stacked or any(move.slot is not None for move in moves[target.path])
        if isinstance(update, ALoRA) and (target.layout != "out *in" or experts):
            return "an activated LoRA cannot adapt an embedding, a Conv1D or an expert"
        # Ignore the target's rows here: GGUF stores the parts of a fused weight separately. `placed` refuses rows that
        # are not whole parts.
        return unfit(replace(target, rows=None), update, stacked=True)

    def placed(self, pairs: Pairs, moves: Mapping[str, tuple[Move, ...]]) -> Pairs:
        """Return the updates under the file's module names; updates of experts are joined into stacks.

        Raises:
            Unrepresentable: two updates adapt the same tensor of the GGUF model.
        """
        found = translated({target: (update,) for target, update in pairs.items()}, moves, self.experts, self.config)
        twice = [f"{target}: {len(given)} updates" for target, given in found.items() if len(given) > 1 or target.rows]
        if twice:
            why = "a GGUF adapter has one pair of factors per tensor"
            raise Unrepresentable(why, items=twice, cure="Combine the updates first, or write another format")
        return {target: given[0] for target, given in found.items()}  # type: ignore[misc]

    def spelled(self, target: Target, update: Pair) -> dict[str, Lazy]:
        """Return the tensors A and B of an update by key, with rows and inputs in the file's order."""
        A, B = as_lazy(update.A), as_lazy(update.B)
        if not target.stacked:
            order = self.order(target.path, B.shape[0])
            held = update if order is None else in_row_order(update, lambda: order)
            A, B = as_lazy(held.A), as_lazy(held.B)
            columns = self.columns(target.path, A.shape[-1])
            A = A if columns is None else reordered(A, lambda: columns, 1)
        return dict(zip(keys(target.path), (turned(A) if target.path == EMBEDDING else A, B), strict=True))


def keys(foreign: str) -> list[str]:
    """Return the keys of A and B for a module name in the file."""
    return [foreign + end for end in SLOTS]

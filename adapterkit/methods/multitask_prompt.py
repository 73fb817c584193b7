"""Multitask prompt tuning: tasks share a prompt, and each task multiplies it elementwise by a low-rank matrix.

Wang et al. 2023, https://arxiv.org/abs/2303.02861
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import ContextUpdate, Rule, tensor
from .prompt import tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class MultitaskPrompt(ContextUpdate):
    """Puts P * (columns[t] @ rows[t]), elementwise, in front of the input embeddings of task t.

    With `decoder`, the first half of the n prompt tokens is put in front of the encoder's input, and the second half in
    front of the decoder's input.
    """

    place = "embeddings"
    paper = "https://arxiv.org/abs/2303.02861"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="0 <= task and task < tasks",
            where="task",
            error="Malformed",
            meaning="the task number is out of range",
        ),
        Rule(
            require="n % 2 == 0",
            when="decoder",
            where="decoder",
            error="Malformed",
            meaning="with decoder, P is split into two halves, so its number of rows must be even",
        ),
    )

    P: Tensor = tensor("n dim")
    columns: Tensor = tensor("tasks n r")
    rows: Tensor = tensor("tasks r dim")
    task: int = 0
    decoder: bool = False

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        tasks: int = 1,
        r: int = 1,
        index: Sequence[int] | None = None,
        **attributes: object,
    ) -> Self:
        P = tokens_of(W, rank, random, index)
        ones = W.new_ones(tasks, rank, r) / r, W.new_ones(tasks, r, len(W))
        return cls.from_fields(P=P, columns=ones[0], rows=ones[1], **attributes)

    def embeddings(self, task: Tensor | int | None = None) -> Tensor:
        return self._prompt(task)[..., : self._first, :]

    def decoder_embeddings(self, task: Tensor | int | None = None) -> Tensor | None:
        return self._prompt(task)[..., self._first :, :] if self.decoder else None

    @property
    def _first(self) -> int:
        return self.P.shape[0] // 2 if self.decoder else self.P.shape[0]

    def _prompt(self, task: Tensor | int | None) -> Tensor:
        at = self.task if task is None else task
        return self.P * (self.columns[at] @ self.rows[at])

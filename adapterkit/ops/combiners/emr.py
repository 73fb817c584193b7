"""EMR: compute one elected change from all changes; for a given task, mask and scale the elected change.

Each entry of the elected change has the sign of the sum of the tasks' entries. Its magnitude is the largest magnitude
among the entries with that sign. For task t, the mask keeps the elected entries that have the sign of task t's own
change. The kept entries are multiplied by lambda_t = s(task t's change) / s(masked elected change). To compute s(D),
take the mean magnitude of the entries of D in each tensor, and add up these means over all tensors. If `task` is not
set, the result is the elected change itself. Huang et al. 2024, https://arxiv.org/abs/2405.17461,
https://github.com/harveyhuang18/EMR_Merging.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError
from ._combiner import parameter
from ._entrywise import Entrywise

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula


class EMR(Entrywise):
    """lambda_t [D D_t > 0] D with D = sign(sum w D_t) max_t |w D_t|; the maximum is over the changes with D's sign."""

    title = "Elect, mask and rescale (EMR)"
    paper = "https://arxiv.org/abs/2405.17461"
    stages: ClassVar[int] = 0

    task: int | None = parameter(
        None, "index (from 0) of the adapter whose mask and scale are applied; default: none", least=0, kind=int
    )

    @property
    def counts(self) -> bool:
        return self.task is not None

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        if self.task is None:
            return lambda changes, _: self.scale * _elected(changes * weights[:, None, None])
        if self.task not in at.present:
            return lambda changes, _: np.zeros(changes.shape[1:])
        place = at.present.index(self.task)
        below = at.census.sum_of("masked")
        factor = self.scale * (at.census.sum_of("own") / below if below else 0.0)

        def formula(changes: Array, _: slice) -> Array:
            changes *= weights[:, None, None]
            unified = _elected(changes)
            result: Array = factor * unified * (unified * changes[place] > 0)
            return result

        return formula

    def count(self, blocks: Blocks, weights: Array, at: FormulaContext) -> None:
        import numpy as np

        if self.task is None or self.task not in at.present:
            return
        place, before_masks, masked = at.present.index(self.task), 0.0, 0.0
        for _, changes in blocks:
            changes *= weights[:, None, None]
            unified = _elected(changes)
            before_masks += float(np.abs(changes[place]).sum())
            masked += float(np.abs(unified[unified * changes[place] > 0]).sum())
        at.census.add("own", before_masks / blocks.size)
        at.census.add("masked", masked / blocks.size)

    def check(self) -> None:
        if self.task is not None and self.task < 0:
            raise UsageError(f"task {self.task} is below 0", where="task", cure="Pass 0 for the first adapter")


def _elected(changes: Array) -> Array:
    """Return the elected change.

    Each entry has the sign of the sum over all changes, and the largest magnitude among the changes with this sign.
    """
    import numpy as np

    sign = np.where(changes.sum(0) > 0, 1.0, -1.0)
    unified: Array = np.maximum(changes * sign, 0.0).max(0) * sign
    return unified

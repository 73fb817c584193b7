"""Updates folded into live parameters where they lie: a block of rows at a time, in float64, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..io.lazy import as_lazy, dtype_of
from ..merging.arrays import TorchArrays, Workspace
from ..merging.blocks import blocks
from ..merging.compute import BlockMerger
from ..merging.planned import Output
from ..merging.planned_update import PlannedUpdate
from .sharding import is_sharded

if TYPE_CHECKING:
    from .station import Part


def fits(parameter: Tensor, parts: list[Part]) -> bool:
    """Whether the parts change this weight alone, by a sum, and it is one run of memory."""
    kinds = all(update.kind == "additive" and not update.changes_bias for part in parts for update in part.updates)
    return (
        kinds
        and not is_sharded(parameter)
        and parameter.is_contiguous()
        and parameter.dtype.itemsize > 1
        and parameter.numel() > 0
    )


@torch.no_grad()
def fold_in_place(name: str, parameter: Tensor, parts: list[Part]) -> None:
    """Adds the parts' changes to a weight as stored; no dense change is formed, but for laws that need a whole one."""
    shape = tuple(parameter.shape)
    folds = tuple(
        PlannedUpdate(part.target, part.updates, part.switch.weight, position, bias=False, shape=shape)
        for position, part in enumerate(parts)
    )
    output = Output(name, dtype_of(parameter), shape, 0, as_lazy(parameter), folds)
    folder = BlockMerger(output, Workspace(TorchArrays(str(parameter.device))))
    flat = parameter.detach().view(-1)
    for block in blocks(output):
        piece = flat[block.first : block.first + block.elements]
        folder.compute(piece, piece, block)

"""TIES: trim small entries, elect each entry's sign, and average the entries with that sign.

Yadav et al. 2023, https://arxiv.org/abs/2306.01708
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._combiner import parameter
from ._entrywise import (
    COUNTS,
    DENOMINATOR,
    DENOMINATORS,
    DENSITY,
    KEPT,
    RESCALE,
    SIGN,
    SIGNS,
    ZERO_SIGN,
    ZERO_SIGNS,
    Sparse,
    count_of,
    thresholds,
)

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Mask


ROUNDING = 2.0**-40
"""The relative difference up to which entries count as equal, because two passes may round an entry differently."""


class TIES(Sparse):
    """lambda * the mean of the entries with the elected sign, after each change is trimmed to its largest entries."""

    title = "TIES"
    paper = "https://arxiv.org/abs/2306.01708"
    single = frozenset({"density"})
    compat: ClassVar = {
        "mergekit": {
            "density": 1.0, "scope": "tensor", "kept": "at_least_one", "weighted_vote": True, "zero_sign": "+",
            "denominator": "weights",
        },
        "peft": {"scope": "tensor", "kept": "floor", "zero_sign": "+"},
    }  # fmt: skip

    density: float = parameter(0.2, DENSITY, least=0, most=1)
    scope: str = parameter(
        "model", "keep the largest entries of an adapter (model) or of each tensor (tensor)", among=("model", "tensor")
    )
    kept: str = parameter("reference", KEPT, among=COUNTS)
    sign: str = parameter("total", SIGN, among=SIGNS)
    zero_sign: str = parameter("majority", ZERO_SIGN, among=ZERO_SIGNS)
    denominator: str = parameter("count", DENOMINATOR, among=DENOMINATORS)

    rescale: str = parameter("none", RESCALE, among=("none", "norm"))

    @property
    def counts(self) -> bool:
        return self.scope == "model" and self.density < 1

    def count(self, blocks: Blocks, weights: Array, at: FormulaContext) -> None:
        super().count(blocks, weights, at)
        densities = at.each(self, "density")
        # In the pass that counts votes for the majority sign, the thresholds are known, so do not compute them again.
        if not at.census.voting:
            wanted = [lambda total, _, d=density: count_of(d, total, self.kept) for density in densities]
            at.census.count(at.present, blocks, wanted)

    def mask(self, blocks: Blocks, at: FormulaContext) -> Mask:
        import numpy as np

        densities = at.each(self, "density")
        if min(densities) >= 1:
            return lambda *_: (None, 1.0)
        if self.scope == "tensor":
            least = thresholds(blocks, densities, self.kept)
        else:
            # The threshold comes from the pass that only collects statistics. A plug-in may round differently in that
            # pass. For example, KnOTS computes R of its QR decomposition without Q there. Lower the threshold slightly,
            # so that the entry that defines the threshold is still kept.
            limits = [at.census.threshold(adapter) * (1 - ROUNDING) for adapter in at.present]
            least = np.array(limits)[:, None, None]
        least = np.where(np.reshape(densities, (-1, 1, 1)) >= 1, 0.0, least)
        return lambda changes, _: (np.abs(changes) >= least, 1.0)

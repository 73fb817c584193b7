"""Updates: the change at one target. There are four kinds; the kind decides which operations an update supports.

A method is a subclass of one kind: fields with shape strings, and one formula. All other functions are derived from the
fields and the formula. Formulas see weights as `[out, in, *k]`, however the base stores them. They run in the caller's
floating dtype: the merger uses float64, a live model its own dtype. Their type hints name torch tensors, but formulas
use only operations that numpy arrays have too (operators, indexing, `reshape`, `sum`, `.mT`), so a merge on the CPU
needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shapes import tensor
from .kinds import Additive, ContextUpdate, OutputUpdate, WeightUpdate, of_pair
from .rules import Rule, attribute
from .update import Update

if TYPE_CHECKING:
    from .update import Random as Random

__all__ = [
    "Additive", "ContextUpdate", "OutputUpdate", "Rule", "Update", "WeightUpdate", "attribute", "of_pair", "tensor",
]  # fmt: skip

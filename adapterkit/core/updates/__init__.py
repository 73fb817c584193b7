"""An update is the change at one target. Its kind, one of four, decides which operations it supports.

A method is a subclass of one kind, with fields, their shape strings, and one formula. All other functions are derived
from the fields and the formula. Formulas get each weight as `[out, in, *k]`, in whatever axis order the base stores it.
Formulas run in the caller's floating dtype: float64 in a merge, the model's dtype in a live model. The type hints name
torch tensors, but formulas use only operations that numpy arrays have too (operators, indexing, `reshape`, `sum`,
`.mT`), so a merge on the CPU does not import torch.
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

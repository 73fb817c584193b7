"""Updates: what happens at one target. Four kinds; the kind decides what may be done with an update.

A method is a subclass of one kind: fields with shape strings, and one formula. Everything else is derived from those
here. Formulas see weights as `[out, in, *k]` whatever the base stores, and run in whatever floating dtype the caller
hands in: the merger computes in float64, a live model in its own dtype. They are typed as over torch tensors, and keep
to what numpy arrays have too: operators, indexing, `reshape`, `sum`, `.mT`; so a merge on the CPU needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..shapes import tensor
from .attributes import attribute
from .context import ContextUpdate
from .outputs import OutputUpdate
from .rules import Rule
from .update import Update
from .weights import Additive, WeightUpdate

if TYPE_CHECKING:
    from .update import Random as Random

__all__ = ["Additive", "ContextUpdate", "OutputUpdate", "Rule", "Update", "WeightUpdate", "attribute", "tensor"]

"""Arithmetic on adapters: sums, changes of rank, extraction from tuned models, and comparison, on factors if possible.

Every operation takes adapters (or their paths) and returns an adapter; none changes its inputs, and none prints.
"""

from __future__ import annotations

from .algebra import add, average, negate, scale, stack, subtract
from .combiners import COMBINERS
from .combining import combine
from .comparison import Comparison, Likeness, compare
from .extraction import extract
from .resizing import Cut, promote, resize

__all__ = [
    "COMBINERS",
    "Comparison",
    "Cut",
    "Likeness",
    "add",
    "average",
    "combine",
    "compare",
    "extract",
    "negate",
    "promote",
    "resize",
    "scale",
    "stack",
    "subtract",
]

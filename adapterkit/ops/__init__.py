"""Sum adapters, change their ranks, extract them from tuned models, and compare them.

Operations take adapters or their paths. They use low-rank factors if possible. They change no inputs and print nothing.
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

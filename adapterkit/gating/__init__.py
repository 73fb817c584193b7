"""Check that an adapter has an effect, and that a merged, quantized or exported model has the same effect.

All figures are measured by running four models on the same inputs: the base, the base with the adapters attached, the
base with random changes of the same size, and the merged model or graph.
"""

from __future__ import annotations

from .calibrating import calibrate
from .result import AdapterEffect, Gate, GateCheck, KeptEffect, ModulePart, Thresholds
from .runner import gate

__all__ = ["AdapterEffect", "Gate", "GateCheck", "KeptEffect", "ModulePart", "Thresholds", "calibrate", "gate"]

"""Gate an adapter: does it change what the model does, and does a merged, quantized or exported model keep that?

Everything is measured by running models side by side: the base, the base with the adapters attached, the base with
random changes of the same size, and what was made of them.
"""

from __future__ import annotations

from .calibrating import calibrate
from .result import AdapterEffect, Gate, GateCheck, KeptEffect, ModulePart, Thresholds
from .runner import gate

__all__ = ["AdapterEffect", "Gate", "GateCheck", "KeptEffect", "ModulePart", "Thresholds", "calibrate", "gate"]

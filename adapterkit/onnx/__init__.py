"""Adapters in ONNX graphs: `layers` finds names, `inject` attaches one, `eject` takes it off, `merge` folds them in.

This package is `adapterkit.onnx`; `import onnx` inside it is onnx itself.
"""

from __future__ import annotations

from .injecting import Report, eject, inject
from .mapping import Place, layers
from .merging import merge

__all__ = ["Place", "Report", "eject", "inject", "layers", "merge"]

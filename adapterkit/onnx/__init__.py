"""Adapters in ONNX graphs: `inject` attaches one, `eject` takes it off, `merge` folds adapters into the weights.

This package is `adapterkit.onnx`; `import onnx` inside it is onnx itself.
"""

from __future__ import annotations

from .injecting import Report, eject, inject
from .merging import merge

__all__ = ["Report", "eject", "inject", "merge"]

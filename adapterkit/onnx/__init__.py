"""Adapters in ONNX graphs: `layers` finds names, `inject` attaches one, `eject` takes it off, `merge` folds them in.

`export` makes a graph of a torch model, `export_pretrained` of a transformers folder; a `Session` runs a graph with
slots and exchanges its adapters, which `write_adapter` writes for onnxruntime.

This package is `adapterkit.onnx`; `import onnx` inside it is onnx itself.
"""

from __future__ import annotations

from .exporting import export
from .factories import export_factory
from .fitting import fit, write_adapter
from .injecting import Report, eject, inject
from .mapping import Place, layers
from .merging import merge, plan
from .pretrained import export_pretrained
from .session import Session

__all__ = [
    "Place",
    "Report",
    "Session",
    "eject",
    "export",
    "export_factory",
    "export_pretrained",
    "fit",
    "inject",
    "layers",
    "merge",
    "plan",
    "write_adapter",
]

"""Adapters in ONNX graphs: `inject` attaches an adapter, `eject` removes it, `merge` folds it into the weights.

`layers` lists a graph's layers. `export` exports a torch model; `export_pretrained` exports a folder that transformers
saved. A slot is a graph input for one tensor of an adapter. A `Session` runs a graph with slots and swaps adapters; a
`FolderSession` does the same for a model that consists of several graphs. `write_adapter` writes `.onnx_adapter` files,
which both kinds of session load.

Inside this package, `import onnx` imports the onnx library, not `adapterkit.onnx`.
"""

from __future__ import annotations

from .exporting import export
from .folder_session import FolderSession
from .injecting import eject, inject
from .mapping import Place, layers
from .merging import merge, plan
from .pretrained import export_factory, export_pretrained
from .report import GraphReport
from .session import Session
from .slot_values import fit, write_adapter

__all__ = [
    "FolderSession",
    "GraphReport",
    "Place",
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

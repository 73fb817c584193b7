"""adapterkit: one typed `Adapter` for all adapter formats, and functions that accept and return adapters.

Each public name is imported from its module on first use. So `import adapterkit` is fast: it imports neither numpy nor
torch nor onnx.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .io import resolving as _resolving

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import hub, onnx, ops, provenance, torch
    from .api import NameMap, convert, inspect, names, report
    from .core.adapter import Adapter, BaseRef, Foreign, Step, Target
    from .destination import WriteResult
    from .errors import AdapterkitError
    from .formats import FORMATS, detect, read
    from .gating import gate
    from .gating.result import Gate
    from .io.checkpoint import Checkpoint
    from .merging import merge, plan, verify
    from .merging.options import MergeOptions
    from .merging.planned import Plan
    from .merging.report import Report
    from .merging.verification import Verification
    from .methods import METHODS
    from .ops import combine
    from .ops import compare as diff
    from .ops.comparison import Comparison
    from .reporting.inspecting import Inspection
    from .reporting.report import AdapterReport
    from .scanning import scan
    from .scanning.findings import Scan
    from .searching import TextData, search
    from .searching.result import Search
    from .writing import write

_HOME = {
    "Adapter": "core.adapter",
    "AdapterReport": "reporting.report",
    "AdapterkitError": "errors",
    "BaseRef": "core.adapter",
    "Checkpoint": "io.checkpoint",
    "Comparison": "ops.comparison",
    "FORMATS": "formats",
    "Foreign": "core.adapter",
    "Gate": "gating.result",
    "Inspection": "reporting.inspecting",
    "METHODS": "methods",
    "MergeOptions": "merging.options",
    "NameMap": "api",
    "Plan": "merging.planned",
    "Report": "merging.report",
    "Scan": "scanning.findings",
    "Search": "searching.result",
    "TextData": "searching",
    "Step": "core.adapter",
    "Target": "core.adapter",
    "Verification": "merging.verification",
    "WriteResult": "destination",
    "combine": "ops",
    "convert": "api",
    "detect": "formats",
    "diff": "ops:compare",
    "gate": "gating",
    "inspect": "api",
    "merge": "merging",
    "names": "api",
    "plan": "merging",
    "read": "formats",
    "report": "api",
    "scan": "scanning",
    "search": "searching",
    "verify": "merging",
    "write": "writing",
}
"""Public name -> the module to import it from, or `module:name` if the object has another name in that module."""

__all__ = [
    "FORMATS",
    "METHODS",
    "Adapter",
    "AdapterReport",
    "AdapterkitError",
    "BaseRef",
    "Checkpoint",
    "Comparison",
    "Foreign",
    "Gate",
    "Inspection",
    "MergeOptions",
    "NameMap",
    "Plan",
    "Report",
    "Scan",
    "Search",
    "Step",
    "Target",
    "TextData",
    "Verification",
    "WriteResult",
    "combine",
    "convert",
    "detect",
    "diff",
    "gate",
    "hub",
    "inspect",
    "merge",
    "names",
    "onnx",
    "ops",
    "plan",
    "provenance",
    "read",
    "report",
    "scan",
    "search",
    "torch",
    "verify",
    "write",
]


_MODULES = ("hub", "onnx", "ops", "provenance", "torch")
"""The public subpackages, such as `adapterkit.hub`."""


def _hub() -> _resolving.Hub:
    """Import and return the package `adapterkit.hub`. It is imported only when a hub address is used."""
    from . import hub

    return hub


_resolving.install(_hub)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(f".{module}", __name__), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])

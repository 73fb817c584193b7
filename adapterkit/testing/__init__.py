"""Tests for packages that add a format, a method, a combiner, a quantization scheme or a hub to adapterkit.

Subclass one of these classes in a test module of the package, and name the addition. pytest then runs its tests:

    from adapterkit.testing import FormatTests

    class TestAcme(FormatTests):
        format = "acme"

The docstring of each class lists what the package must provide. The tests compare the results of the addition with
independent data: a float64 formula, the shapes of the original adapter, or the bytes of a file before a write. The
tests need pytest (`pip install adapterkit[test]`). Merging and live models are tested only if torch is installed.

The entry points:

| group | the base class of registered classes | tests |
|---|---|---|
| `adapterkit.formats` | `adapterkit.formats._format.Format` | `FormatTests` |
| `adapterkit.methods` | a class derived from one kind in `adapterkit.core.updates` | `MethodTests` |
| `adapterkit.combiners` | `adapterkit.ops.combiners._combiner.Combiner` | `CombinerTests` |
| `adapterkit.quant` | `adapterkit.quant.Scheme` | `SchemeTests` |
| `adapterkit.hubs` | `adapterkit.hub.remote.Remote` | `HubTests` |
| `adapterkit.peft_families` | `adapterkit.formats.peft.families.Family` | `MethodTests` |

| `adapterkit.adapterhub_families` | `adapterkit.formats.adapterhub.families.AdapterHubFamily` | `MethodTests` |

The name of an entry point is the name of the module that contains the class: `acme = "acme_adapters.acme:Acme"`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .formulas import CombinerTests, MethodTests, adapter_of, example
    from .storage import FormatTests, HubTests, SchemeTests

_HOME = {
    "CombinerTests": "formulas",
    "FormatTests": "storage",
    "HubTests": "storage",
    "MethodTests": "formulas",
    "SchemeTests": "storage",
    "adapter_of": "formulas",
    "example": "formulas",
}

__all__ = ["CombinerTests", "FormatTests", "HubTests", "MethodTests", "SchemeTests", "adapter_of", "example"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)

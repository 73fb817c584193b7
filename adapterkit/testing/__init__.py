"""Test classes for packages that add a format, a method, a combiner, a quantization scheme or a hub to adapterkit.

In a test module of your package, subclass one of these classes and set its class attribute (`format`, `method`,
`combiner` or `scheme`) to the name that you registered. pytest then runs the tests of the class:

    from adapterkit.testing import FormatTests

    class TestAcme(FormatTests):
        format = "acme"

The docstring of each test class lists its attributes. In a subclass of `SchemeTests`, also define the method `base`; in
a subclass of `HubTests`, define `address`. The tests compare the results of your package with independent data: a
formula in float64, the weight changes of the adapter before it was written, the values that a scheme's own library
computes, or the bytes of the original files. The tests need pytest (`pip install adapterkit[test]`).

Register the classes of your package with these entry points:

| group of the entry point | the base class of your class | the tests to subclass |
|---|---|---|
| `adapterkit.formats` | `adapterkit.formats._format.Format` | `FormatTests` |
| `adapterkit.methods` | one of the update classes in `adapterkit.core.updates` | `MethodTests` |
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

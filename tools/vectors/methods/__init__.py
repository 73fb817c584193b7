"""The methods: one module each, found by its file name, which is the method's.

A module holds, straight from the method's entry in `spec/methods/` and sharing nothing with adapterkit:

* `formula(W, b, <tensors>, <attributes>)`: the new (W, b), in float64 numpy. `W` is `[out, in, *k]`, `b` is `[out]` or
  None. Tensors and attributes come by the names of the entry; what a case leaves out has the signature's default.
* or, where the formula is one of outputs, `output(x, layer, <beside>, <tensors>, <attributes>)`: the new output for the
  case's input; `layer(x)` is the layer's own, before a residual that may stand beside it, as may words of the model's
  call. Such a vector expects `y` alone, and not even that of a router whose experts are elsewhere.
* or, where the formula is one of context, `context(<tensors>, <attributes>)`: by name, what the update adds and
  what that was computed from. Such a vector expects these alone.
* `cases()`: the cases of the method's vector: layers, layouts, experts, row slices, every field and attribute given
  and, if it may be, left out.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def names() -> list[str]:
    """All methods, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def named(method: str) -> ModuleType:
    """The module of one method."""
    return import_module(f"{__name__}.{method}")

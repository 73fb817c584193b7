"""Run a module's forward with other values for some of its parameters, buffers and modules.

Another thread may run the same module at the same time, with other adapters or none. So the values are usually put into
a replica of the module, which other threads do not see. If a forward is bound to the module itself, or traced by a
compiler, the values of the module itself must be exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def replica(module: nn.Module, values: Mapping[str, object]) -> nn.Module:
    """Return a copy that shares a module's state, except for the attributes that `values` replaces by path.

    Other threads continue to use the module itself.
    """
    made: nn.Module = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    inner: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        child, dot, rest = path.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = value
        else:
            made.__dict__[path] = value
    if inner:
        children = {child: replica(getattr(module, child), own) for child, own in inner.items()}
        made.__dict__["_modules"] = {**module._modules, **children}
    if isinstance(module, nn.RNNBase):  # An RNN reads its parameters from a separate list.
        made.__dict__["_flat_weights"] = [getattr(made, name) for name in module._flat_weights_names]
    return made


@contextmanager
def exchanged(module: nn.Module, values: Mapping[str, object]) -> Iterator[None]:
    """Put values into the module itself for the `with` block.

    An instance attribute hides the parameter of that name. Compilers before torch 2.13 cannot trace that an attribute
    is deleted afterwards; for them, the parameter itself is exchanged.
    """
    placed: list[tuple[dict[str, object], str, bool, object]] = []
    flat = module._flat_weights if isinstance(module, nn.RNNBase) else None
    try:
        for path, value in values.items():
            owner, _, name = path.rpartition(".")
            own = _entries(module.get_submodule(owner), name)
            placed.append((own, name, name in own, own.get(name)))
            own[name] = value
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        yield
    finally:
        if isinstance(module, nn.RNNBase) and flat is not None:
            module._flat_weights = flat
        for own, name, present, before in reversed(placed):
            # Restore an existing entry even if its value is None: a layer without a bias has such an entry.
            if present:
                own[name] = before
            else:
                del own[name]


def _entries(held: nn.Module, name: str) -> dict[str, object]:
    """Return the module's dictionary that must get a value of this name."""
    if torch.compiler.is_compiling():
        for own in (held._parameters, held._buffers, held._modules):
            if name in own:
                return own  # type: ignore[return-value]
    return held.__dict__

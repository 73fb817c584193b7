"""Apply updates to stored parameters, for merging and for modules that must run their original forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.adapter import Target
from ..core.updates import Update
from ..io.lazy import for_formulas
from ..naming.binding import fold, view

Change = tuple[float, Sequence[tuple[Target, Sequence[Update]]]]
"""(weight of an adapter, [(target, its updates in order), ...]): an adapter's updates of one parameter."""

Formula = Callable[[Tensor, Target, Sequence[Update]], Tensor]
"""A function that applies the updates of one target to a stored weight or bias."""


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """Return a parameter or buffer by its dotted path."""
    owner, _, name = path.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


def changed_weight(W: Tensor, changes: Iterable[Change]) -> Tensor:
    """Return W + the sum of a * (f(W) - W) over the adapters, in the stored layout.

    a is an adapter's weight in the sum, and f applies the adapter's updates. Each f gets W without the changes of the
    other adapters.
    """
    return _mixed(W, changes, _weight)


def changed_bias(b: Tensor, changes: Iterable[Change]) -> Tensor:
    """Return b + the sum of a * (g(b) - b) over the adapters, in the stored layout.

    a is an adapter's weight in the sum, and g applies the adapter's updates to the bias b.
    """
    return _mixed(b, changes, _bias)


def settled(updates: Iterable[Update], W: Tensor, target: Target) -> tuple[Update, ...]:
    """Replace each bias change that depends on the weight by its value for the weight W, and return the new updates.

    If an update computes its bias change from the weight, this function computes the bias change once, from W with all
    earlier updates applied. The bias change of a returned update does not depend on the weight.
    """
    done, seen = [], view(W, target)
    for update in updates:
        loaded = update.map(lambda leaf: for_formulas(leaf, W.device, W.dtype))
        done.append(loaded.settled_at(seen, target.stacked))
        seen = fold((loaded,), seen, target.stacked)
    return tuple(done)


def _mixed(before: Tensor, changes: Iterable[Change], formula: Formula) -> Tensor:
    after = before
    for weight, targets in changes:
        new = before
        for target, updates in targets:
            new = formula(new, target, updates)
        after = new if after is before and weight == 1 else after + weight * (new - before)
    return after


def _weight(W: Tensor, target: Target, updates: Sequence[Update]) -> Tensor:
    if target.rows is not None:
        whole = W.clone()
        view(whole, target).copy_(fold(updates, view(W, target), target.stacked))
        return whole
    new = fold(updates, view(W, target), target.stacked)
    return view(new, target)


def _bias(b: Tensor, target: Target, updates: Sequence[Update]) -> Tensor:
    part = b if target.rows is None else b[..., slice(*target.rows)]
    for update in updates:
        loaded = update.map(lambda leaf: for_formulas(leaf, b.device, b.dtype))
        if target.stacked:
            part = torch.stack([loaded.expert(e).new_bias(part[e]) for e in range(len(part))])
        else:
            part = loaded.new_bias(part)
    if target.rows is None:
        return part
    whole = b.clone()
    whole[..., slice(*target.rows)] = part
    return whole


# Run a module's forward with other values for some of its parameters, buffers and modules.
#
# Another thread may run the same module at the same time, with other adapters or none. So the values are usually put
# into a replica of the module, and other threads do not see this replica. But a forward cannot run on a replica if
# another tool patched this forward into the module, or while a compiler traces the forward. In both cases, the values
# in the module itself are replaced during the call.


def replica(module: nn.Module, values: Mapping[str, object]) -> nn.Module:
    """Copy a module shallowly, replace the copy's attributes at the paths in `values`, and return the copy.

    The module itself does not change, so other threads can use it meanwhile.
    """
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    inner: dict[str, dict[str, object]] = {}
    for path, value in values.items():
        child, dot, rest = path.partition(".")
        if dot:
            inner.setdefault(child, {})[rest] = value
        else:
            clone.__dict__[path] = value
    if inner:
        children = {child: replica(getattr(module, child), inner_values) for child, inner_values in inner.items()}
        clone.__dict__["_modules"] = {**module._modules, **children}
    if isinstance(module, nn.RNNBase):  # An RNN reads its parameters from a separate list.
        clone.__dict__["_flat_weights"] = [getattr(clone, name) for name in module._flat_weights_names]
    return clone


@contextmanager
def exchanged(module: nn.Module, values: Mapping[str, object]) -> Iterator[None]:
    """Inside the `with` block, replace the parameters, buffers or child modules at the paths in `values`.

    Each value becomes an instance attribute, which hides the parameter of the same name. torch.compile before torch
    2.13 cannot trace the deletion of such an attribute. So while a compiler traces, the parameter itself is replaced.
    """
    placed: list[tuple[dict[str, object], str, bool, object]] = []
    flat = module._flat_weights if isinstance(module, nn.RNNBase) else None
    try:
        for path, value in values.items():
            owner, _, name = path.rpartition(".")
            entries = _entries(module.get_submodule(owner), name)
            placed.append((entries, name, name in entries, entries.get(name)))
            entries[name] = value
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        yield
    finally:
        if isinstance(module, nn.RNNBase) and flat is not None:
            module._flat_weights = flat
        for entries, name, present, before in reversed(placed):
            # Do not test `before` for None: a layer without a bias has an entry whose value is None.
            if present:
                entries[name] = before
            else:
                del entries[name]


def _entries(owner: nn.Module, name: str) -> dict[str, object]:
    """Return one of the module's dictionaries: the one in which `exchanged` must set the key `name`."""
    if torch.compiler.is_compiling():
        for table in (owner._parameters, owner._buffers, owner._modules):
            if name in table:
                return table  # type: ignore[return-value]
    return owner.__dict__

"""A station: the forward that stands in for a module's own while adapters are attached, and that holds them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Target
from ..errors import ShapeMismatch, Unsupported
from ..updates import Additive, Update
from .context import ContextPart, surround
from .layers import Composed, Difference, Layer, layer_of
from .switch import Switch
from .weights import changed_bias, changed_weight, tensor_at


@dataclass(frozen=True, eq=False)
class Part:
    """One target's updates at a station; `weight` and `bias` are parameters' paths below the station's module."""

    switch: Switch
    target: Target
    updates: tuple[Update, ...]
    weight: str | None
    bias: str | None
    direct: bool


class Station:
    """Stands in for `module.forward`, and leaves the module as it was when its last part goes."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.original = module, module.forward
        self.before = module.__dict__.get("forward")
        self.layer: Layer | None = layer_of(module, self.original)
        self.parts: list[Part] = []
        self.contexts: list[ContextPart] = []
        self.names = tuple(inspect.signature(self.original).parameters)
        self.route: Sequence[str | None] | None = None

    @property
    def switches(self) -> list[Switch]:
        """Those of the adapters that have a part here."""
        return [*(part.switch for part in self.parts), *(part.switch for part in self.contexts)]

    def attach(self, part: Part | ContextPart) -> None:
        if isinstance(part, ContextPart):
            self.contexts.append(part)
        else:
            self.parts.append(part)
        self.module.__dict__["forward"] = _entry(self)

    def detach(self, switch: Switch) -> None:
        self.parts = [part for part in self.parts if part.switch is not switch]
        self.contexts = [part for part in self.contexts if part.switch is not switch]
        if self.parts or self.contexts:
            return
        del self.module.__dict__["forward"]
        if self.before is not None:
            self.module.__dict__["forward"] = self.before

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        around = [part for part in self.contexts if part.switch.active]
        if not around:
            return self._inner(*args, **kwargs)
        if self.route is not None:
            raise Unsupported("context for some rows of a batch", where=str(around[0].target), cure=_ALONE)
        return surround(self.module, around, self.names, self._inner, args, kwargs)

    def _inner(self, *args: Any, **kwargs: Any) -> Any:
        active = [part for part in self.parts if part.switch.active and part.switch.weight]
        if self.route is not None and active:
            return self._routed(self.route, active, args, kwargs)
        return self._run(active, args, kwargs)

    def _run(self, parts: list[Part], args: Any, kwargs: Any) -> Any:
        if not parts:
            return self.original(*args, **kwargs)
        if self.layer is not None and all(part.direct for part in parts) and len(args) + len(kwargs) == 1:
            return _direct(self.layer, parts, *args, *kwargs.values())
        with self._shadowed(parts):
            return self.original(*args, **kwargs)

    def _routed(self, route: Sequence[str | None], parts: list[Part], args: Any, kwargs: Any) -> Any:
        if self.layer is None or len(args) + len(kwargs) != 1:
            raise Unsupported("rows of a batch cannot be told apart here", where=str(parts[0].target), cure=_ALONE)
        x = [*args, *kwargs.values()][0]
        x = x.expand(len(route), *x.shape[1:]) if x.shape[0] == 1 else x
        if x.shape[0] != len(route):
            why = f"{x.shape[0]} rows where the route names {len(route)}"
            raise ShapeMismatch(why, where=str(parts[0].target), cure="Name one adapter, or None, for each row")
        groups = {name: [row for row, other in enumerate(route) if other == name] for name in dict.fromkeys(route)}
        done = [
            self._run([part for part in parts if part.switch.name == name], (x[rows],), {})
            for name, rows in groups.items()
        ]
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        return torch.cat(done)[order.argsort()]

    @contextmanager
    def _shadowed(self, parts: list[Part]) -> Iterator[None]:
        """Changed tensors in the parameters' places: an instance's own attribute is found before its parameter."""
        placed = []
        try:
            for path, value in self.changed(parts).items():
                owner, _, name = path.rpartition(".")
                module = self.module.get_submodule(owner)
                module.__dict__[name] = value
                placed.append((module, name))
            yield
        finally:
            for module, name in placed:
                del module.__dict__[name]

    def changed(self, parts: list[Part], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The module's parameters after the parts, by path, computed in `dtype`."""
        out = {}
        for weight in dict.fromkeys(p.weight for p in parts if p.weight):
            at = [(p.switch.weight, p.target, p.updates) for p in parts if p.weight == weight]
            W: Tensor = tensor_at(self.module, weight)
            out[weight] = changed_weight(W.to(dtype), at)
        for bias in dict.fromkeys(p.bias for p in parts if p.bias and any(u.changes_bias for u in p.updates)):
            at = [(p.switch.weight, p.target, p.updates) for p in parts if p.bias == bias]
            b: Tensor = tensor_at(self.module, bias)
            out[bias] = changed_bias(b.to(dtype), at)
        return out


def _entry(station: Station) -> Callable[..., Any]:
    """What is called in the place of the module's forward, with its signature: `generate` looks at that."""

    @functools.wraps(station.original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return station.forward(*args, **kwargs)

    forward.__dict__["__self__"] = station
    return forward


def _direct(layer: Layer, parts: list[Part], x: Tensor) -> Any:
    """y + sum of weight * (f(x) - y), the base computed once; one part of full weight is its formula alone."""
    if len(parts) == 1 and parts[0].switch.weight == 1:
        return _chain(layer, parts[0].updates)(x)
    y = base = layer(x)
    for part in parts:
        if all(isinstance(update, Additive) for update in part.updates):
            for update in part.updates:
                y = y + part.switch.weight * _live(update, layer).forward(x, Difference(layer))
        else:
            y = y + part.switch.weight * (_chain(layer, part.updates)(x) - base)
    return y


def _chain(layer: Any, updates: Sequence[Update]) -> Any:
    like = layer
    for update in updates:
        layer = Composed(layer, _live(update, like))
    return layer


def _live(update: Update, layer: Layer) -> Update:
    """The update in the dtype and on the device of the layer."""
    W = layer.weight

    def moved(leaf: Any) -> Tensor:
        out: Tensor = leaf.to(W.device, W.dtype) if leaf.is_floating_point() else leaf.to(W.device)
        return out

    same = all(moved(leaf) is leaf for leaf in update.tensors.values())
    return update if same else update.map(moved)


_ALONE = "Run the rows of each adapter by themselves"

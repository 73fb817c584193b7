"""Settings of one thread or asyncio task: the active routes, and the adapters that are switched on or off in it.

`handle.weight = ...` and `handle.set_active(...)` change the model for all threads. `with route(...)` and
`with handle.disable()` apply only in the context that entered them, so that a server can serve many threads with one
model.

Two stores hold the context's scope. A `ContextVar` works for threads and for asyncio tasks, but torch.compile cannot
trace it (torch 2.13: "does not know how to trace method get"). torch.compile does trace and guard a `threading.local`,
so compiled code reads the scope from there. This fails in one case: all asyncio tasks of a thread share the
`threading.local`. So a task that awaits inside the `with` must not run a *compiled* model.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ShapeMismatch, Unsupported, UsageError


@dataclass(eq=False)
class Switch:
    """The state that all attached parts of one adapter share.

    Attributes:
        name: the adapter's name.
        weight: the factor of the adapter's change.
        active: whether the adapter is on; a context may override this, see `Scope`.
        attached: False after its handle was removed or merged.
    """

    name: str
    weight: float
    active: bool = True
    attached: bool = True

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        SETTINGS.renew()

    def on(self, scope: Scope) -> bool:
        """Whether the adapter is on in a scope."""
        return scope.active.get(self, self.active)

    def acts(self, scope: Scope) -> bool:
        """Whether the adapter changes anything in a scope."""
        return self.on(scope) and self.weight != 0


@dataclass(frozen=True)
class Route:
    """The adapter that each row of a batch uses.

    Attributes:
        names: for each row, the name of an adapter, or None for the base.
        flattened: whether a tensor may have the rows and the tokens joined in one axis.
        axis: the axis of the rows.
        known: the names of all adapters that are attached to the model.
        switches: the switches of these adapters.
        table: `[rows]`, for each row, the adapter's position in `known`; `len(known)` stands for the base.
        plans: values that batched.py caches for this route.
    """

    names: tuple[str | None, ...]
    flattened: bool
    axis: int = 0
    known: tuple[str, ...] = field(default=(), compare=False)
    switches: tuple[Switch, ...] = field(default=(), compare=False, repr=False)
    table: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)
    plans: dict[Hashable, object] = field(default_factory=dict, compare=False, repr=False)

    def groups(self) -> dict[str | None, list[int]]:
        """Return a map from each adapter's name to its rows."""
        return {name: [row for row, other in enumerate(self.names) if other == name] for name in self.names}

    def rows_first(self, tensor: Tensor) -> Tensor:
        """View a module's input or output as `[rows, ...]`.

        Raises:
            ShapeMismatch: the tensor's number of rows is neither 1 nor that of the route.
        """
        rows = self.table.shape[0]
        if self.axis and tensor.ndim > self.axis:
            tensor = tensor.movedim(self.axis, 0)
        if tensor.ndim and tensor.shape[0] == rows:
            return tensor
        if tensor.ndim and tensor.shape[0] == 1:
            return tensor.expand(rows, *tensor.shape[1:])
        if tensor.ndim and self.flattened and not self.axis and tensor.shape[0] % rows == 0:
            return tensor.reshape(rows, -1, *tensor.shape[1:])
        raise self.mismatch(tensor.shape[0] if tensor.ndim else 0)

    def rows_back(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Undo `rows_first`: give a tensor `[rows, ...]` the axes of `like`, the module's output.

        `tensor` and `like` may differ in their number of rows.
        """
        if self.axis and like.ndim > self.axis:
            return tensor.movedim(0, self.axis)
        return tensor if tensor.ndim == like.ndim else tensor.flatten(0, 1)

    def mismatch(self, size: int) -> ShapeMismatch:
        """Return the error for a forward with `size` rows, which is not the route's number of rows."""
        rows = len(self.names)
        some = ", ".join(f"row {row}: {name or 'the base'}" for row, name in list(enumerate(self.names))[:8])
        why = f"{size or 'no'} rows, but the route names {rows} ({some}{', ...' if rows > 8 else ''})"
        joined = size and not size % rows and not self.axis
        more = "; pass flattened=True if the model has joined rows and tokens" if joined else ""
        return ShapeMismatch(why, cure=f"Name one adapter, or None, for each row{more}")


@dataclass(frozen=True)
class Scope:
    """The settings of one context: a route for each hook, and the adapters that are switched on or off only here."""

    routes: Mapping[object, Route] = field(default_factory=dict)
    active: Mapping[Switch, bool] = field(default_factory=dict)


_EVERYWHERE = Scope()


class _LocalScopes(threading.local):
    """The scope of each thread.

    `__init__` sets the attribute, and runs once in each thread. A class attribute as the default value would not work:
    dynamo does not notice when an instance attribute starts to hide a class attribute.
    """

    def __init__(self) -> None:
        self.scope = _EVERYWHERE


_SCOPE: ContextVar[Scope] = ContextVar("adapterkit.torch.scope", default=_EVERYWHERE)
_LOCAL = _LocalScopes()


def current() -> Scope:
    """Return the scope of this context."""
    return _LOCAL.scope if torch.compiler.is_compiling() else _SCOPE.get()


@contextmanager
def within(scope: Scope) -> Iterator[None]:
    """Use `scope` inside the `with`, only in this thread or asyncio task."""
    before = _LOCAL.scope
    token = None if torch.compiler.is_compiling() else _SCOPE.set(scope)
    _LOCAL.scope = scope
    crossed = False
    try:
        yield
        crossed = token is not None and _SCOPE.get() is not scope
    finally:
        _LOCAL.scope = before
        if token is not None:
            try:
                _SCOPE.reset(token)
            except ValueError:  # Another thread or task exits the `with`.
                crossed = True
    if crossed:
        why = "a `with route()` or `with handle.disable()` block overlaps another, or ends in another thread or task"
        cure = "Put the `with` around each forward, not around a `yield` of a generator that runs alongside others"
        raise UsageError(why, cure=cure)


class ScopeSettings:
    """A token that is replaced whenever any adapter's weight or switch changes for all threads.

    Some code caches values that depend on weights and switches, such as the plans in lean.py. It reads the token before
    it computes a value. While the token stays the same, the value is valid. So a forward compares one object instead of
    looking at every adapter.
    """

    def __init__(self) -> None:
        self.token = object()

    def renew(self) -> None:
        """Replace the token after a change."""
        self.token = object()


SETTINGS = ScopeSettings()


def routed(routes: Mapping[object, Route]) -> AbstractContextManager[None]:
    """Inside the `with`, add routes to the scope of this context."""
    scope = current()
    return within(Scope({**scope.routes, **routes}, scope.active))


def switched(switch: Switch, active: bool) -> AbstractContextManager[None]:
    """Inside the `with`, switch one adapter on or off, only in this context."""
    scope = current()
    return within(Scope(scope.routes, {**scope.active, switch: active}))


class Recall:
    """Give a recomputed forward the scope that its first run had.

    Activation checkpointing runs a block again in the backward pass. By then, the `with` around the forward has often
    ended, and on CUDA the block runs in one of autograd's threads. Without this class, the block would use other
    adapters than in its first run, and the gradients would silently be wrong. The adapters' weights and switches must
    not change between the two runs.
    """

    def __init__(self) -> None:
        self._seen: dict[bool, list[tuple[Scope, States]]] = {True: [], False: []}
        self._task = -1
        self._token: object = None

    def scope(self, training: bool, switches: Sequence[Switch] = ()) -> Scope:
        """Return the scope that the forward of a module must use.

        Args:
            training: whether the module is in training mode.
            switches: the switches of the adapters that are attached to the module.

        Raises:
            Unsupported: the forward is a recomputation, and forwards with several scopes ran since the last backward
                pass, or an adapter's weight or switch changed since the first run.
        """
        if torch.compiler.is_compiling():
            return _LOCAL.scope
        scope = _SCOPE.get()
        if not training:
            return scope
        task = torch._C._current_graph_task_id()
        if task == self._task == -1 and SETTINGS.token is self._token:  # The usual case.
            seen = self._seen[torch.is_grad_enabled()]
            if seen and seen[-1][0] is scope:
                return scope
        states = tuple((switch, switch.weight, switch.active) for switch in switches)
        if task != -1:
            self._task = task
            return self._recalled(scope, states)
        if self._task != -1:
            self._seen, self._task = {True: [], False: []}, -1
        self._token = SETTINGS.token
        seen = self._seen[torch.is_grad_enabled()]
        if (scope, states) not in seen:
            seen.append((scope, states))
        return scope

    def _recalled(self, scope: Scope, states: States) -> Scope:
        # Prefer forwards that ran with gradients: the others may be those of a reference model (DPO), which has no
        # backward pass. If there are none, use the others: reentrant checkpointing disables gradients in the first run.
        with_gradients, without = self._seen[True], self._seen[False]
        recalled = with_gradients or without
        if not recalled:
            return scope
        if len(recalled) == 1 or (not with_gradients and (scope, states) in recalled):
            chosen = recalled[0] if len(recalled) == 1 else (scope, states)
            if chosen[1] == states:
                return chosen[0]
            why = "a checkpointed block is recomputed, but an adapter was reweighted or switched since the first run"
            cure = "Set handle.weight and call handle.set_active() after backward(), or use `with handle.disable()`"
            raise Unsupported(why, cure=cure)
        why = "a checkpointed block is recomputed, but forwards with several routes or switches ran before it"
        raise Unsupported(why, cure="Call backward() inside the `with` of its forward, or after each forward")


States = tuple[tuple[Switch, float, bool], ...]
"""(switch, weight, whether it is on) for each adapter."""

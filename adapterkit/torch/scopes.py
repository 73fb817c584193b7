"""Routes and on/off switches that apply only in one context (a thread or an asyncio task).

`handle.weight = ...` and `handle.set_active(...)` change the model for all threads. `with route(...)` and
`with handle.disable()` apply only in the context that entered them, so that a server can serve many threads with one
model.

A context's settings are its `Scope`. The scope is stored twice: in a `ContextVar` and in a `threading.local`. The
`ContextVar` works for threads and for asyncio tasks, but torch.compile cannot trace it (torch 2.13: "does not know how
to trace method get"). torch.compile does trace and guard the `threading.local`, so compiled code reads the scope from
there. But all asyncio tasks of a thread share the `threading.local`, so a task that awaits inside the `with` must not
run a *compiled* model.
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
        weight: the factor by which the adapter's change is multiplied.
        active: whether the adapter is on; a context may override this, see `Scope`.
        attached: False after the adapter was removed from the model or merged.
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
        switches: the switches of the adapters in `known`.
        table: `[rows]`, the index in `known` of each row's adapter; `len(known)` if the row uses the base.
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
        """Return a map from each adapter's name (None for the base) to the indices of the rows that use the adapter."""
        return {name: [row for row, other in enumerate(self.names) if other == name] for name in self.names}

    def rows_first(self, tensor: Tensor) -> Tensor:
        """View a module's input or output as `[rows, ...]`.

        Raises:
            ShapeMismatch: the tensor has neither 1 row nor as many rows as the route. If the route is `flattened` and
                `axis` is 0, a multiple of the route's number of rows is also accepted.
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
        """Undo `rows_first`: give a tensor `[rows, ...]` the same axes as the module's output `like`.

        `tensor` and `like` may have different numbers of rows.
        """
        if self.axis and like.ndim > self.axis:
            return tensor.movedim(0, self.axis)
        return tensor if tensor.ndim == like.ndim else tensor.flatten(0, 1)

    def mismatch(self, size: int) -> ShapeMismatch:
        """Return the error to raise if a tensor has `size` rows, but the route has another number of rows."""
        rows = len(self.names)
        some = ", ".join(f"row {row}: {name or 'the base'}" for row, name in list(enumerate(self.names))[:8])
        why = f"the call has {size or 'no'} rows, but the route has {rows} ({some}{', ...' if rows > 8 else ''})"
        joined = size and not size % rows and not self.axis
        more = "; pass flattened=True if the model joins rows and tokens in one axis" if joined else ""
        return ShapeMismatch(why, cure=f"Name one adapter, or None, for each row{more}")


@dataclass(frozen=True)
class Scope:
    """The settings of one context: each hook's route, and the adapters that only this context switches on or off."""

    routes: Mapping[object, Route] = field(default_factory=dict)
    active: Mapping[Switch, bool] = field(default_factory=dict)


_EVERYWHERE = Scope()


class _LocalScopes(threading.local):
    """The scope of each thread.

    `__init__` runs once in each thread and sets the attribute `scope`. The default value cannot be a class attribute,
    because dynamo does not notice when an instance attribute starts to hide a class attribute.
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
    """Holds a token that is replaced whenever any adapter's weight or switch changes for all threads.

    Some code caches values that depend on weights and switches, such as the plans in lean.py. Such code reads the token
    before it computes a value, and uses the cached value only while the token is the same. So a forward compares one
    object instead of looking at every adapter.
    """

    def __init__(self) -> None:
        self.token = object()

    def renew(self) -> None:
        """Replace the token. Call this method after a weight or a switch has changed."""
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
    """Remembers the scopes of a block's forwards, so that a recomputed forward gets the scope of its first run.

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
        """Return the current scope for a module's forward, or the first run's scope if the forward is a recomputation.

        Args:
            training: whether the module is in training mode.
            switches: the switches of the adapters that are attached to the module.

        Raises:
            Unsupported: the forward is a recomputation, and the first run's scope is unknown, because forwards with
                several scopes ran since the last backward pass. Or an adapter's weight or switch changed since the
                first run.
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
            # Without checkpointing, no recomputation ever clears the list. So keep only the latest scopes: otherwise, a
            # training that uses another route in each step would take quadratic time.
            del seen[: max(0, len(seen) - _KEPT + 1)]
            seen.append((scope, states))
        return scope

    def _recalled(self, scope: Scope, states: States) -> Scope:
        # Prefer forwards that ran with gradients. Forwards without gradients may be those of a reference model (DPO),
        # which has no backward pass. But if no forward ran with gradients, use the forwards without gradients, because
        # reentrant checkpointing disables gradients in the first run.
        with_gradients, without = self._seen[True], self._seen[False]
        recalled = with_gradients or without
        if not recalled:
            return scope
        if len(recalled) == 1 or (not with_gradients and (scope, states) in recalled):
            chosen = recalled[0] if len(recalled) == 1 else (scope, states)
            if chosen[1] == states:
                return chosen[0]
            why = "a checkpointed block is recomputed, but an adapter's weight or switch changed after the first run"
            cure = "Set handle.weight and call handle.set_active() after backward(), or use `with handle.disable()`"
            raise Unsupported(why, cure=cure)
        why = "a checkpointed block is recomputed, but forwards with several routes or switches ran before backward()"
        raise Unsupported(why, cure="Call backward() inside the `with` of its forward, or after each forward")


_KEPT = 16
"""The number of scopes that `Recall` remembers. It must be more than 1: a single scope is taken for the only one."""

States = tuple[tuple[Switch, float, bool], ...]
"""For each adapter, a tuple of its switch, its weight, and the value of `switch.active`."""

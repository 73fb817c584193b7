"""The settings of one thread or one asyncio task: the route of its rows, adapters it has disabled.

`handle.weight = ...` and `handle.set_active(...)` change the model for everybody. `with route(...)` and
`with handle.disable()` hold for the context that entered them: a server answers many threads with one model.

Two stores hold the same value. A `ContextVar` is right for threads and for tasks of asyncio, but torch.compile cannot
trace it (torch 2.13: "does not know how to trace method get"). It does trace and guard a `threading.local`, so compiled
code reads that one. A task that awaits inside the `with` and runs a *compiled* model is the one case it cannot tell.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..errors import Unsupported, UsageError

if TYPE_CHECKING:
    from .routing import Route


@dataclass(frozen=True)
class Scope:
    """Settings of one context: hook -> its route, switch -> whether its adapter is on."""

    routes: Mapping[Any, Route] = field(default_factory=dict)
    active: Mapping[Any, bool] = field(default_factory=dict)


_EVERYWHERE = Scope()


class _Local(threading.local):
    """The scope of each thread.

    It is set in `__init__`, which runs once a thread: dynamo guards an attribute of the instance, and does not see
    that one of the instance has come to hide one of the class.
    """

    def __init__(self) -> None:
        self.scope = _EVERYWHERE


_SCOPE: ContextVar[Scope] = ContextVar("adapterkit.torch.scope", default=_EVERYWHERE)
_LOCAL = _Local()


def current() -> Scope:
    """The scope of this context."""
    return _LOCAL.scope if torch.compiler.is_compiling() else _SCOPE.get()


@contextmanager
def within(scope: Scope) -> Iterator[None]:
    """Run the `with` in this scope, in this context alone."""
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
            except ValueError:  # Another thread or task leaves it.
                crossed = True
    if crossed:
        why = "a `with route(...)` or `with handle.disable()` is left in another order, or thread, than it was entered"
        cure = "Enter and leave it around each forward, not around a `yield` of a generator that others run beside"
        raise UsageError(why, cure=cure)


class Settings:
    """The settings that hold for everybody: a token that each change of an adapter's weight or switch replaces.

    A plan or a stack is valid as long as the token that was read *before* it was made is the current one. That costs
    one comparison a forward instead of a look at every adapter.
    """

    def __init__(self) -> None:
        self.token = object()

    def renew(self) -> None:
        """Note a change, once it is made."""
        self.token = object()


SETTINGS = Settings()


def routed(routes: Mapping[Any, Route]) -> Any:
    """The context's scope with these routes besides its own; see `within`."""
    scope = current()
    return within(Scope({**scope.routes, **routes}, scope.active))


def switched(switch: Any, active: bool) -> Any:
    """The context's scope with one adapter on or off; see `within`."""
    scope = current()
    return within(Scope(scope.routes, {**scope.active, switch: active}))


class Recall:
    """Gives a recomputed forward the scope that the first one had.

    Activation checkpointing runs a block again in the backward pass: often outside the `with` that the forward ran
    in, and on CUDA in a thread of autograd's own. Gradients would silently be those of another function. The adapters'
    weights and switches are compared with those of the first forward.
    """

    def __init__(self) -> None:
        self._seen: dict[bool, list[tuple[Scope, States]]] = {True: [], False: []}
        self._task = -1
        self._token: object = None

    def scope(self, training: bool, switches: Sequence[Any] = ()) -> Scope:
        """The scope to run in.

        Args:
            training: whether the module is in training mode.
            switches: those of the adapters at the module.

        Raises:
            Unsupported: recomputing, where several scopes have run since the last backward pass, or an adapter was
                weighed or switched since.
        """
        if torch.compiler.is_compiling():
            return _LOCAL.scope
        scope = _SCOPE.get()
        if not training:
            return scope
        task = torch._C._current_graph_task_id()
        if task == self._task == -1 and SETTINGS.token is self._token:  # The usual case, once a module and forward.
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
        # Reentrant checkpointing runs its first forward without gradients, as a reference model is run too (DPO).
        with_gradients, without = self._seen[True], self._seen[False]
        found = with_gradients or without
        if not found:
            return scope
        if len(found) == 1 or (not with_gradients and (scope, states) in found):
            chosen = found[0] if len(found) == 1 else (scope, states)
            if chosen[1] == states:
                return chosen[0]
            why = "a checkpointed block is recomputed after an adapter got another weight, or was switched on or off"
            cure = "Set handle.weight and call handle.set_active() after backward(), or use `with handle.disable()`"
            raise Unsupported(why, cure=cure)
        why = "a checkpointed block is recomputed after forwards with several routes or switches"
        raise Unsupported(why, cure="Call backward() inside the `with` of its forward, or after each forward")


States = tuple[tuple[Any, float, bool], ...]
"""Each adapter's switch, its weight, and whether it is on."""

"""Outputs: one call of any module, in the words in which output updates speak of it, and where residual and norm are.

A module ends a sub-layer itself where its forward takes the residual as its second input, as BERT's `BertOutput` does:
then what it computes before is had by running it on a residual of 0 with its norm left out. Elsewhere the block around
it adds the residual; an update names the module that reads it, and a recorder there keeps it until it is asked for.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.adapter import Target
from ..core.composed_layer import Composed
from ..core.updates import Update
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from .layers import Layer, moved
from .scopes import SETTINGS, Scope

Run = Callable[[Sequence[Any], dict[str, Any], "str | None"], Any]
"""A module's forward, by positional and named arguments, and the name of a norm inside it to leave out."""

Parameters = Callable[[], Mapping[str, Tensor]]
"""Name of a parameter of the module -> its value after the updates of weights that are attached there."""

Beside = tuple[Tensor | None, dict[str, Any]]
"""A residual that a recorder kept, and words of the model's call."""

RESIDUALS = ("input_tensor", "residual")
"""Names in transformers of the second input of modules that add it to their output."""


@dataclass(eq=False)
class Switch:
    """The state that all attached parts of one adapter share.

    Attributes:
        name: the adapter's name.
        weight: how much of its change is added.
        active: whether it is on where a context has not switched it, see scopes.py.
        attached: False once its handle was removed or merged.
    """

    name: str
    weight: float
    active: bool = True
    attached: bool = True

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        SETTINGS.renew()

    def on(self, scope: Scope) -> bool:
        """Whether the adapter is on in a context."""
        return scope.active.get(self, self.active)

    def acts(self, scope: Scope) -> bool:
        """Whether the adapter changes anything in a context."""
        return self.on(scope) and self.weight != 0


class InputRecorder(threading.local):
    """Keeps the input of a module, until the residual is asked for: each thread its own."""

    def __init__(self, where: str, switch: Switch) -> None:
        self.where, self.switch = where, switch
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> InputRecorder:
        return InputRecorder(self.where, copy.deepcopy(self.switch, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return InputRecorder, (self.where, self.switch)

    def take(self) -> Tensor:
        """The residual of this pass.

        Raises:
            Unsupported: the module was not called before.
        """
        value, self.value = self.value, None
        if value is None:
            why = "the module that reads the residual was not called before this one"
            raise Unsupported(why, where=self.where, cure="Correct the update's `residual`")
        return value


@dataclass(frozen=True, eq=False)
class OutputSite:
    """The place where the output of a target ends: its residual and its norm.

    Attributes:
        channels: how many channels its updates expect; None where they do not say.
        recorder: keeps the residual that the module `reader` reads; None where the module adds it itself, or has none.
        norm: what the block around it sends the sum through.
        own: position and name of the residual among the module's own arguments, where it takes one.
        own_norm: the name of its own norm.
        call_words: gives the words of the model's call, where an update asks for some.
    """

    channels: int | None
    recorder: InputRecorder | None = None
    reader: nn.Module | None = None
    norm: nn.Module | None = None
    own: tuple[int, str] | None = None
    own_norm: str | None = None
    call_words: Callable[[], dict[str, Any]] = dict

    def beside(self) -> Beside:
        """The residual of this pass, and the words of the model's call."""
        return (None if self.recorder is None else self.recorder.take()), self.call_words()


def find_output_site(
    module: nn.Module, updates: Sequence[Any], target: Target, switch: Switch, find: Callable[[str], nn.Module]
) -> OutputSite:
    """The output site of a module for output updates; `find` gives a module by its path from the target's parent.

    Raises:
        Unsupported: the module cannot take them, or not together.
        TargetNotFound: there is no module where an update says that the residual or the norm is.
    """
    _check(module, target)
    channels = next((update.channels for update in updates if update.channels is not None), None)
    placed = [update for update in updates if update.placed]
    if not placed:
        return OutputSite(channels)
    where, cure = str(target), "Give each its own adapter, or change the order"
    named = {(update.attributes.get("residual", ""), update.attributes.get("norm", "")) for update in placed}
    if len(named) > 1:
        raise Unsupported("updates of one target with residuals at several places", where=where, cure=cure)
    ((residual, norm),) = named
    own = None if residual or norm else _own_residual(module)
    if (residual or own) and any(b.placed and not a.placed for a, b in pairwise(updates)):
        raise Unsupported("an update of the whole output before one inside it", where=where, cure=cure)
    if norm and not all(update.whole for update in placed):
        why = "the block around it normalises the output, so that the norm cannot be left out"
        raise Unsupported(why, where=where, cure="Set original_ln_after, or target the block")
    recorder, reader = (InputRecorder(where, switch), _found(find, residual, where)) if residual else (None, None)
    own_norm = _own_norm(module, where) if own else None
    return OutputSite(channels, recorder, reader, _found(find, norm, where), own, own_norm)


def _found(find: Callable[[str], nn.Module], path: str, where: str) -> nn.Module | None:
    try:
        return find(path) if path else None
    except AttributeError:
        why = f"no module {path!r} beside it"
        raise TargetNotFound(why, where=where, cure="Correct the update's `residual` and `norm`") from None


def _check(module: nn.Module, target: Target) -> None:
    if target.rows is not None or target.stacked:
        cure = "Target the module as a whole"
        raise Unsupported("an output update of a slice, or of experts", where=str(target), cure=cure)
    if type(module).forward is nn.Module.forward:
        why = f"a {type(module).__name__} has no forward of its own"
        raise Unsupported(why, where=str(target), cure="Target one of the modules that it holds")


def _own_residual(module: nn.Module) -> tuple[int, str] | None:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return next(((names.index(name), name) for name in RESIDUALS if name in names[1:2]), None)


def _own_norm(module: nn.Module, where: str) -> str | None:
    norms = [name for name, child in module.named_children() if type(child).__name__.endswith("Norm")]
    if len(norms) > 1:
        why = f"which of {', '.join(norms)} follows the residual cannot be told"
        raise Unsupported(why, where=where, cure="Name `residual` and `norm` in the update")
    return norms[0] if norms else None


class CallArguments(dict[str, Any]):
    """The arguments of the model's call, by name; asking for more is an error."""

    def __missing__(self, name: str) -> Any:
        given = "input_ids" if name == "hidden_states" else name
        cure = f"Call the model that it was injected into, with {given}="
        raise UsageError(f"its law needs {name}, which no call of the model brought", cure=cure)


class ModuleCall:
    """One call of a module; see `adapterkit.core.updates.OutputUpdate` for the words. Runs the module when it must."""

    def __init__(
        self, module: nn.Module, layer: Layer | None, run: Run, args: Any, kwargs: Any, output_site: OutputSite,
        parameters: Parameters,
    ) -> None:  # fmt: skip
        self.module, self.layer, self.run, self.args, self.kwargs = module, layer, run, args, kwargs
        self.output_site, self.parameters = output_site, parameters
        self.given: Tensor | None = None
        self.call: Mapping[str, Any] = {}
        self.x = args[0] if args else next(iter(kwargs.values()), None)
        self.rest: tuple[Any, ...] | None = None
        self.kept: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.shape = layer.shape if layer else ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.close(self.hidden(x), x)

    def hidden(self, x: Tensor) -> Tensor:
        if x is not self.x:
            return self._hidden(x)
        if self.kept is None:
            self.kept = self._hidden(x)
        return self.kept

    def residual(self, x: Tensor) -> Tensor | None:
        if self.output_site.own is None:
            return self.given
        position, name = self.output_site.own
        found: Tensor = self.kwargs[name] if name in self.kwargs else self.args[position]
        return found

    def norm(self, h: Tensor) -> Tensor:
        own = self.output_site.own_norm
        through = self.output_site.norm if own is None else getattr(self.module, own)
        return h if through is None else through(h)

    def close(self, h: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        if self.output_site.own is not None:
            residual: Any = self.residual(x)
            return self.norm(h + residual) if whole else h
        return h if whole or self.given is None else h - self.given

    def ended(self, y: Tensor) -> Any:
        """Return the module's result with another output, which is the first of several where it returns several."""
        if self.dtype is not None and self.dtype != y.dtype and torch.is_autocast_enabled(y.device.type):
            y = y.to(self.dtype)  # Factors of float32 made it wider than what the module itself returns.
        return y if self.rest is None else (y, *self.rest)

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        if self.layer is None:
            raise Unsupported("no weight to exchange", cure="Order updates of weights before those of outputs")
        return self.layer.op(x, w)

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        return self.layer.zero_padded(x, w) if self.layer else self.op(x, w)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in, *k]` with which the module runs: after the updates of weights that are attached."""
        if self.layer is None:
            raise Unsupported("the module has no weight", cure="Target a linear layer, a convolution or an embedding")
        changed = self.parameters().get("weight")
        return self.layer.weight if changed is None else self.layer.viewed(changed)

    @property
    def bias(self) -> Tensor | None:
        """The bias with which the module runs."""
        changed = self.parameters().get("bias")
        return changed if changed is not None else self.layer.bias if self.layer else None

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return self.layer.mix(h, w) if self.layer else functional.linear(h, w)

    def per_channel(self, v: Tensor) -> Tensor:
        return self.layer.per_channel(v) if self.layer else v

    @property
    def channel(self) -> int:
        return self.layer.channel if self.layer else -1

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device to compute with."""
        x: Any = self.x
        return x if isinstance(x, Tensor) and x.is_floating_point() else self.hidden(x)

    def _hidden(self, x: Tensor) -> Tensor:
        args = [x, *self.args[1:]] if self.args else []
        kwargs = self.kwargs if self.args else self.kwargs | dict.fromkeys(list(self.kwargs)[:1], x)
        out = self._before_the_end(args, kwargs) if self.output_site.own else self.run(args, kwargs, None)
        self.rest = tuple(out[1:]) if isinstance(out, tuple | list) else None
        h = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(h, Tensor):
            raise Unsupported(f"returns a {type(h).__name__}, no tensor", cure="Target a module inside it")
        self.dtype = h.dtype
        if self.output_site.channels not in (None, h.shape[self.channel]):
            why = f"made for {self.output_site.channels} channels; the module's output has {h.shape[self.channel]}"
            raise ShapeMismatch(why, cure="Is this the base that the adapter was trained on?")
        return h

    def _before_the_end(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        assert self.output_site.own is not None
        position, name = self.output_site.own
        if name in kwargs:
            kwargs = kwargs | {name: kwargs[name].new_zeros(())}
        else:
            args[position] = args[position].new_zeros(())
        return self.run(args, kwargs, self.output_site.own_norm)


@dataclass(frozen=True, eq=False)
class OutputChange:
    """One adapter's updates of an output, for one call: its weight, and the residual that its recorder kept."""

    weight: float
    updates: Sequence[Update]
    output_site: OutputSite
    residual: Tensor | None
    call: Mapping[str, Any]


def through(
    module: nn.Module, layer: Layer | None, run: Run, args: Any, kwargs: Any, changes: Sequence[OutputChange],
    parameters: Parameters,
) -> Any:  # fmt: skip
    """y + sum of weight * (f(x) - y); the module runs once for all updates that see it end alike."""
    calls: dict[Any, ModuleCall] = {}
    for change in changes:
        ending = change.output_site.own, change.output_site.norm
        if ending not in calls:
            calls[ending] = ModuleCall(module, layer, run, args, kwargs, change.output_site, parameters)
    call = next(iter(calls.values()))
    if len(changes) == 1 and changes[0].weight == 1:
        return call.ended(_changed(call, changes[0]))
    x: Any = call.x
    y = base = call(x)
    for change in changes:
        other = calls[change.output_site.own, change.output_site.norm]
        y = y + change.weight * (_changed(other, change) - base)
    return call.ended(y)


def _changed(call: ModuleCall, change: OutputChange) -> Tensor:
    call.given, call.call = change.residual, CallArguments(change.call)
    layer: Any = call
    for update in change.updates:
        layer = Composed(layer, moved(update, call.like.device, call.like.dtype))
    x: Any = call.x
    y: Tensor = layer(x)
    return y

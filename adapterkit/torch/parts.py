"""The parts that a module's hook runs. Each part holds the updates that one adapter has for one target.

The formula of an output update gets each call of a module as a `ModuleCall`. This object provides the output, the
residual and the norm in the same way for all modules.

A module adds the residual itself if its forward takes the residual as its second input, as BERT's `BertOutput` does. To
get the output of such a module without the residual, `ModuleCall` runs the module with a residual of 0 and without its
norm. If the block around the module adds the residual instead, the update names the module whose input is the residual.
A recorder at the named module then keeps this input until it is needed.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.adapter import Target
from ..core.updates import Composed, OutputUpdate, Update
from ..errors import USE_ITS_BASE, ShapeMismatch, TargetNotFound, Unsupported, UsageError
from .layers import TorchLayer, moved
from .leaves import LiveUpdates
from .scopes import Switch

Run = Callable[[Sequence[object], Mapping[str, object], "str | None"], object]
"""A module's forward.

It takes the positional arguments as a sequence, the keyword arguments as a mapping, and the name of the module's norm
that the forward must skip (None to skip no norm).
"""

Parameters = Callable[[], Mapping[str, Tensor]]
"""A function that returns the new values of the parameters that attached updates change, keyed by parameter name."""

Beside = tuple[Tensor | None, dict[str, object]]
"""The residual that a recorder kept (None without a recorder), and the arguments of the model's call."""

RESIDUALS = ("input_tensor", "residual")
"""The names that transformers gives to the second parameter of `forward` if this parameter is a residual. The module
adds the residual to its output."""


class InputRecorder(threading.local):
    """Keeps a module's input, separately for each thread, until another module needs the input as its residual."""

    def __init__(self, where: str, switch: Switch) -> None:
        self.where, self.switch = where, switch
        self.value: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> InputRecorder:
        return InputRecorder(self.where, copy.deepcopy(self.switch, memo))

    def __reduce__(self) -> tuple[type[InputRecorder], tuple[str, Switch]]:
        return InputRecorder, (self.where, self.switch)

    def take(self) -> Tensor:
        """Return the residual of this forward pass.

        Raises:
            Unsupported: in this forward pass, the recorded module was not called before the module that needs the
                residual.
        """
        value, self.value = self.value, None
        if value is None:
            why = "the module whose input is the residual was not called before this module"
            raise Unsupported(why, where=self.where, cure="Correct the update's `residual`")
        return value


@dataclass(frozen=True, eq=False)
class OutputSite:
    """The residual that is added to a target's output, and the norm that is applied to the sum.

    Attributes:
        channels: the number of output channels for which the updates were made; None if they fit any number.
        recorder: the recorder that keeps the input of `reader` as the residual; None if the target adds the residual
            itself, or if there is no residual.
        reader: the module whose input is the residual; None if `recorder` is None.
        norm: the norm that the block around the target applies to the sum of output and residual, or None.
        residual_argument: the position and name of the residual among the arguments of the target's forward; None if
            the target takes no residual, or if the updates name a module for the residual or the norm.
        norm_name: the name of the target's child module that normalises the sum of output and residual, or None.
        call_words: a function that returns the arguments of the model's call. The default returns an empty dictionary.
    """

    channels: int | None
    recorder: InputRecorder | None = None
    reader: nn.Module | None = None
    norm: nn.Module | None = None
    residual_argument: tuple[int, str] | None = None
    norm_name: str | None = None
    call_words: Callable[[], dict[str, object]] = dict

    def beside(self) -> Beside:
        """Return the residual of this forward pass and the arguments of the model's call."""
        return (None if self.recorder is None else self.recorder.take()), self.call_words()


def find_output_site(
    module: nn.Module, group: Sequence[Update], target: Target, switch: Switch, find: Callable[[str], nn.Module]
) -> OutputSite:
    """Find the residual that is added to a module's output, and the norm that is applied to the sum.

    `find(path)` must return the module at `path`, which is relative to the target's parent.

    Raises:
        Unsupported: one of the updates cannot be applied to the module, or the updates cannot be applied together.
        TargetNotFound: an update names a residual or norm module that does not exist.
    """
    _check(module, target)
    updates = [update for update in group if isinstance(update, OutputUpdate)]
    channels = next((update.channels for update in updates if update.channels is not None), None)
    placed = [update for update in updates if update.placed]
    if not placed:
        return OutputSite(channels)
    where, cure = str(target), "Put each update into a separate adapter, or change the order of the updates"
    named = {(update.attributes.get("residual", ""), update.attributes.get("norm", "")) for update in placed}
    if len(named) > 1:
        why = "the updates of one target name different modules as `residual` or `norm`"
        raise Unsupported(why, where=where, cure=cure)
    ((residual, norm),) = named
    adds_residual = None if residual or norm else _residual_argument(module)
    if (residual or adds_residual) and any(b.placed and not a.placed for a, b in pairwise(updates)):
        why = "an update changes the output after the residual is added, and the next update changes it before that"
        raise Unsupported(why, where=where, cure=cure)
    if norm and not all(update.whole for update in placed):
        why = "the block around the target normalises the output, so the norm cannot be skipped"
        raise Unsupported(why, where=where, cure="Set original_ln_after, or target the block")
    recorder, reader = (
        (InputRecorder(where, switch), _module_or_none(find, residual, where)) if residual else (None, None)
    )
    norm_name = _norm_name(module, where) if adds_residual else None
    return OutputSite(channels, recorder, reader, _module_or_none(find, norm, where), adds_residual, norm_name)


def _module_or_none(find: Callable[[str], nn.Module], path: str, where: str) -> nn.Module | None:
    try:
        return find(path) if path else None
    except AttributeError:
        why = f"the target's parent has no module {path!r}"
        raise TargetNotFound(why, where=where, cure="Correct the update's `residual` and `norm`") from None


def _check(module: nn.Module, target: Target) -> None:
    if target.rows is not None or target.stacked:
        cure = "Target the module as a whole"
        raise Unsupported("an output update cannot change a slice or stacked experts", where=str(target), cure=cure)
    if type(module).forward is nn.Module.forward:
        why = f"a {type(module).__name__} does not define a forward"
        raise Unsupported(why, where=str(target), cure="Target one of the modules inside it")


def _residual_argument(module: nn.Module) -> tuple[int, str] | None:
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return next(((names.index(name), name) for name in RESIDUALS if name in names[1:2]), None)


def _norm_name(module: nn.Module, where: str) -> str | None:
    norms = [name for name, child in module.named_children() if type(child).__name__.endswith("Norm")]
    if len(norms) > 1:
        why = f"it is unclear which of {', '.join(norms)} follows the residual"
        raise Unsupported(why, where=where, cure="Set the update's `residual` and `norm`")
    return norms[0] if norms else None


class CallArguments(dict[str, object]):
    """The arguments of the model's call, keyed by name. Reading a name that was not passed raises UsageError."""

    def __missing__(self, name: str) -> NoReturn:
        given = "input_ids" if name == "hidden_states" else name
        cure = f"Pass {given}= to the model that the adapter was injected into"
        raise UsageError(f"the adapter's formula needs {name}, which the model was not called with", cure=cure)


class ModuleCall:
    """One call of a module. Formulas get this object as their argument `layer`.

    `OutputUpdate` documents the attributes and methods of `layer`. The module runs when a formula first needs the
    module's output.
    """

    def __init__(
        self, module: nn.Module, layer: TorchLayer | None, run: Run, args: Sequence[Any], kwargs: Mapping[str, Any],
        output_site: OutputSite, parameters: Parameters,
    ) -> None:  # fmt: skip
        self.module, self.layer, self.run, self.args, self.kwargs = module, layer, run, args, dict(kwargs)
        self.output_site, self.parameters = output_site, parameters
        self.given: Tensor | None = None
        self.call: Mapping[str, object] = {}
        self.x = args[0] if args else next(iter(kwargs.values()), None)
        self.rest: tuple[object, ...] | None = None
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
        if self.output_site.residual_argument is None:
            return self.given
        position, name = self.output_site.residual_argument
        residual: Tensor = self.kwargs[name] if name in self.kwargs else self.args[position]
        return residual

    def norm(self, h: Tensor) -> Tensor:
        norm_name = self.output_site.norm_name
        through = self.output_site.norm if norm_name is None else getattr(self.module, norm_name)
        return h if through is None else through(h)

    def close(self, h: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        if self.output_site.residual_argument is not None:
            residual: Any = self.residual(x)
            return self.norm(h + residual) if whole else h
        return h if whole or self.given is None else h - self.given

    def ended(self, y: Tensor) -> object:
        """Convert the module's new output `y` to the value that the module's forward must return.

        If the forward returns several values, `y` replaces the first one.
        """
        if self.dtype is not None and self.dtype != y.dtype and torch.is_autocast_enabled(y.device.type):
            y = y.to(self.dtype)  # The adapter's float32 tensors widened the dtype of y.
        return y if self.rest is None else (y, *self.rest)

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        if self.layer is None:
            raise Unsupported("the module has no weight", cure="Order updates of weights before those of outputs")
        return self.layer.op(x, w)

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        return self.layer.zero_padded(x, w) if self.layer else self.op(x, w)

    @property
    def weight(self) -> Tensor:
        """The weight `[out, in, *k]` that the module runs with, including the attached updates of weights."""
        if self.layer is None:
            raise Unsupported("the module has no weight", cure="Target a linear layer, a convolution or an embedding")
        changed = self.parameters().get("weight")
        return self.layer.weight if changed is None else self.layer.viewed(changed)

    @property
    def bias(self) -> Tensor | None:
        """The bias that the module runs with."""
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
        """A tensor with the dtype and device to compute with."""
        x: Any = self.x
        return x if isinstance(x, Tensor) and x.is_floating_point() else self.hidden(x)

    def _hidden(self, x: Tensor) -> Tensor:
        args = [x, *self.args[1:]] if self.args else []
        kwargs = self.kwargs if self.args else self.kwargs | dict.fromkeys(list(self.kwargs)[:1], x)
        out = self._before_the_end(args, kwargs) if self.output_site.residual_argument else self.run(args, kwargs, None)
        self.rest = tuple(out[1:]) if isinstance(out, tuple | list) else None
        h = out[0] if isinstance(out, tuple | list) else out
        if not isinstance(h, Tensor):
            raise Unsupported(
                f"the module returns a {type(h).__name__}, not a tensor", cure="Target a module inside it"
            )
        self.dtype = h.dtype
        wanted, given = self.output_site.channels, h.shape[self.channel]
        if wanted not in (None, given):
            why = f"the update was made for {wanted} channels, but the module's output has {given}"
            raise ShapeMismatch(why, cure=USE_ITS_BASE)
        return h

    def _before_the_end(self, args: list[Tensor], kwargs: dict[str, Tensor]) -> object:
        assert self.output_site.residual_argument is not None
        position, name = self.output_site.residual_argument
        if name in kwargs:
            kwargs = kwargs | {name: kwargs[name].new_zeros(())}
        else:
            args[position] = args[position].new_zeros(())
        return self.run(args, kwargs, self.output_site.norm_name)


@dataclass(frozen=True, eq=False)
class OutputChange:
    """One adapter's updates of a module's output, with the values that their formulas use in one call of the module."""

    weight: float
    updates: Sequence[Update]
    output_site: OutputSite
    residual: Tensor | None
    call: Mapping[str, object]


def through(
    module: nn.Module, layer: TorchLayer | None, run: Run, args: Sequence[object], kwargs: Mapping[str, object],
    changes: Sequence[OutputChange], parameters: Parameters,
) -> object:  # fmt: skip
    """Return the module's output with the changes of all adapters: y + sum of weight * (f(x) - y).

    y is the output without these changes, and f(x) is the output with one adapter's change. The module runs once for
    all changes with the same residual and norm.
    """
    calls: dict[Any, ModuleCall] = {}
    for change in changes:
        ending = change.output_site.residual_argument, change.output_site.norm
        if ending not in calls:
            calls[ending] = ModuleCall(module, layer, run, args, kwargs, change.output_site, parameters)
    call = next(iter(calls.values()))
    if len(changes) == 1 and changes[0].weight == 1:
        return call.ended(_changed(call, changes[0]))
    x: Any = call.x
    y = base = call(x)
    for change in changes:
        other = calls[change.output_site.residual_argument, change.output_site.norm]
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


HOOK = "_adapterkit_hook"
"""The name of the module attribute that holds the hook. The attribute stays when other tools replace or wrap
the forward."""

SCRIPTING = "__prepare_scriptable__"
"""The name of the function that torch.jit.script calls on a module before it compiles the module."""


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter's updates for one target, with the settings that a hook needs to run them.

    Updates of outputs are in a separate part. Only such a part has an `output_site`.

    Attributes:
        bound: the updates.
        weight: the path of the weight that the updates change, relative to the hook's module, or None.
        bias: the path of the bias, also relative to the hook's module, or None.
        direct: for updates of weights, whether the hook can compute the layer's output with the methods' formulas. If
            not, the module's own forward runs with changed parameters. Always False for updates of outputs.
        dropout: the dropout probability in training.
    """

    switch: Switch
    target: Target
    bound: LiveUpdates
    weight: str | None
    bias: str | None
    direct: bool
    output_site: OutputSite | None = None
    dropout: float = 0.0

    @property
    def home(self) -> str:
        """The path that the hook's module had at the injection.

        The target is this module, or a module or parameter inside this module.
        """
        path = self.target.path
        below = self.weight or self.bias or ""
        for rest in (below, below.rpartition(".")[0]):
            if rest and f".{path}".endswith(f".{rest}"):
                return path.removesuffix(rest).removesuffix(".")
        return path

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates with the tensors that the model holds now."""
        return self.bound.running

    @property
    def foldable(self) -> bool:
        """Whether all updates, including their changes of the bias, can be written into the module's parameters."""
        updates = self.bound.updates
        kinds = all(update.kind in ("additive", "weight") for update in updates)
        return kinds and (self.bias is not None or not any(u.changes_bias and u.needs_bias for u in updates))

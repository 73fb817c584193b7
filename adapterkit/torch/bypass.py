"""Notice that a forward computes with the weight of a module and never calls the module: its adapter would not act.

Fused kernels do that. Liger's loss reads `lm_head.weight` while a model trains, Unsloth's decoding reads the weights of
all projections, kernels of a hub those of a whole MLP. PEFT's layers are bypassed by them without a word.

Nobody can see in a forward what it will read, and which path it takes may change with every call (training, decoding,
with labels or without). So a module with an adapter keeps its parameters in a dictionary that sees who asks for them:
`module.weight` ends in `_parameters["weight"]`. A weight that was asked for while the model ran, of a module that was
not called by the end, was read past the adapter. That costs nothing where the module is called, because the hook looks
its weight up with `dict.get`.

A forward that was put on a block after the injection may have copied the weights by then, and reads none of them. It is
watched at its next call: one that calls none of the modules with an adapter is told with a warning, for it may be meant
(an ablation).

Compiled code reads parameters past every dictionary, and its graph tells no longer which module a weight came from. So
the compiler is watched instead, while it traces: a block that it calls without calling one of its modules with an
adapter is told with a warning, unless that module ran before. It cannot be an error, for nobody knows what the block
computes instead. Code with graph breaks is traced in pieces, and code that torch takes over from a model of the same
build is not traced again: run such a model once without `torch.compile`.
"""

from __future__ import annotations

import dis
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..errors import Unsupported
from .parts import HOOK

if TYPE_CHECKING:
    from .parts import Part

PARAMETERS = "_parameters"
"""The attribute of a module that holds its parameters."""


class Hook(Protocol):
    """The forward hook of a module with adapters, how often it was called, and whether compiled code ever called it."""

    module: nn.Module
    parts: list[Part]
    calls: int
    traced: bool


class WatchedParameters(dict[str, Any]):
    """The parameters of a module with an adapter.

    Attributes:
        hook: the hook at the module.
        names: the parameters that its adapters change.
    """

    hook: Hook
    names: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> Any:
        if not torch.compiler.is_compiling():
            calls = _LOCAL.calls
            if calls is not None and name in self.names:
                calls.read(self.hook, name)
        return dict.__getitem__(self, name)


def watch_reads(hook: Hook) -> None:
    """Let a module note who reads the parameters that its adapters change.

    Rows of an embedding are read by others all the time: functional heads compute with `embedding.weight`, in PEFT's
    models too, and such a head is not what an adapter of the embedding changes.
    """
    held = hook.module.__dict__
    # DeepSpeed's ZeRO has a dictionary of its own there, which loads what is read.
    if type(held[PARAMETERS]) not in (dict, WatchedParameters) or isinstance(hook.module, nn.Embedding):
        return
    if type(held[PARAMETERS]) is dict:
        held[PARAMETERS] = WatchedParameters(held[PARAMETERS])
    held[PARAMETERS].hook = hook
    paths = [path for part in hook.parts for path in (part.weight, part.bias) if part.output_site is None]
    held[PARAMETERS].names = frozenset(path for path in paths if path and "." not in path)


def unwatch_reads(hook: Hook) -> None:
    """Give a module a plain dictionary back."""
    held = hook.module.__dict__
    if type(held[PARAMETERS]) is WatchedParameters:
        held[PARAMETERS] = dict(held[PARAMETERS])


class Calls:
    """Reads and calls of the modules with adapters in one forward of a model.

    Args:
        hooks: each hook at those modules, and its place in `counts`.
        counts: how often each was called before.
        outer: the forward around this one.
    """

    def __init__(self, hooks: Mapping[Any, int], counts: Sequence[int], outer: Calls | None) -> None:
        self.hooks, self.counts, self.outer = hooks, counts, outer
        self.reads: list[tuple[Hook, str, str]] = []

    def read(self, hook: Hook, name: str) -> None:
        """Note that a parameter is read, unless its module was called before, or the reader asks for a dtype alone."""
        at = self.hooks.get(hook)
        if at is None:
            if self.outer is not None:
                self.outer.read(hook, name)
            return
        if hook.calls != self.counts[at]:
            return
        reader = _reader(sys._getframe(2))
        if reader is not None:
            self.reads.append((hook, name, reader))

    def check(self, is_own: Callable[[Any, str], bool], told: set[int]) -> None:
        """Check that all modules whose weights were read were called too.

        Some models do this themselves: Mamba's mixer multiplies by `dt_proj.weight`, WavLM's attention hands weights of
        its projections to a function of torch. PEFT trains such models with an adapter that does not act, so the live
        model goes on, with a warning.

        Args:
            is_own: whether a function is a method that the class around a hook's module was defined with.
            told: ids of the hooks that were warned of; one that is warned of here is added.

        Raises:
            Unsupported: one was not, and another tool's function read its weight.
        """
        for hook, name, reader in self.reads:
            if hook.calls != self.counts[self.hooks[hook]] or not hook.parts:
                continue
            why = f"{reader} computed with its {name} and did not call it, so that its adapter did not act"
            where = str(hook.parts[0].target)
            if not is_own(hook, reader):
                raise Unsupported(why, where=where, cure=_UNFUSE)
            if id(hook) not in told:
                told.add(id(hook))
                again = "It does not in PEFT's models either; a merge changes the weight, and then it acts"
                warnings.warn(f"{where}: {why}. {again}", stacklevel=2)


class _Local(threading.local):
    """The innermost forward of a watched model in this thread."""

    calls: Calls | None = None


_LOCAL = _Local()


def begin_calls(hooks: Mapping[Any, int]) -> Calls:
    """Begin to watch one forward of a model."""
    made = _LOCAL.calls = Calls(hooks, [hook.calls for hook in hooks], _LOCAL.calls)
    return made


def end_calls(hooks: Mapping[Any, int], failed: bool, is_own: Callable[[Any, str], bool], told: set[int]) -> None:
    """End what `begin_calls` began with the same hooks.

    Args:
        hooks: the hooks of the model.
        failed: whether the forward raised an exception.
        is_own: see `Calls.check`.
        told: see `Calls.check`.

    Raises:
        Unsupported: a module's weight was read, and the module was not called.
    """
    found = _LOCAL.calls
    while found is not None and found.hooks is not hooks:  # A forward inside of this one raised.
        found = found.outer
    if found is None:
        return
    _LOCAL.calls = found.outer
    if not failed:
        found.check(is_own, told)


def _reader(frame: FrameType | None) -> str | None:
    """The name of the function that reads an attribute of a module; None where it computes nothing with it.

    torch moves and gathers parameters, accelerate loads those of modules that may never be called. Neither computes
    with them past a forward.
    """
    while frame is not None and frame.f_code.co_name == "__getattr__":
        frame = frame.f_back
    if frame is None:
        return None
    home = str(frame.f_globals.get("__name__", ""))
    if home.split(".")[0] in _MOVERS or _asks_only(frame.f_code, frame.f_lasti):
        return None
    return f"{home}.{frame.f_code.co_qualname}"


_MOVERS = ("torch", "accelerate", __name__.split(".")[0])


@cache
def _asks_only(code: CodeType, at: int) -> bool:
    """Whether the instruction behind the one at an offset asks for a fact about what that returns, not for numbers."""
    behind = next((each for each in dis.get_instructions(code) if each.offset > at), None)
    if behind is None:
        return False
    if behind.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return behind.argval in _FACTS
    return "IF_NO" in behind.opname or (behind.opname == "LOAD_CONST" and behind.argval is None)  # `is None`


_FACTS = frozenset(
    ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "layout", "is_cuda", "is_meta", "requires_grad",
     "is_floating_point", "element_size", "itemsize", "get_device")
)  # fmt: skip
"""Attributes of a tensor that tell nothing of its numbers: T5 asks `self.wo.weight.dtype` before it calls `wo`."""


def warn_of_untraced(around: Sequence[tuple[nn.Module, Sequence[nn.Module]]], told: set[int]) -> None:
    """Warn of modules with adapters that compiled code does not call.

    Args:
        around: blocks that the code calls, each with the modules that it should call.
        told: ids of the hooks that were warned of; those that are warned of here are added.
    """
    for block, modules in around:
        hooks = [module.__dict__[HOOK] for module in modules if HOOK in module.__dict__]
        lost = [hook for hook in hooks if hook.parts and not hook.traced and not hook.calls and id(hook) not in told]
        told |= {id(hook) for hook in lost}
        if lost:
            names = ", ".join(dict.fromkeys(str(part.target) for hook in lost for part in hook.parts))
            warnings.warn(
                f"compiled code runs a {type(block).__name__} that calls none of {names}: if it computes with their "
                f"weights, their adapters do not act. {_UNFUSE}",
                stacklevel=2,
            )


class Block:
    """A module with a forward of its own around modules with adapters, and the forward that it had when it was met.

    Args:
        module: the module.
        hooks: those of the modules below it.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        self.module, self.hooks = module, list(hooks)
        self.met = self._forward()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "met": None}

    def _forward(self) -> tuple[Any, Any]:
        return self.module.__dict__.get("forward"), type(self.module).forward

    def look(self) -> None:
        """Watch the module's next call if another forward was put on it since."""
        now = self._forward()
        if self.met is None:
            self.met = now
        if now[0] is not self.met[0] or now[1] is not self.met[1]:
            self.met = now
            _BlockProbe(self)


class _BlockProbe:
    """Sees at a block's next call whether its new forward calls a module with an adapter.

    Args:
        block: the block.
    """

    def __init__(self, block: Block) -> None:
        self.block, self.counts = block, list[int]()
        module = block.module
        self.handles = [module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end)]

    def begin(self, *_: Any) -> None:
        """Count what was called before."""
        self.counts = [hook.calls for hook in self.block.hooks]

    def end(self, module: nn.Module, *_: Any) -> None:
        """Warn where nothing was called."""
        if torch.compiler.is_compiling():
            return
        for handle in self.handles:
            handle.remove()
        standing = [hook for hook in self.block.hooks if hook.parts]
        if standing and self.counts == [hook.calls for hook in self.block.hooks]:
            names = ", ".join(dict.fromkeys(str(part.target) for hook in standing for part in hook.parts))
            warnings.warn(
                f"another tool has put a forward on a {type(module).__name__} that calls none of {names}: their "
                f"adapters do not act. {_UNFUSE}",
                stacklevel=2,
            )


_UNFUSE = (
    "Switch the fused kernel off, call handle.merge_() before the model runs, or leave the module out of the "
    "adapter's targets"
)

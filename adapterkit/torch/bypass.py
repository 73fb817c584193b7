"""Detect code that bypasses an adapter: code that computes with a module's weight without calling the module.

Fused kernels bypass modules in this way. Liger's loss reads `lm_head.weight` while a model trains. Unsloth's decoding
reads the weights of all projections. Kernels from the Hugging Face Hub read the weights of a whole MLP. PEFT does
not detect this.

A forward does not declare which weights it will read, and each call may read different weights (training or decoding,
with or without labels). So a module with an adapter keeps its parameters in a dictionary that records reads: Python
looks up the attribute `module.weight` as `_parameters["weight"]`. The adapter was bypassed if a forward of the model
read the weight, but did not call the module. Calls of the module itself are not slowed down, because the hook reads the
weight with `dict.get`, which does not record.

Another tool may replace the forward of a block after the injection. The new forward may use earlier copies of the
weights, so no read is recorded. Therefore adapterkit also watches the next call of the block. If this call runs none of
the block's modules with an adapter, adapterkit warns. It raises no error, because the user may intend the bypass (an
ablation).

Compiled code reads parameters without any dictionary, and its graph does not record which module a weight belongs to.
So adapterkit also watches the compiler while it traces a model. If a block contains a module with an adapter, and
the traced code calls the block but not this module, a warning names the module. The warning does not name modules that
were already called outside compiled code. There is no error, because the block may compute the same result in another
way. The check has gaps: code with graph breaks is traced in pieces, and code that torch reuses from a model of the same
structure is not traced again. To check such a model, run it once without `torch.compile`.
"""

from __future__ import annotations

import dis
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from ..errors import Unsupported
from .parts import HOOK

if TYPE_CHECKING:
    from .forward_hook import ForwardHook
    from .parts import Part

# Find a module's own forward, even if hooks of other tools wrap it.
#
# accelerate and diffusers replace `module.forward` by a wrapper that loads or casts the weights, calls the previous
# forward, and releases the weights again. An adapter must run inside this wrapper. Outside the wrapper, formulas would
# read weights on the meta device (accelerate's offloading), uninitialised memory (diffusers' group offloading to disk)
# or 8-bit values (diffusers' layerwise casting).
#
# accelerate keeps the inner forward in an attribute of the module. diffusers keeps the inner forward in an attribute of
# a reference object. The first diffusers hook calls the forward through this object.


Slot = tuple[object, str]
"""A pair (object, attribute name). This attribute of the object holds a forward. The object is the module or a
reference object of diffusers."""


def inner_slot(module: nn.Module) -> Slot:
    """Return the slot of a module's innermost forward, which all hooks of accelerate and diffusers wrap."""
    slots = _references(module)[:1]
    if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook"):
        slots.append((module, "_old_forward"))
    # If accelerate and diffusers both wrapped the forward, one of these slots may hold the other tool's wrapper. So
    # prefer the slot with the module's own forward.
    bound_slots = (slot for slot in slots if getattr(value_in(slot), "__self__", None) is module)
    return next(bound_slots, slots[0] if slots else (module, "forward"))


def slot_of(module: nn.Module, owner: object) -> Slot | None:
    """Return the slot whose forward is a method of `owner`; None if other tools wrapped or removed this forward."""
    # Skip wrappers: functools.update_wrapper copies attributes, so a wrapper has the `__self__` of the wrapped method.
    plain = [slot for slot in slots(module) if not hasattr(value_in(slot), "__wrapped__")]
    return next((slot for slot in plain if getattr(value_in(slot), "__self__", None) is owner), None)


def value_in(slot: Slot) -> object:
    """Return the value in a slot, or None if the slot is empty and the class's own forward applies."""
    value: object = slot[0].__dict__.get(slot[1])
    return value


def slots(module: nn.Module) -> Iterator[Slot]:
    """Yield all slots that may hold a module's forward: `forward`, and the slots to which other tools move it."""
    yield from ((module, "forward"), (module, "_old_forward"))
    yield from _references(module)


def _references(module: nn.Module) -> list[Slot]:
    """Return the slots in which diffusers keeps the forwards that a module's hooks wrap. The innermost comes first."""
    registry = module.__dict__.get("_diffusers_hook")
    references = getattr(registry, "_fn_refs", ())
    return [(each, "forward" if each.original_forward is None else "original_forward") for each in references]


# Detect that another tool replaced a module's forward with one that bypasses the module's adapter.
#
# A tool that patches `module.forward` (accelerate, diffusers, loggers) usually calls the previous forward. But trainers
# with an fp8 base install a forward that multiplies by the weight and does not call the previous forward. The adapter
# would then have no effect, without any error. Only a call of the module shows whether its new forward calls the
# previous one.


class ForwardProbe:
    """Check at a module's next call whether another tool's forward still calls the module's hook.

    Args:
        hook: the module's hook. The other tool replaced the forward that the hook installed.
        standing: the other tool's forward.
    """

    def __init__(self, hook: ForwardHook, standing: object) -> None:
        self.hook, self.standing = hook, standing
        self.met: set[int] = set()  # The ids of threads in which the hook ran.
        hook.probe = self
        hook.module.register_forward_pre_hook(self.begin)
        hook.module.register_forward_hook(self.end)

    def begin(self, *_: object) -> None:
        """Forget earlier runs of the hook in this thread."""
        self.met.discard(threading.get_ident())

    def meet(self) -> None:
        """Record that the hook runs."""
        self.met.add(threading.get_ident())

    def end(self, module: nn.Module, *_: object) -> None:
        """Check that the hook ran during the module's call; if it did, remove the probe.

        Raises:
            Unsupported: the hook did not run.
        """
        if threading.get_ident() not in self.met:
            why = f"another tool replaced a {type(module).__name__}'s forward with one that bypasses the adapter"
            cure = "Let the new forward call the previous one, or inject the adapter afterwards"
            raise Unsupported(why, where=str(self.hook.parts[0].target) if self.hook.parts else None, cure=cure)
        self.hook.known = self.standing
        self.stop()

    def stop(self) -> None:
        """Remove the probe from the module."""
        self.hook.probe = None
        module = self.hook.module
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]


def probe_forward(module: nn.Module) -> None:
    """If another tool replaced a module's forward, check at the next call whether the new forward runs the adapter.

    Each new forward is checked once.
    """
    hook: ForwardHook = module.__dict__[HOOK]
    standing = module.__dict__.get("forward")
    if getattr(standing, "__self__", None) is not hook and standing is not hook.known and hook.probe is None:
        ForwardProbe(hook, standing)


# Record which weights a forward reads, and which modules it calls.


PARAMETERS = "_parameters"
"""The attribute of a module that holds its parameters."""


class Hook(Protocol):
    """The attributes of a `ForwardHook` that this file uses.

    `calls` counts the calls of the hook. `traced` is True if compiled code calls the hook's module.
    """

    module: nn.Module
    parts: list[Part]
    calls: int
    traced: bool


class WatchedParameters(dict[str, "nn.Parameter | None"]):
    """The parameters of a module with an adapter, in a dictionary that records reads.

    Attributes:
        hook: the module's hook.
        names: the names of the parameters that the adapters change. Reads of other parameters are not recorded.
    """

    hook: Hook
    names: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> nn.Parameter | None:
        if not torch.compiler.is_compiling():
            calls = _LOCAL.calls
            if calls is not None and name in self.names:
                calls.read(self.hook, name)
        return dict.__getitem__(self, name)


def watch_reads(hook: Hook) -> None:
    """Record reads of the parameters that a module's adapters change.

    Embeddings are not watched, because other code often reads their weights. Some models compute their logits with
    `embedding.weight`. An adapter of the embedding is not meant to change these logits, and PEFT does not change them
    either.
    """
    attributes = hook.module.__dict__
    # Replace only plain dictionaries: the dictionary of DeepSpeed's ZeRO loads parameters on access.
    if type(attributes[PARAMETERS]) not in (dict, WatchedParameters) or isinstance(hook.module, nn.Embedding):
        return
    if type(attributes[PARAMETERS]) is dict:
        attributes[PARAMETERS] = WatchedParameters(attributes[PARAMETERS])
    attributes[PARAMETERS].hook = hook
    paths = [path for part in hook.parts for path in (part.weight, part.bias) if part.output_site is None]
    attributes[PARAMETERS].names = frozenset(path for path in paths if path and "." not in path)


def unwatch_reads(hook: Hook) -> None:
    """Restore a module's plain parameter dictionary."""
    attributes = hook.module.__dict__
    if type(attributes[PARAMETERS]) is WatchedParameters:
        attributes[PARAMETERS] = dict(attributes[PARAMETERS])


class Calls:
    """Record which weights one forward of a model reads, and which modules with adapters it calls, in one thread.

    Calls in other threads are not recorded, because they belong to other forwards.

    Args:
        hooks: the hooks of the modules with adapters.
        outer: the `Calls` object of the enclosing watched forward, or None if no watched forward encloses this one.
    """

    def __init__(self, hooks: Collection[Hook], outer: Calls | None) -> None:
        self.hooks, self.outer = hooks, outer
        self.called: set[Hook] = set()
        self.reads: list[tuple[Hook, str, str]] = []

    def read(self, hook: Hook, name: str) -> None:
        """Record that code reads a parameter.

        Nothing is recorded if this forward already called the parameter's module, or if the code does not compute with
        the parameter's values.
        """
        if hook not in self.hooks:
            if self.outer is not None:
                self.outer.read(hook, name)
            return
        if hook in self.called:
            return
        reader = _reader(sys._getframe(2))
        if reader is not None:
            self.reads.append((hook, name, reader))

    def check(self, is_own: Callable[[Hook, str], bool], warned: set[int]) -> None:
        """Check that the forward called each module whose weight it read.

        Some models bypass their own modules: Mamba's mixer multiplies by `dt_proj.weight`, and WavLM's attention passes
        the weights of its projections to a torch function. PEFT trains such models, although the adapters of these
        modules have no effect. So if the model's own code bypassed a module, this method only warns.

        Args:
            is_own: a callable that gets a hook and the full name of a function. It returns whether this function is a
                method of the module that contains the hook's module.
            warned: the ids of the hooks that earlier warnings named. The method does not warn about these hooks again.
                If it warns about another hook, it adds the id of that hook to `warned`.

        Raises:
            Unsupported: another tool's function read the weight of a module that was not called.
        """
        for hook, name, reader in self.reads:
            if hook in self.called or not hook.parts:
                continue
            why = f"{reader} computed with the module's {name} but did not call the module, so its adapter did not act"
            where = str(hook.parts[0].target)
            if not is_own(hook, reader):
                raise Unsupported(why, where=where, cure=_UNFUSE)
            if id(hook) not in warned:
                warned.add(id(hook))
                again = "The adapter has no effect here in PEFT's models either; it has an effect only after a merge"
                warnings.warn(f"{where}: {why}. {again}", stacklevel=2)


class _LocalCalls(threading.local):
    """The `Calls` of the innermost watched forward that is running in the current thread."""

    calls: Calls | None = None


_LOCAL = _LocalCalls()


def begin_calls(hooks: Collection[Hook]) -> None:
    """Start watching one forward of a model."""
    _LOCAL.calls = Calls(hooks, _LOCAL.calls)


def note_call(hook: Hook) -> None:
    """Record a call of the hook's module in all watched forwards that are running in this thread."""
    calls = _LOCAL.calls
    while calls is not None:
        calls.called.add(hook)
        calls = calls.outer


def end_calls(hooks: Collection[Hook], failed: bool, is_own: Callable[[Hook, str], bool], warned: set[int]) -> None:
    """Stop watching the forward that `begin_calls(hooks)` started to watch, and check the recorded reads and calls.

    Args:
        hooks: the same object that `begin_calls` got.
        failed: whether the forward raised an exception; if so, nothing is checked.
        is_own: see `Calls.check`.
        warned: see `Calls.check`.

    Raises:
        Unsupported: another tool's function read the weight of a module that was not called.
    """
    calls = _LOCAL.calls
    while calls is not None and calls.hooks is not hooks:  # Skip records of inner forwards that raised an error.
        calls = calls.outer
    if calls is None:
        return
    _LOCAL.calls = calls.outer
    if not failed:
        calls.check(is_own, warned)


def _reader(frame: FrameType | None) -> str | None:
    """Return the full name of the function that reads a parameter.

    Return None if the function does not compute with the parameter's values. Also return None for functions of
    adapterkit, torch and accelerate. For example, torch moves and gathers parameters, and accelerate loads the
    parameters of modules that may never be called.
    """
    while frame is not None and frame.f_code.co_name == "__getattr__":
        frame = frame.f_back
    if frame is None:
        return None
    home = str(frame.f_globals.get("__name__", ""))
    # torch 2.11's compiler evaluates strings such as `self._parameters['bias']` with globals that lack `__name__`. So
    # use the caller's globals to recognise torch.
    caller = frame.f_back if not home else None
    mover = str(caller.f_globals.get("__name__", "")) if caller is not None else home
    if mover.split(".")[0] in _MOVERS or _asks_only(frame.f_code, frame.f_lasti):
        return None
    return f"{home}.{frame.f_code.co_qualname}"


_MOVERS = ("torch", "accelerate", __name__.split(".")[0])


@cache
def _asks_only(code: CodeType, at: int) -> bool:
    """Whether the instruction after offset `at` reads an attribute in `_FACTS`, or compares the tensor with None."""
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
"""Attributes of a tensor that do not depend on its values. T5, for example, reads `self.wo.weight.dtype` before it
calls `wo`."""


def warn_of_untraced(around: Sequence[tuple[nn.Module, Sequence[nn.Module]]], warned: set[int]) -> None:
    """Warn about modules that have an adapter, but are not called by compiled code.

    Args:
        around: pairs (block, modules): the compiled code calls the block, which should call these modules.
        warned: the ids of the hooks that earlier warnings named. The function does not warn about these hooks again. If
            it warns about another hook, it adds the id of that hook to `warned`.
    """
    for block, modules in around:
        hooks = [module.__dict__[HOOK] for module in modules if HOOK in module.__dict__]
        lost = [hook for hook in hooks if hook.parts and not hook.traced and not hook.calls and id(hook) not in warned]
        warned |= {id(hook) for hook in lost}
        if lost:
            names = ", ".join(dict.fromkeys(str(part.target) for hook in lost for part in hook.parts))
            warnings.warn(
                f"compiled code runs a {type(block).__name__} that calls none of {names}: if the block computes with "
                f"the weights of these modules, their adapters do not act. {_UNFUSE}",
                stacklevel=2,
            )


class BypassBlock:
    """Notice when another tool replaces the forward of a module that contains modules with adapters.

    Args:
        module: the outer module.
        hooks: the hooks of those inner modules that have an adapter.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        self.module, self.hooks = module, list(hooks)
        self.met = self._forward()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "met": None}

    def _forward(self) -> tuple[object, object]:
        return self.module.__dict__.get("forward"), type(self.module).forward

    def look(self) -> None:
        """If the module's forward was replaced since the previous call of `look`, watch the module's next call."""
        now = self._forward()
        if self.met is None:
            self.met = now
        if now[0] is not self.met[0] or now[1] is not self.met[1]:
            self.met = now
            _BlockProbe(self)


class _BlockProbe:
    """Check at a block's next call whether its new forward calls any module with an adapter."""

    def __init__(self, block: BypassBlock) -> None:
        self.block, self.counts = block, list[int]()
        module = block.module
        self.handles = [module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end)]

    def begin(self, *_: object) -> None:
        """Before the block runs, store how often each hook has been called."""
        self.counts = [hook.calls for hook in self.block.hooks]

    def end(self, module: nn.Module, *_: object) -> None:
        """Warn if the block called none of the hooks."""
        if torch.compiler.is_compiling():
            return
        for handle in self.handles:
            handle.remove()
        standing = [hook for hook in self.block.hooks if hook.parts]
        if standing and self.counts == [hook.calls for hook in self.block.hooks]:
            names = ", ".join(dict.fromkeys(str(part.target) for hook in standing for part in hook.parts))
            warnings.warn(
                f"another tool replaced the forward of a {type(module).__name__} with one that calls none of {names}: "
                f"their adapters do not act. {_UNFUSE}",
                stacklevel=2,
            )


_UNFUSE = (
    "Switch the fused kernel off, call handle.merge_() before the model runs, or leave the module out of the "
    "adapter's targets"
)

"""Detect a forward that another tool put on a module and that bypasses the module's adapter.

A tool that patches `module.forward` (accelerate, diffusers, loggers) usually calls the previous forward. But trainers
with an fp8 base install a forward that computes with the weight itself, so the adapter would silently not act.
Inspecting the module does not show which case applies; a call shows it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from torch import nn

from ..errors import Unsupported
from .parts import HOOK

if TYPE_CHECKING:
    from .forward_hook import ForwardHook


class ForwardProbe:
    """At the module's next call, check whether another tool's forward calls the hook that this forward replaced.

    Args:
        hook: the hook.
        standing: the other tool's forward.
    """

    def __init__(self, hook: ForwardHook, standing: object) -> None:
        self.hook, self.standing = hook, standing
        self.met: set[int] = set()  # The ids of threads in which the hook ran.
        hook.probe = self
        hook.module.register_forward_pre_hook(self.begin)
        hook.module.register_forward_hook(self.end)

    def begin(self, *_: object) -> None:
        """Reset the check for this thread."""
        self.met.discard(threading.get_ident())

    def meet(self) -> None:
        """Record that the hook runs."""
        self.met.add(threading.get_ident())

    def end(self, module: nn.Module, *_: object) -> None:
        """Check that the hook ran.

        Raises:
            Unsupported: the hook did not run.
        """
        if threading.get_ident() not in self.met:
            why = f"another tool put a forward on a {type(module).__name__} that bypasses the adapter"
            cure = "Let it call the previous forward, or inject the adapter afterwards"
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
    """Check, at a module's next call, whether its forward still reaches the adapter; once for each new forward."""
    hook: ForwardHook = module.__dict__[HOOK]
    standing = module.__dict__.get("forward")
    if getattr(standing, "__self__", None) is not hook and standing is not hook.known and hook.probe is None:
        ForwardProbe(hook, standing)

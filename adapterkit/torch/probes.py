"""Notice a forward that another tool put on a module and that goes past its adapter.

A tool that patches `module.forward` mostly calls what stood there: accelerate, diffusers, loggers. Trainers with a base
in fp8 put one there that computes with the weight itself, and the adapter would be gone without a word. No look at the
module tells the two apart; a call does.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import Unsupported
from .parts import HOOK

if TYPE_CHECKING:
    from .forward_hook import ForwardHook


class ForwardProbe:
    """Sees at the module's next call whether another tool's forward, in the place of a hook's, calls the hook.

    Args:
        hook: the hook.
        standing: the other forward.
    """

    def __init__(self, hook: ForwardHook, standing: Any) -> None:
        self.hook, self.standing = hook, standing
        self.met: set[int] = set()  # Threads.
        hook.probe = self
        hook.module.register_forward_pre_hook(self.begin)
        hook.module.register_forward_hook(self.end)

    def begin(self, *_: Any) -> None:
        """Forget what this thread did before."""
        self.met.discard(threading.get_ident())

    def meet(self) -> None:
        """Note that the hook runs."""
        self.met.add(threading.get_ident())

    def end(self, module: nn.Module, *_: Any) -> None:
        """Look whether the hook ran.

        Raises:
            Unsupported: it did not.
        """
        if threading.get_ident() not in self.met:
            why = f"another tool has put a forward on a {type(module).__name__} that goes past its adapter"
            cure = "Let it call the forward that stood there, or inject the adapter afterwards"
            raise Unsupported(why, where=str(self.hook.parts[0].target) if self.hook.parts else None, cure=cure)
        self.hook.known = self.standing
        self.stop()

    def stop(self) -> None:
        """Take it off the module."""
        self.hook.probe = None
        module = self.hook.module
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]


def probe_forward(module: nn.Module) -> None:
    """Look at the next call of a module with an adapter, whether it reaches the adapter; once for each forward."""
    hook: ForwardHook = module.__dict__[HOOK]
    standing = module.__dict__.get("forward")
    if getattr(standing, "__self__", None) is not hook and standing is not hook.known and hook.probe is None:
        ForwardProbe(hook, standing)

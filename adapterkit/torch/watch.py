"""Notice at the next forward that another tool took an adapter's module out of the model.

`quantize_dynamic`, `replace_module` functions and attention fusers put a new module in the place of one that carries an
adapter. The new one runs without it, and nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import Unsupported

Place = tuple[nn.Module, str, nn.Module]
"""(parent, name of the child, the module with an adapter)."""


class Watch:
    """A forward pre-hook of the model that compares the modules of one adapter with those in the tree.

    The check costs one dictionary lookup a module. Compiled code skips it: its guards do the same.

    Args:
        model: the model.
        name: the adapter's name, for the error.
        modules: those that carry its updates.
    """

    def __init__(self, model: nn.Module, name: str, modules: Iterable[nn.Module]) -> None:
        self.model, self.name, self.modules = model, name, list(modules)
        self._places = self._find()
        model.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.check()

    def check(self) -> None:
        """Raise if a module is no longer where it was.

        Raises:
            Unsupported: a module was replaced, or is not called any more because its block was fused.
        """
        if any(parent._modules.get(name) is not module for parent, name, module in self._places):
            # A wrapper around the module, such as torch's CheckpointWrapper, moves it and still calls it.
            self._places = self._find()
        for parent, name, _ in self._places:
            # diffusers' fuse_qkv_projections adds one projection and keeps the old ones, which nothing calls then.
            if parent.__dict__.get("fused_projections") and name.rpartition("_")[2] in ("q", "k", "v", "kv"):
                self._raise(parent, f"{name}: its block runs fused projections instead")

    def remove(self) -> None:
        """Take the hook off the model."""
        hooks = self.model._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]

    def _find(self) -> list[Place]:
        wanted = {id(module): module for module in self.modules if module is not self.model}
        found = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if child is not None and id(child) in wanted
        ]
        present = {id(child) for _, _, child in found}
        lost = next((module for key, module in wanted.items() if key not in present), None)
        if lost is not None:
            self._raise(lost, f"a {type(lost).__name__} with an update of it is no longer in the model")
        return found

    def _raise(self, module: nn.Module, why: str) -> None:
        where = next((name for name, each in self.model.named_modules() if each is module), None)
        cure = "Call handle.remove() before modules are replaced or fused, and inject the adapter again afterwards"
        raise Unsupported(f"the adapter {self.name!r} does not act any more: {why}", where=where, cure=cure)

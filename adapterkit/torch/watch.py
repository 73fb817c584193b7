"""Notice at the next forward that another tool took an adapter's module out of the model.

`quantize_dynamic`, `replace_module` functions and attention fusers put a new module in the place of one that carries an
adapter. The new one runs without it, and nothing else would say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import Unsupported
from .leaves import Leaf
from .sharding import check_averaged

Place = tuple[nn.Module, str, nn.Module]
"""(parent, name of the child, the module with an adapter)."""


class Watch:
    """A forward pre-hook of the model that compares the modules of one adapter with those in the tree.

    The check costs one dictionary lookup a module. Compiled code skips it: its guards do the same.

    Args:
        model: the model.
        name: the adapter's name, for the error.
        modules: those that carry its updates.
        leaves: its tensors.
    """

    def __init__(self, model: nn.Module, name: str, modules: Iterable[nn.Module], leaves: Sequence[Leaf] = ()) -> None:
        self.model, self.name, self.modules, self.leaves = model, name, list(modules), leaves
        self._places = self._find()
        model.register_forward_pre_hook(self)
        # torch's fused encoder layer reads parameters past the modules that hold them, unless one has a hook.
        wanted = {id(module) for module in self.modules}
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in wanted for m in module.modules()):
                module.register_forward_pre_hook(_no_fused_path)

    def __call__(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.check()
            check_averaged((leaf.tensor for leaf in self.leaves), self.name)

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
        for module in self.model.modules():
            layer = isinstance(module, nn.TransformerEncoderLayer)
            if layer or module is self.model:
                hooks = module._forward_pre_hooks
                ours = [key for key, hook in hooks.items() if hook is self]
                # Of several adapters each has put one there.
                ours += [key for key, hook in hooks.items() if hook is _no_fused_path][:1] if layer else []
                for key in ours:
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


def _no_fused_path(_: nn.Module, args: Any) -> None:
    """A forward pre-hook whose presence keeps torch from its fused path.

    Raises:
        Unsupported: nn.TransformerEncoder made a nested tensor, which only the fused path reads.
    """
    if args and isinstance(args[0], torch.Tensor) and args[0].is_nested:
        cure = "Call torch.backends.mha.set_fastpath_enabled(False), or build it with enable_nested_tensor=False"
        raise Unsupported("an nn.TransformerEncoder that packs its input for the fused path", cure=cure)

"""Keep an adapter's values when the module that holds them is converted or emptied.

`model.to()`, `half()`, `to_empty()` and similar methods all call `nn.Module._apply`, which runs one function over each
tensor of a module. Two of these functions would destroy an adapter without an error:

* `to_empty()` replaces every tensor with uninitialised memory. Users then load the base's state dict, which has no
  tensor of the adapter.
* Casting to an 8-bit storage type (diffusers' `enable_layerwise_casting`, `model.to(torch.float8_e4m3fn)`) rounds the
  adapter to three bits of mantissa, and layerwise casting does so after every forward.

So each module that holds an adapter's tensors gets its own `_apply`, as an attribute of the instance. This `_apply`
moves the adapter's tensors to the new device and keeps their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Unsupported

APPLY = "_apply"
"""The method of a module that all conversions call."""


class Conversion:
    """The `_apply` of a module that holds an adapter's tensors.

    Args:
        module: the module.
        is_leaf: a function that returns whether a parameter or buffer of this name belongs to an adapter.
    """

    def __init__(self, module: nn.Module, is_leaf: Callable[[str], bool]) -> None:
        self.module, self.is_leaf = module, is_leaf
        self.before = module.__dict__.get(APPLY)

    def __call__(self, function: Callable[[Tensor], Tensor], *args: object, **kwargs: object) -> nn.Module:
        """Convert the module's tensors, as `nn.Module._apply` does.

        Raises:
            Unsupported: `to_empty()` was called, and the adapter's tensors are on the meta device, so their values are
            lost.
        """
        module: Any = self.module
        named = [*module._parameters.items(), *module._buffers.items()]
        leaves = [(name, tensor) for name, tensor in named if tensor is not None and self.is_leaf(name)]
        empties = getattr(function, "__qualname__", "").startswith("Module.to_empty.")
        lost = next((name for name, tensor in leaves if tensor.is_meta), None)
        if empties and lost is not None:
            why = "to_empty() on a model whose adapter is on the meta device loses the adapter's values"
            cure = "Call handle.remove() before the model goes to meta, and inject the adapter after loading"
            raise Unsupported(why, where=lost, cure=cure)
        casts = casts_layerwise(module)
        kept = {id(each) for _, tensor in leaves for each in (tensor, tensor.grad) if each is not None}

        def converted(tensor: Tensor) -> Tensor:
            made = function(tensor)
            if id(tensor) not in kept:
                return made
            narrow = tensor.is_floating_point() and made.dtype != tensor.dtype and (casts or made.dtype.itemsize < 2)
            return tensor.detach().to(made.device) if empties or narrow else made

        run: Any = self.before or type(module)._apply.__get__(module)
        done: nn.Module = run(converted, *args, **kwargs)
        return done


def guard(module: nn.Module, is_leaf: Callable[[str], bool]) -> None:
    """Keep the values of the adapters' tensors in a module from now on."""
    if not isinstance(module.__dict__.get(APPLY), Conversion):
        module.__dict__[APPLY] = Conversion(module, is_leaf)


def unguard(module: nn.Module) -> None:
    """Restore a module's previous `_apply`."""
    standing = module.__dict__.get(APPLY)
    if isinstance(standing, Conversion):
        del module.__dict__[APPLY]
        if standing.before is not None:
            module.__dict__[APPLY] = standing.before


def casts_layerwise(module: nn.Module) -> bool:
    """Whether diffusers casts the module's weights before and after each forward."""
    return compute_dtype(module) is not None


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """Return the dtype to which diffusers casts the module's weights for each forward, or None without such casts."""
    hooks = module.__dict__.get("_diffusers_hook")
    found: torch.dtype | None = getattr(hooks and hooks.get_hook("layerwise_casting"), "compute_dtype", None)
    return found

"""Keep an adapter's numbers when the module that holds them is converted or emptied.

`model.to()`, `half()`, `to_empty()` and their like all end in `nn.Module._apply`, which runs one function over each
tensor of a module. Two of these functions would lose an adapter without a word:

* `to_empty()` replaces every tensor by uninitialised memory. People then load the base's state dict, which has no
  tensor of the adapter.
* Casting to a storage type of 8 bits (diffusers' `enable_layerwise_casting`, `model.to(torch.float8_e4m3fn)`) rounds
  the adapter to three bits of mantissa, and layerwise casting does so after every forward.

So each module that holds tensors of an adapter has an `_apply` of its own, as an attribute of the instance. It moves
them to the new device and leaves their numbers as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import Unsupported

APPLY = "_apply"
"""The method of a module that all conversions end in."""


class Conversion:
    """The `_apply` of a module that holds tensors of an adapter.

    Args:
        module: the module.
        is_leaf: whether a parameter or buffer of a name belongs to an adapter.
    """

    def __init__(self, module: nn.Module, is_leaf: Callable[[str], bool]) -> None:
        self.module, self.is_leaf = module, is_leaf
        self.before = module.__dict__.get(APPLY)

    def __call__(self, function: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Convert the module's tensors, as `nn.Module._apply`.

        Raises:
            Unsupported: `to_empty()`, and the adapter's tensors are on the meta device: their numbers are lost.
        """
        module: Any = self.module
        named = [*module._parameters.items(), *module._buffers.items()]
        leaves = [(name, tensor) for name, tensor in named if tensor is not None and self.is_leaf(name)]
        empties = getattr(function, "__qualname__", "").startswith("Module.to_empty.")
        lost = next((name for name, tensor in leaves if tensor.is_meta), None)
        if empties and lost is not None:
            why = "to_empty() of a model whose adapter is on the meta device: its numbers are lost"
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
    """Keep the numbers of the adapters' tensors in a module from now on."""
    if not isinstance(module.__dict__.get(APPLY), Conversion):
        module.__dict__[APPLY] = Conversion(module, is_leaf)


def unguard(module: nn.Module) -> None:
    """Give a module back the `_apply` that it had."""
    standing = module.__dict__.get(APPLY)
    if isinstance(standing, Conversion):
        del module.__dict__[APPLY]
        if standing.before is not None:
            module.__dict__[APPLY] = standing.before


def casts_layerwise(module: nn.Module) -> bool:
    """Whether diffusers casts the module's weights before and after each forward."""
    return compute_dtype(module) is not None


def compute_dtype(module: nn.Module) -> Any:
    """Return the dtype that diffusers casts the module's weights to for each forward; None where it does not."""
    hooks = module.__dict__.get("_diffusers_hook")
    return getattr(hooks and hooks.get_hook("layerwise_casting"), "compute_dtype", None)

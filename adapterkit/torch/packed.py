"""Weights that a library keeps in a form of its own, in live modules: what they stand for, by the library itself.

bitsandbytes, torchao, optimum-quanto, HQQ, GPTQ and AWQ all have linear layers with `in_features` and `out_features`.
Such a layer runs as it is and updates are added beside it. No table of libraries is needed for that; what tells a
packed layer is one of these:

* its weight is a tensor of a class with a `dequantize` of its own (torchao, and quanto once it is frozen);
* it has a `qweight`: GPTQ and AWQ as a buffer, quanto as a property (unfrozen layers of quanto keep a float weight and
  quantize it in each forward, so that a changed weight would lose most of a small change);
* its class has a method `dequantize` (HQQ);
* it is a layer of bitsandbytes whose weight is not of floating point.

Updates that need the weight ask the tensor or the module for it. GPTQ's and AWQ's modules have no common method for
that: the rows of an identity matrix, sent through the layer, give the weight that the layer computes with.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is in a form of its library's own."""
    kind: Any = type(module)
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    if _of_bitsandbytes(module):
        W: Any = module.weight
        return not isinstance(W, Tensor) or not W.is_floating_point()
    if "qweight" in module._buffers or "qweight" in module._parameters or hasattr(kind, "qweight"):
        return True
    # Modules of torch.jit have a mapping without `get`.
    own = module._parameters["weight"] if "weight" in module._parameters else None  # noqa: SIM401
    return callable(getattr(kind, "dequantize", None)) or _unpacks(own)


def dequantized(module: nn.Module) -> Tensor:
    """The weight `[out, in]` that a packed module stands for."""
    if _of_bitsandbytes(module):
        return _by_bitsandbytes(module)
    for name in ("weight", "qweight"):
        W: Any = getattr(module, name, None)
        if _unpacks(W):
            out: Tensor = W.dequantize()
            return out
    plain: Any = getattr(module, "weight", None)
    if isinstance(plain, nn.Parameter) and plain.is_floating_point():
        whole: Tensor = plain.detach()
        return whole
    return _by_identity(module)


def device_of(module: nn.Module) -> torch.device:
    """Where a packed module computes."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    found = next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)
    W: Any = getattr(module, "W_q", None) if found is None else None
    return W.device if found is None and W is not None else found or torch.device("cpu")


def _unpacks(W: Any) -> bool:
    """Whether a tensor is of a class with a `dequantize` of its own."""
    kind: Any = type(W)
    return isinstance(W, Tensor) and kind.dequantize is not Tensor.dequantize


def _of_bitsandbytes(module: nn.Module) -> bool:
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "bitsandbytes"]
    return bool(kinds) and kinds[-1].__name__ in ("Linear4bit", "Linear8bitLt")


def _by_bitsandbytes(module: Any) -> Tensor:
    library: Any = importlib.import_module("bitsandbytes.functional")
    W = module.weight
    state: Any = getattr(W, "quant_state", None)
    if state is not None:
        out: Tensor = library.dequantize_4bit(W.data, state)
        return out
    held: Any = module.state if getattr(module.state, "CB", None) is not None else W
    dense: Tensor = library.int8_vectorwise_dequant(held.CB, held.SCB)
    return dense


@torch.no_grad()
def _by_identity(module: Any) -> Tensor:
    if callable(getattr(type(module), "dequantize", None)):
        out: Tensor = module.dequantize()
        return out.reshape(module.out_features, module.in_features)
    station = module.__dict__.get("_adapterkit_station")  # Without what is attached.
    forward = module.forward if station is None else station.original
    scales = [t for t in (*module._parameters.values(), *module._buffers.values()) if isinstance(t, Tensor)]
    dtype = next((t.dtype for t in scales if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
    rows = torch.eye(module.in_features, dtype=dtype, device=device_of(module))
    seen: Tensor = forward(rows) - forward(torch.zeros_like(rows[:1]))
    return seen.mT

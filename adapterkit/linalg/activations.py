"""Activation functions by name, for the arrays of any library: `ACTIVATIONS["gelu"](x)`.

The names are those that transformers and AdapterHub write into configs, so several names can mean one function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from .namespace import namespace

Activation = Callable[[Any], Any]
"""A function x -> f(x), applied to each element."""


def layer_norm(x: Any, weight: Any, bias: Any, axis: int = -1, eps: float = 1e-5) -> Any:
    """Apply layer normalisation along one axis.  Ba et al. 2016, https://arxiv.org/abs/1607.06450"""
    xp = namespace(x)
    x = xp.moveaxis(x, axis, -1)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    return xp.moveaxis(centred / (variance + eps) ** 0.5 * weight + bias, -1, axis)


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + namespace(x).exp(-x))


def softmax(x: Any) -> Any:
    """Return the softmax along the last axis; an entry of -inf becomes 0."""
    xp = namespace(x)
    # Subtract the maximum, which keeps exp from overflowing and cancels out in the quotient.
    powers = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent."""
    return namespace(x).tanh(x)


def relu(x: Any) -> Any:
    """max(x, 0)."""
    return namespace(x).clip(x, 0, None)


def _linear(x: Any) -> Any:
    return x


def _erf(x: Any) -> Any:
    xp = namespace(x)
    # Use math.erf element by element if the library has no erf: numpy has none, and scipy is not a dependency.
    if hasattr(xp, "erf"):
        return xp.erf(x)
    flat = [math.erf(float(value)) for value in xp.reshape(x, (-1,))]
    return xp.reshape(xp.asarray(flat, dtype=x.dtype), x.shape)


def _gelu(x: Any) -> Any:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _gelu_10(x: Any) -> Any:
    return namespace(x).clip(_gelu(x), -10, 10)


def _quick_gelu(x: Any) -> Any:
    return x * sigmoid(1.702 * x)


def _silu(x: Any) -> Any:
    return x * sigmoid(x)


def _softplus(x: Any) -> Any:
    xp = namespace(x)
    # Use this form of log(1 + exp(x)), because the plain one overflows for large x.
    return relu(x) + xp.log1p(xp.exp(-xp.abs(x)))


def _mish(x: Any) -> Any:
    return x * tanh(_softplus(x))


def _leaky_relu(x: Any) -> Any:
    return namespace(x).where(x < 0, 0.01 * x, x)


def _elu(x: Any) -> Any:
    xp = namespace(x)
    # Clip x, because `where` evaluates both branches and expm1 overflows for large positive x.
    return xp.where(x < 0, xp.expm1(xp.clip(x, None, 0)), x)


def _relu2(x: Any) -> Any:
    return relu(x) * relu(x)


def _relu6(x: Any) -> Any:
    return namespace(x).clip(x, 0, 6)


def _laplace(x: Any) -> Any:
    # Use the rounded constants of transformers' LaplaceActivation.
    return 0.5 * (1 + _erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


ACTIVATIONS: Mapping[str, Activation] = {
    "elu": _elu,
    "gelu": _gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "laplace": _laplace,
    "leaky_relu": _leaky_relu,
    "leakyrelu": _leaky_relu,
    "linear": _linear,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": relu,
    "relu2": _relu2,
    "relu6": _relu6,
    "sigmoid": sigmoid,
    "silu": _silu,
    "softplus": _softplus,
    "swish": _silu,
    "tanh": tanh,
}
"""Activation name -> function."""

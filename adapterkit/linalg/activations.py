"""Activation functions by name: `ACTIVATIONS["gelu"](x)`. They accept arrays of any array library.

The names are taken from configs of transformers and AdapterHub, so several names can refer to the same function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Protocol

from .namespace import N, namespace


class Activation(Protocol):
    """A function x -> f(x), applied to each element."""

    def __call__(self, x: N, /) -> N: ...


def layer_norm(x: N, weight: N, bias: N | None, axis: int = -1, eps: float = 1e-5) -> N:
    """Apply layer normalisation along one axis.  Ba et al. 2016, https://arxiv.org/abs/1607.06450"""
    xp = namespace(x)
    x = xp.moveaxis(x, axis, -1)
    centred = x - xp.mean(x, axis=-1, keepdims=True)
    variance = xp.mean(centred * centred, axis=-1, keepdims=True)
    y = centred / (variance + eps) ** 0.5 * weight
    return xp.moveaxis(y if bias is None else y + bias, -1, axis)


def sigmoid(x: N) -> N:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + namespace(x).exp(-x))


def softmax(x: N) -> N:
    """Return the softmax along the last axis; an entry of -inf becomes 0."""
    xp = namespace(x)
    # Subtract the maximum, so that exp does not overflow. The subtraction cancels out in the quotient.
    powers = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def tanh(x: N) -> N:
    """Return the hyperbolic tangent."""
    return namespace(x).tanh(x)


def relu(x: N) -> N:
    """Return max(x, 0)."""
    return namespace(x).clip(x, 0, None)


def _linear(x: N) -> N:
    return x


def _erf(x: N) -> N:
    xp = namespace(x)
    # If the library has no erf, call math.erf for each element: numpy has no erf, and scipy is not a dependency.
    if hasattr(xp, "erf"):
        erf: Callable[[N], N] = xp.erf
        return erf(x)
    flat = [math.erf(float(value)) for value in xp.reshape(x, (-1,))]
    return xp.reshape(xp.asarray(flat, dtype=x.dtype), x.shape)


def _gelu(x: N) -> N:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def _gelu_tanh(x: N) -> N:
    return 0.5 * x * (1 + tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _gelu_10(x: N) -> N:
    return namespace(x).clip(_gelu(x), -10, 10)


def _quick_gelu(x: N) -> N:
    return x * sigmoid(1.702 * x)


def _silu(x: N) -> N:
    return x * sigmoid(x)


def _softplus(x: N) -> N:
    xp = namespace(x)
    # Use this form of log(1 + exp(x)), because the plain form overflows for large x.
    return relu(x) + xp.log1p(xp.exp(-xp.abs(x)))


def _mish(x: N) -> N:
    return x * tanh(_softplus(x))


def _leaky_relu(x: N) -> N:
    return namespace(x).where(x < 0, 0.01 * x, x)


def _elu(x: N) -> N:
    xp = namespace(x)
    # Clip x, because `where` evaluates both branches and expm1 overflows for large positive x.
    return xp.where(x < 0, xp.expm1(xp.clip(x, None, 0)), x)


def _relu2(x: N) -> N:
    return relu(x) * relu(x)


def _relu6(x: N) -> N:
    return namespace(x).clip(x, 0, 6)


def _laplace(x: N) -> N:
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
"""A map from each activation's name to its function."""

"""Weight normalisation: every output's, or every input's, weights get the norm that is given."""

from __future__ import annotations

from typing import Any

import numpy as np
from building import BIASED, CONV1D, CONV2D, EXPERTS, FUSED, IN_OUT, LINEAR, Case, Pair, Update, low_rank
from container import numbers
from layers import Array


def formula(W: Array, b: Array | None, out: Array | None = None, into: Array | None = None, eps: float = 0.0) -> Pair:
    """Slice by slice."""
    new = W.copy()
    for i in range(W.shape[0 if into is None else 1]):
        part = (i,) if into is None else (slice(None), i)
        given = out if into is None else into
        assert given is not None
        new[part] = given[i] * W[part] / (np.sqrt((W[part] * W[part]).sum()) + eps)
    return new, b


def cases() -> list[Case]:
    """Both axes on every layer and layout, and behind a LoRA."""
    lora = low_rank("lora", "weight_norm.lora", 3, 5)
    return [
        Case("outputs", updates=(_made("outputs", out=(3,)),), **BIASED),
        Case("inputs", updates=(_made("inputs", into=(5,)),), **BIASED),
        Case("eps", updates=(_made("eps", eps=0.25, out=(3,)),), **LINEAR),
        Case("eps_inputs", updates=(_made("eps_inputs", eps=0.25, into=(5,)),), **LINEAR),
        Case("conv1d", updates=(_made("conv1d", into=(2,)),), **CONV1D),
        Case("conv2d", updates=(_made("conv2d", out=(3,)),), **CONV2D),
        Case("conv2d_inputs", updates=(_made("conv2d_inputs", into=(2,)),), **CONV2D),
        Case("in_out", updates=(_made("in_out", into=(5,)),), **IN_OUT),
        Case("experts", updates=(_made("experts", into=(2, 5)),), **EXPERTS),
        Case("fused", updates=(_made("fused", out=(3,)),), **FUSED),
        Case("after_lora", updates=(lora, _made("after", into=(5,))), **LINEAR),
        Case("bf16", updates=(_made("bf16", out=(3,)),), dtype="BF16", **LINEAR),
    ]


def _made(seed: str, eps: float | None = None, **shapes: Any) -> Update:
    tensors = {name: numbers(f"weight_norm.{seed}.{name}", *shape, positive=True) for name, shape in shapes.items()}
    return Update("weight_norm", tensors, {} if eps is None else {"eps": eps})

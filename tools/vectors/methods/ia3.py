"""IA3: rows and bias scaled by l, or columns by l_in."""

from __future__ import annotations

from building import BIASED, CONV2D, EXPERTS, EXPERTS_IN_OUT, FUSED, IN_OUT, LINEAR, NORM, Case, Pair, update
from layers import Array


def formula(W: Array, b: Array | None, l: Array | None = None, l_in: Array | None = None) -> Pair:  # noqa: E741
    """Scales rows and bias by l, or columns by l_in."""
    W = W.copy()
    if l is not None:
        for o, scale in enumerate(l):
            W[o] *= scale
        return W, None if b is None else l * b
    for i, scale in enumerate(l_in):
        W[:, i] *= scale
    return W, b


def cases() -> list[Case]:
    """Outputs with and without a bias, inputs, every layer and layout."""
    return [
        Case("outputs", updates=(update("ia3", "ia3.outputs", l=(3,)),), **BIASED),
        Case("outputs_no_bias", updates=(update("ia3", "ia3.no_bias", l=(3,)),), **LINEAR),
        Case("inputs", updates=(update("ia3", "ia3.inputs", l_in=(5,)),), **BIASED),
        Case("conv2d_outputs", updates=(update("ia3", "ia3.conv_out", l=(3,)),), **CONV2D),
        Case("conv2d_inputs", updates=(update("ia3", "ia3.conv_in", l_in=(2,)),), **CONV2D),
        Case("in_out_outputs", updates=(update("ia3", "ia3.in_out_out", l=(3,)),), **IN_OUT),
        Case("in_out_inputs", updates=(update("ia3", "ia3.in_out_in", l_in=(5,)),), **IN_OUT),
        Case("norm", updates=(update("ia3", "ia3.norm", l=(3,)),), **NORM),
        Case("experts", updates=(update("ia3", "ia3.experts", l=(2, 3)),), **EXPERTS),
        Case("experts_in_out", updates=(update("ia3", "ia3.e_in_out", l=(2, 3)),), **EXPERTS_IN_OUT),
        Case("fused", updates=(update("ia3", "ia3.fused", l=(3,)),), **FUSED),
        Case(
            "both",
            updates=(update("ia3", "ia3.both.l", l=(3,)), update("ia3", "ia3.both.l_in", l_in=(5,))),
            **BIASED,
        ),
        Case("f16", updates=(update("ia3", "ia3.f16", l=(3,)),), dtype="F16", **BIASED),
    ]

"""Replacement: W' = weight, b' = bias."""

from __future__ import annotations

from building import BIASED, CONV2D, EXPERTS, EXPERTS_IN_OUT, FUSED, IN_OUT, LINEAR, NORM, Case, Pair, update
from layers import Array


def formula(W: Array, b: Array | None, weight: Array | None = None, bias: Array | None = None) -> Pair:
    """W' = weight, b' = bias."""
    return W if weight is None else weight, b if bias is None else bias


def cases() -> list[Case]:
    """Weight, bias, both; every layer and layout."""
    return [
        Case("weight", updates=(update("replacement", "replacement.weight", weight=(3, 5)),), **BIASED),
        Case("weight_and_bias", updates=(update("replacement", "replacement.wb", weight=(3, 5), bias=(3,)),), **BIASED),
        Case("bias", updates=(update("replacement", "replacement.bias", bias=(3,)),), **BIASED),
        Case("conv2d", updates=(update("replacement", "replacement.conv2d", weight=(3, 2, 2, 3)),), **CONV2D),
        Case("in_out", updates=(update("replacement", "replacement.in_out", weight=(3, 5)),), **IN_OUT),
        Case("norm", updates=(update("replacement", "replacement.norm", weight=(3,), bias=(3,)),), **NORM),
        Case("experts", updates=(update("replacement", "replacement.experts", weight=(2, 3, 5)),), **EXPERTS),
        Case(
            "experts_in_out",
            updates=(update("replacement", "replacement.e_in_out", weight=(2, 3, 5), bias=(2, 3)),),
            **EXPERTS_IN_OUT,
        ),
        Case("fused", updates=(update("replacement", "replacement.fused", weight=(3, 5), bias=(3,)),), **FUSED),
        Case("f16", updates=(update("replacement", "replacement.f16", weight=(3, 5)),), dtype="F16", **LINEAR),
    ]

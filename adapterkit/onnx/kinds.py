"""The kinds of layers, and which of them a node is."""

from __future__ import annotations

import onnx_ir as ir

from .convolutions import Conv, ConvTranspose, Gather
from .fused import Attention, FusedConv, FusedGemm
from .layers import Einsum, Gemm, Layer, LeftMatMul, MatMul
from .packed import FusedMatMul, MatMulInteger, MatMulNBits
from .recurrent import RECURRENT

KINDS: tuple[type[Layer], ...] = (
    MatMul, Gemm, Conv, ConvTranspose, Gather, FusedMatMul, MatMulNBits, MatMulInteger, Attention, LeftMatMul, Einsum,
    FusedGemm, FusedConv,
)  # fmt: skip
"""Kinds of layers; a node has at most one of them."""


def kinds_of(node: ir.Node) -> list[type[Layer]]:
    """Return the kinds of layers of a node: at most one, except that a recurrent node has one per weight."""
    kind = next((kind for kind in KINDS if kind.takes(node)), None)
    return [kind for kind in RECURRENT if kind.takes(node)] if kind is None else [kind]

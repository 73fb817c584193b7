"""Which cases each method's vector holds: layers, layouts, experts, row slices, every optional field, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
from vector_container import numbers
from vector_methods import (
    BIASED,
    CONV1D,
    CONV2D,
    EMBEDDING,
    EXPERTS,
    EXPERTS_IN_OUT,
    FUSED,
    FUSED_EXPERTS,
    FUSED_IN_OUT,
    IN_OUT,
    LINEAR,
    NORM,
    TRANSPOSED,
    Case,
    Update,
)


def _low_rank(seed: str, out: int, *ins: int, r: int = 2, e: int | None = None, **extra: Any) -> Update:
    """A LoRA; with `e` a stack of them."""
    lead = () if e is None else (e,)
    tensors = {"A": numbers(f"{seed}.A", *lead, r, *ins), "B": numbers(f"{seed}.B", *lead, out, r), **extra}
    return "lora", tensors, {"scaling": 0.5}


def _dora(seed: str, out: int, *ins: int, r: int = 2, e: int | None = None) -> Update:
    _, tensors, attributes = _low_rank(seed, out, *ins, r=r, e=e)
    lead = () if e is None else (e,)
    return "dora", {**tensors, "magnitude": numbers(f"{seed}.m", *lead, out, positive=True)}, attributes


def _plain(method: str, seed: str, **shapes: tuple[int, ...]) -> Update:
    return method, {field: numbers(f"{seed}.{field}", *shape) for field, shape in shapes.items()}, {}


def _dense(seed: str, scaling: float = 0.25, **shapes: tuple[int, ...]) -> Update:
    return "dense", _plain("dense", seed, **shapes)[1], {"scaling": scaling}


def _rows(seed: str, index: list[Any], out: int, dtype: str = "int64") -> Update:
    """Token rows; a list of lists makes a stack of them."""
    tokens = np.array(index, dtype)
    return "rows", {"index": tokens, "values": numbers(f"{seed}.values", *tokens.shape, out)}, {}


def lora() -> list[Case]:
    """Scalings, ranks, the bias, every layer and layout, shared factors, element types."""
    shared = numbers("lora.shared", 2, 5)
    return [
        Case("linear", updates=(_low_rank("lora.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(("lora", _low_rank("lora.default", 3, 5)[1], {}),), **LINEAR),
        Case("negative_scaling", updates=(("lora", _low_rank("lora.neg", 3, 5)[1], {"scaling": -1.5}),), **LINEAR),
        Case("rank1", updates=(_low_rank("lora.rank1", 3, 5, r=1),), **LINEAR),
        Case("wide", updates=(_low_rank("lora.wide", 3, 5, r=7),), **LINEAR),
        Case("bias", updates=(_low_rank("lora.bias", 3, 5, bias=numbers("lora.bias.b", 3)),), **BIASED),
        Case("conv1d", updates=(_low_rank("lora.conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(_low_rank("lora.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("transposed", updates=(_low_rank("lora.transposed", 3, 2, 2, 3),), **TRANSPOSED),
        Case("in_out", updates=(_low_rank("lora.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_low_rank("lora.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_low_rank("lora.experts", 3, 5, e=2),), **EXPERTS),
        Case(
            "experts_in_out",
            updates=(_low_rank("lora.experts_in_out", 3, 5, e=2, bias=numbers("lora.e.b", 2, 3)),),
            **EXPERTS_IN_OUT,
        ),
        Case("fused", updates=(_low_rank("lora.fused", 3, 5, bias=numbers("lora.fused.b", 3)),), **FUSED),
        Case("fused_in_out", updates=(_low_rank("lora.fused_in_out", 3, 5),), **FUSED_IN_OUT),
        Case("fused_experts", updates=(_low_rank("lora.fused_experts", 3, 5, e=2),), **FUSED_EXPERTS),
        Case("two", updates=(_low_rank("lora.two.a", 3, 5), _low_rank("lora.two.b", 3, 5, r=1)), **LINEAR),
        Case("shared_one", updates=(_low_rank("lora.shared.1", 3, 5, A=shared),), **LINEAR),
        Case("shared_two", updates=(_low_rank("lora.shared.2", 3, 5, A=shared),), **LINEAR),
        Case("f32", updates=(_low_rank("lora.f32", 3, 5),), dtype="F32", **LINEAR),
        Case("f16", updates=(_low_rank("lora.f16", 3, 5),), dtype="F16", **LINEAR),
        Case("bf16", updates=(_low_rank("lora.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def dora() -> list[Case]:
    """Every layer and layout, and the order of a DoRA and a LoRA on one target."""
    return [
        Case("linear", updates=(_dora("dora.linear", 3, 5),), **BIASED),
        Case("default_scaling", updates=(("dora", _dora("dora.default", 3, 5)[1], {}),), **LINEAR),
        Case("rank1", updates=(_dora("dora.rank1", 3, 5, r=1),), **LINEAR),
        Case("conv1d", updates=(_dora("dora.conv1d", 3, 2, 3),), **CONV1D),
        Case("conv2d", updates=(_dora("dora.conv2d", 3, 2, 2, 3),), **CONV2D),
        Case("in_out", updates=(_dora("dora.in_out", 3, 5),), **IN_OUT),
        Case("embedding", updates=(_dora("dora.embedding", 3, 6),), **EMBEDDING),
        Case("experts", updates=(_dora("dora.experts", 3, 5, e=2),), **EXPERTS),
        Case("experts_in_out", updates=(_dora("dora.experts_in_out", 3, 5, e=2),), **EXPERTS_IN_OUT),
        Case("fused", updates=(_dora("dora.fused", 3, 5),), **FUSED),
        Case("before_lora", updates=(_dora("dora.before", 3, 5), _low_rank("dora.before.l", 3, 5)), **LINEAR),
        Case("after_lora", updates=(_low_rank("dora.after.l", 3, 5), _dora("dora.after", 3, 5)), **LINEAR),
        Case("bf16", updates=(_dora("dora.bf16", 3, 5),), dtype="BF16", **LINEAR),
    ]


def ia3() -> list[Case]:
    """Outputs with and without a bias, inputs, every layer and layout."""
    return [
        Case("outputs", updates=(_plain("ia3", "ia3.outputs", l=(3,)),), **BIASED),
        Case("outputs_no_bias", updates=(_plain("ia3", "ia3.no_bias", l=(3,)),), **LINEAR),
        Case("inputs", updates=(_plain("ia3", "ia3.inputs", l_in=(5,)),), **BIASED),
        Case("conv2d_outputs", updates=(_plain("ia3", "ia3.conv_out", l=(3,)),), **CONV2D),
        Case("conv2d_inputs", updates=(_plain("ia3", "ia3.conv_in", l_in=(2,)),), **CONV2D),
        Case("in_out_outputs", updates=(_plain("ia3", "ia3.in_out_out", l=(3,)),), **IN_OUT),
        Case("in_out_inputs", updates=(_plain("ia3", "ia3.in_out_in", l_in=(5,)),), **IN_OUT),
        Case("norm", updates=(_plain("ia3", "ia3.norm", l=(3,)),), **NORM),
        Case("experts", updates=(_plain("ia3", "ia3.experts", l=(2, 3)),), **EXPERTS),
        Case("experts_in_out", updates=(_plain("ia3", "ia3.e_in_out", l=(2, 3)),), **EXPERTS_IN_OUT),
        Case("fused", updates=(_plain("ia3", "ia3.fused", l=(3,)),), **FUSED),
        Case(
            "both",
            updates=(_plain("ia3", "ia3.both.l", l=(3,)), _plain("ia3", "ia3.both.l_in", l_in=(5,))),
            **BIASED,
        ),
        Case("f16", updates=(_plain("ia3", "ia3.f16", l=(3,)),), dtype="F16", **BIASED),
    ]


def dense() -> list[Case]:
    """Weight, bias, both; every layer and layout."""
    return [
        Case("weight", updates=(_dense("dense.weight", D=(3, 5)),), **BIASED),
        Case("default_scaling", updates=(_plain("dense", "dense.default", D=(3, 5)),), **LINEAR),
        Case("weight_and_bias", updates=(_dense("dense.wb", D=(3, 5), d=(3,)),), **BIASED),
        Case("bias", updates=(_dense("dense.bias", d=(3,)),), **BIASED),
        Case("conv2d", updates=(_dense("dense.conv2d", D=(3, 2, 2, 3), d=(3,)),), **CONV2D),
        Case("transposed", updates=(_dense("dense.transposed", D=(3, 2, 2, 3)),), **TRANSPOSED),
        Case("in_out", updates=(_dense("dense.in_out", D=(3, 5), d=(3,)),), **IN_OUT),
        Case("norm", updates=(_dense("dense.norm", D=(3,), d=(3,)),), **NORM),
        Case("experts", updates=(_dense("dense.experts", D=(2, 3, 5)),), **EXPERTS),
        Case("experts_in_out", updates=(_dense("dense.e_in_out", D=(2, 3, 5), d=(2, 3)),), **EXPERTS_IN_OUT),
        Case("fused", updates=(_dense("dense.fused", D=(3, 5), d=(3,)),), **FUSED),
        Case("bf16", updates=(_dense("dense.bf16", D=(3, 5)),), dtype="BF16", **LINEAR),
    ]


def replacement() -> list[Case]:
    """Weight, bias, both; every layer and layout."""
    return [
        Case("weight", updates=(_plain("replacement", "replacement.weight", weight=(3, 5)),), **BIASED),
        Case("weight_and_bias", updates=(_plain("replacement", "replacement.wb", weight=(3, 5), bias=(3,)),), **BIASED),
        Case("bias", updates=(_plain("replacement", "replacement.bias", bias=(3,)),), **BIASED),
        Case("conv2d", updates=(_plain("replacement", "replacement.conv2d", weight=(3, 2, 2, 3)),), **CONV2D),
        Case("in_out", updates=(_plain("replacement", "replacement.in_out", weight=(3, 5)),), **IN_OUT),
        Case("norm", updates=(_plain("replacement", "replacement.norm", weight=(3,), bias=(3,)),), **NORM),
        Case("experts", updates=(_plain("replacement", "replacement.experts", weight=(2, 3, 5)),), **EXPERTS),
        Case(
            "experts_in_out",
            updates=(_plain("replacement", "replacement.e_in_out", weight=(2, 3, 5), bias=(2, 3)),),
            **EXPERTS_IN_OUT,
        ),
        Case("fused", updates=(_plain("replacement", "replacement.fused", weight=(3, 5), bias=(3,)),), **FUSED),
        Case("f16", updates=(_plain("replacement", "replacement.f16", weight=(3, 5)),), dtype="F16", **LINEAR),
    ]


def rows() -> list[Case]:
    """Embeddings and other weights, types of index, the order of rows and a LoRA on one target."""
    return [
        Case("embedding", updates=(_rows("rows.embedding", [1, 4], 3),), **EMBEDDING),
        Case("one", updates=(_rows("rows.one", [3], 3),), **EMBEDDING),
        Case("all_backwards", updates=(_rows("rows.all", [5, 4, 3, 2, 1, 0], 3),), **EMBEDDING),
        Case("int32", updates=(_rows("rows.int32", [0, 5], 3, "int32"),), **EMBEDDING),
        Case("linear", updates=(_rows("rows.linear", [4, 0], 3),), **BIASED),
        Case("experts", updates=(_rows("rows.experts", [[4, 0], [1, 2]], 3),), **EXPERTS),
        Case("after_lora", updates=(_low_rank("rows.lora", 3, 6), _rows("rows.after", [1, 2], 3)), **EMBEDDING),
        Case("before_lora", updates=(_rows("rows.before", [1, 2], 3), _low_rank("rows.lora2", 3, 6)), **EMBEDDING),
        Case("bf16", updates=(_rows("rows.bf16", [1, 4], 3),), dtype="BF16", **EMBEDDING),
    ]


CASES = {"dense": dense, "dora": dora, "ia3": ia3, "lora": lora, "replacement": replacement, "rows": rows}

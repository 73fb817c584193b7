"""Megatron-Bridge: a state dict; alpha in megatron.json. Layout: lora.py and canonical_lora.py of its peft package."""

from __future__ import annotations

import json

from container import layout, pack
from fused import gate_up, qkv, wanted
from sample import Sample, f32, pair

PREFIX = "decoder.layers."


def samples() -> dict[str, Sample]:
    """Fused weights, and canonical LoRA."""
    return {"fused": _fused(), "canonical": _canonical()}


def _fused() -> Sample:
    A, B, attention = qkv("megatron.qkv", 0, 2.0)
    C, D, mlp = gate_up("megatron.fc1", 1, 2.0)
    E, F = pair("megatron.fc2", 16, 24)
    factors = {
        "0.self_attention.linear_qkv": (A, B), "1.mlp.linear_fc1": (C, D), "1.mlp.linear_fc2": (E, F),
    }  # fmt: skip
    keys = {
        f"{PREFIX}{module}.adapter.{end}.weight": f32(factor)
        for module, both in factors.items()
        for end, factor in zip(("linear_in", "linear_out"), both, strict=True)
    }
    return Sample(_files(keys, 4), [*attention, *mlp, wanted("1.mlp.down_proj", E, F, 2.0)])


def _canonical() -> Sample:
    keys, updates = {}, []
    for part, module, out in (("q", "self_attn.q_proj", 16), ("v", "self_attn.v_proj", 8)):
        A, B = pair(f"megatron.{part}", out, 16)
        stem = f"{PREFIX}0.self_attention.linear_qkv.adapter.adapter_{part}"
        keys |= {f"{stem}.linear_in.weight": f32(A), f"{stem}.linear_out.weight": f32(B)}
        updates.append(wanted(f"0.{module}", A, B, 1.5))
    return Sample(_files(keys, 3), updates)


def _files(keys: dict[str, object], alpha: float) -> dict[str, bytes]:
    settings = json.dumps({"alpha": alpha}).encode()
    return {"adapter.safetensors": pack(*layout(keys)), "megatron.json": settings}  # type: ignore[arg-type]

"""Experts that share their outer factors. Layout: SGLang #21466 (lora/mem_pool.py), Megatron-Bridge #5588 and #6076."""

from __future__ import annotations

import json

from container import layout, numbers, pack
from fused import wanted
from sample import Sample, f32

STEM = "base_model.model.model.layers.0.mlp.experts"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["gate_proj", "down_proj"], "bias": "none"}


def samples() -> dict[str, Sample]:
    """Three experts that share A of gate and B of down: with stacks beside, and with one matrix an expert beside."""
    A, B = numbers("outer.gate.A", 1, 2, 16), numbers("outer.gate.B", 3, 24, 2)
    C, D = numbers("outer.down.A", 3, 2, 24), numbers("outer.down.B", 1, 16, 2)
    shared = {f"{STEM}.gate_proj.lora_A.weight": f32(A), f"{STEM}.down_proj.lora_B.weight": f32(D)}
    stacks = {f"{STEM}.gate_proj.lora_B.weight": f32(B), f"{STEM}.down_proj.lora_A.weight": f32(C)}
    single = {f"{STEM}.{n}.gate_proj.lora_B.weight": f32(B[n]) for n in range(3)}
    single |= {f"{STEM}.{n}.down_proj.lora_A.weight": f32(C[n]) for n in range(3)}
    expected = [wanted(f"0.mlp.experts.{n}.gate_proj", A[0], B[n], 4.0) for n in range(3)]
    expected += [wanted(f"0.mlp.experts.{n}.down_proj", C[n], D[0], 4.0) for n in range(3)]
    config = json.dumps(CONFIG, indent=2, sort_keys=True).encode()
    return {
        name: Sample({"adapter_config.json": config, "adapter_model.safetensors": pack(*layout(keys))}, expected)
        for name, keys in (("stacks", shared | stacks), ("numbered", shared | single))
    }

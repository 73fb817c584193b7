"""Tinker: PEFT's folder with a head and stacks of its own names. Layout: tinker_cookbook/weights of its repository."""

from __future__ import annotations

import json

from container import layout, numbers, pack
from fused import wanted
from sample import Sample, Wanted, f32, pair

PREFIX = "base_model.model.model."


def samples() -> dict[str, Sample]:
    """The head, and three experts that share A."""
    A, B = pair("tinker.head", 12, 16)
    C, D = numbers("tinker.w1.A", 1, 2, 16), numbers("tinker.w1.B", 3, 24, 2)
    stem = f"{PREFIX}layers.0.mlp.experts.w1"
    keys = {
        f"{PREFIX}unembed_tokens.lora_A.weight": f32(A), f"{PREFIX}unembed_tokens.lora_B.weight": f32(B),
        f"{stem}.lora_A.weight": f32(C), f"{stem}.lora_B.weight": f32(D),
    }  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": "all-linear", "bias": "none"}
    files = {
        "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
        "adapter_model.safetensors": pack(*layout(keys)),
    }
    experts = [wanted(f"0.mlp.experts.{n}.gate_proj", C[0], D[n], 4.0) for n in range(3)]
    return {"experts": Sample(files, [Wanted("lm_head", {"A": A, "B": B}, {"scaling": 4.0}), *experts])}

"""ComfyUI: the model's own names behind `diffusion_model.`. Layout: comfy/lora.py and comfy/weight_adapter."""

from __future__ import annotations

from container import layout, numbers, pack
from sample import Sample, Wanted, f32, pair


def samples() -> dict[str, Sample]:
    """Slots of its own, and those of ai-toolkit."""
    return {"flux": _flux(), "ai_toolkit": _ai_toolkit()}


def _flux() -> Sample:
    A, B = pair("comfyui.qkv", 24, 8)
    C, D = pair("comfyui.proj", 8, 8)
    E = numbers("comfyui.diff", 6, 8)
    lengths = numbers("comfyui.m", 8, positive=True)
    block = "double_blocks.0.img_attn"
    keys = {
        f"diffusion_model.{block}.qkv.alpha": f32(numbers("comfyui.three") * 0 + 3),
        f"diffusion_model.{block}.qkv.lora_down.weight": f32(A),
        f"diffusion_model.{block}.qkv.lora_up.weight": f32(B),
        f"diffusion_model.{block}.proj.dora_scale": f32(lengths.reshape(8, 1)),
        f"diffusion_model.{block}.proj.lora_down.weight": f32(C),
        f"diffusion_model.{block}.proj.lora_up.weight": f32(D),
        "diffusion_model.img_in.diff": f32(E),
    }
    updates = [
        Wanted(f"transformer.{block}.qkv", {"A": A, "B": B}, {"scaling": 1.5}),
        Wanted(f"transformer.{block}.proj", {"A": C, "B": D, "magnitude": lengths}, {"scaling": 1.0}, "dora"),
        Wanted("transformer.img_in", {"D": E}, {"scaling": 1.0}, "dense"),
    ]
    return Sample({"adapter.safetensors": pack(*layout(keys))}, updates)


def _ai_toolkit() -> Sample:
    A, B = pair("comfyui.linear1", 20, 8)
    stem = "single_blocks.3.linear1"
    keys = {f"diffusion_model.{stem}.lora_A.weight": f32(A), f"diffusion_model.{stem}.lora_B.weight": f32(B)}
    update = Wanted(f"transformer.{stem}", {"A": A, "B": B}, {"scaling": 1.0})
    return Sample({"adapter.safetensors": pack(*layout(keys))}, [update])

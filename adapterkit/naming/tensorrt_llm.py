"""TensorRT-LLM's numbers for modules with LoRA; spec/architectures/namings has their names.

Source: `LORA_MODULE_IDS` in tensorrt_llm/lora_manager.py.
"""

from __future__ import annotations

from functools import cache

from .architectures import namings_of

NUMBERS = {
    "attn_qkv": 0, "attn_q": 1, "attn_k": 2, "attn_v": 3, "attn_dense": 4, "mlp_h_to_4h": 5, "mlp_4h_to_h": 6,
    "mlp_gate": 7,
}  # fmt: skip
"""A map from TensorRT-LLM's name of a module inside a layer to its number."""


@cache
def numbers() -> dict[str, int]:
    """Map our modules inside a layer to their numbers; the module of fused queries, keys and values has one, too."""
    places = namings_of("tensorrt_llm")[0].places()
    names = {key.rpartition("{n}.")[2]: place.name.rpartition("{n}.")[2] for key, place in places.items()}
    return {own: NUMBERS[name] for own, name in {"self_attn.qkv_proj": "attn_qkv", **names}.items()}


@cache
def modules() -> dict[int, str]:
    """Map numbers to our modules inside a layer."""
    return {number: name for name, number in numbers().items()}


FUSED = "mlp.gate_up_proj"
"""A module with the same number as `mlp.gate_proj`; its outputs are stored with up before gate."""

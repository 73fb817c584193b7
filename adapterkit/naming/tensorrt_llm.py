"""Numbers that TensorRT-LLM gives to modules, and transformers' names for those of Llama's kind.

Source: `LORA_MODULE_IDS` in tensorrt_llm/lora_manager.py.
"""

from __future__ import annotations

IDS = {
    "self_attn.qkv_proj": 0, "self_attn.q_proj": 1, "self_attn.k_proj": 2, "self_attn.v_proj": 3,
    "self_attn.o_proj": 4, "mlp.gate_proj": 5, "mlp.down_proj": 6, "mlp.up_proj": 7,
}  # fmt: skip
"""Module below a layer -> number."""

FUSED = "mlp.gate_up_proj"
"""Of the number of `mlp.gate_proj`, too; its outputs are stored up before gate."""

"""Names of Megatron's layers, with the weights of transformers that are fused in them.

Sources: Megatron-Bridge's peft/lora.py and peft/canonical_lora.py; NeMo 1's adapter_mixins.py.
"""

from __future__ import annotations

import re

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""By groups of heads: for each group its queries, its key, its value."""

GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
"""Gate before up, as one rank has them."""

BRIDGE = {
    "self_attention.linear_qkv.adapter": QKV,
    "self_attention.linear_qkv.adapter.adapter_q": QKV[:1],
    "self_attention.linear_qkv.adapter.adapter_k": QKV[1:2],
    "self_attention.linear_qkv.adapter.adapter_v": QKV[2:],
    "self_attention.linear_proj.adapter": ("self_attn.o_proj",),
    "mlp.linear_fc1.adapter": GATE_UP,
    "mlp.linear_fc1.adapter.adapter_gate": GATE_UP[:1],
    "mlp.linear_fc1.adapter.adapter_up": GATE_UP[1:],
    "mlp.linear_fc2.adapter": ("mlp.down_proj",),
}
"""Megatron-Bridge and NeMo 2: module below a layer -> own modules below a layer."""

_ATTENTION, _MLP = "self_attention.adapter_layer.", "mlp.adapter_layer."
NEMO = {
    _ATTENTION + "lora_kqv_adapter": QKV,
    _ATTENTION + "lora_unfused_kqv_adapter.q_adapter": QKV[:1],
    _ATTENTION + "lora_unfused_kqv_adapter.k_adapter": QKV[1:2],
    _ATTENTION + "lora_unfused_kqv_adapter.v_adapter": QKV[2:],
    _ATTENTION + "lora_dense_attention_adapter": ("self_attn.o_proj",),
    _MLP + "lora_hto4h_adapter": GATE_UP,
    _MLP + "lora_unfused_hto4h_adapter.gate_adapter": GATE_UP[:1],
    _MLP + "lora_unfused_hto4h_adapter.up_adapter": GATE_UP[1:],
    _MLP + "lora_4htoh_adapter": ("mlp.down_proj",),
}
"""NeMo 1: the same."""

LAYER = re.compile(r"(?P<prefix>(?:\w+\.)*layers\.)(?P<n>\d{1,9})\.(?P<module>.+)")
"""A module's name: prefixes differ with the wrappers around a model."""

OWN = re.compile(r"(?:\w+\.)*layers\.(?P<n>\d{1,9})\.(?P<module>.+)")

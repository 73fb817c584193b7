"""Provide the names of Megatron's adapter modules, each with the transformers weights that its layer contains.

Sources: Megatron-Bridge's peft/lora.py and peft/canonical_lora.py; NeMo 1's adapter_mixins.py.
"""

from __future__ import annotations

import re
from functools import cache

from .architectures import namings_of

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""The parts of a fused projection, whose rows are ordered by groups: for each group its queries, its key, its value."""

GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
"""The parts of a fused MLP projection: gate before up, as on a single tensor-parallel rank."""


@cache
def bridge() -> dict[str, tuple[str, ...]]:
    """Return a map from Megatron-Bridge's and NeMo 2's adapter modules to our modules.

    Names are relative to the layer.

    Canonical LoRA has factors for each part of a fused weight. Their module is named after the part: `adapter_q` for
    `q_proj`.
    """
    fused: dict[str, list[str]] = {}
    for key, place in namings_of("megatron")[0].places().items():
        fused.setdefault(place.name.rpartition("{n}.")[2], []).append(key.rpartition("{n}.")[2])
    found: dict[str, tuple[str, ...]] = {}
    for module, own in fused.items():
        found[f"{module}.adapter"] = tuple(own)
        for each in own if len(own) > 1 else ():
            found[f"{module}.adapter.adapter_{each.rpartition('.')[2].partition('_')[0]}"] = (each,)
    return found


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
"""A map from NeMo 1's adapter modules to our modules; names are relative to the layer."""

LAYER = re.compile(r"(?P<prefix>(?:\w+\.)*layers\.)(?P<n>\d{1,9})\.(?P<module>.+)")
"""Matches a module's name with any prefix, because each wrapper around a model adds a prefix."""

OWN = re.compile(r"(?:\w+\.)*layers\.(?P<n>\d{1,9})\.(?P<module>.+)")

"""Names of litgpt's models of Llama's kind, whose MLP has a gate.

Source: litgpt/scripts/convert_hf_checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .tables import Table

_L, _T = "model.layers.{n}.", "transformer.h.{n}."

QKV = "attn.qkv"
PARTS = {"query": _L + "self_attn.q_proj", "key": _L + "self_attn.k_proj", "value": _L + "self_attn.v_proj"}
"""Which of `lora_query`, `lora_key` and `lora_value` turns it on -> own template; in the order of the fused weight."""

TABLE = Table(
    {
        _L + "self_attn.o_proj": _T + "attn.proj", _L + "mlp.gate_proj": _T + "mlp.fc_1",
        _L + "mlp.up_proj": _T + "mlp.fc_2", _L + "mlp.down_proj": _T + "mlp.proj", "lm_head": "lm_head",
    }
)  # fmt: skip

FLAGS = {"attn.proj": "projection", "mlp.fc_1": "mlp", "mlp.fc_2": "mlp", "mlp.proj": "mlp", "lm_head": "head"}
"""End of a module's name -> which setting turns it on."""

MLP = ("LLaMAMLP", "GemmaMLP")
"""Values of `mlp_class_name` of models that the table is for."""

_KEY = re.compile(r"(?:transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|mlp\.(?:fc|fc_1|fc_2|proj))|lm_head)\.lora_[AB]")


def is_litgpt(keys: Collection[str]) -> bool:
    """Whether all keys are litgpt's."""
    return any(key.startswith("transformer.h.") for key in keys) and all(_KEY.fullmatch(key) for key in keys)

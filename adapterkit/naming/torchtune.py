"""Names and row orders of torchtune's models.

Sources: torchtune/models/convert_weights.py (Llama, Mistral, Gemma), models/qwen2/_convert_weights.py.
"""

from __future__ import annotations

from .tables import Table

_L, _T = "model.layers.{n}.", "layers.{n}."

TABLE = Table(
    {
        _L + "self_attn.q_proj": _T + "attn.q_proj", _L + "self_attn.k_proj": _T + "attn.k_proj",
        _L + "self_attn.v_proj": _T + "attn.v_proj", _L + "self_attn.o_proj": _T + "attn.output_proj",
        _L + "mlp.gate_proj": _T + "mlp.w1", _L + "mlp.down_proj": _T + "mlp.w2", _L + "mlp.up_proj": _T + "mlp.w3",
        "model.embed_tokens": "tok_embeddings", "lm_head": "output",
    }
)  # fmt: skip

META_ORDER = {"llama": True, "mistral": True, "gemma": True, "gemma2": True, "qwen2": False}
"""model_type -> whether rows of q and k stand in Meta's order."""

TURNED = {"attn.q_proj": "query", "attn.k_proj": "kv"}
"""End of a module's name -> which heads share its rows."""

"""Names and row orders in GGUF files, by their `general.architecture`; as llama.cpp has them.

Sources: gguf-py's constants.py and tensor_mapping.py, and `modify_tensors` in llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from .tables import Table

_L, _B = "model.layers.{n}.", "blk.{n}."

_ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TIED = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_ATTENTION = {
    _L + "self_attn.q_proj": _B + "attn_q", _L + "self_attn.k_proj": _B + "attn_k",
    _L + "self_attn.v_proj": _B + "attn_v", _L + "self_attn.o_proj": _B + "attn_output",
}  # fmt: skip
_MLP = {
    _L + "mlp.gate_proj": _B + "ffn_gate", _L + "mlp.up_proj": _B + "ffn_up", _L + "mlp.down_proj": _B + "ffn_down",
}  # fmt: skip
_NORMS = {_L + "input_layernorm": _B + "attn_norm", _L + "post_attention_layernorm": _B + "ffn_norm"}
_HEAD_NORMS = {_L + "self_attn.q_norm": _B + "attn_q_norm", _L + "self_attn.k_norm": _B + "attn_k_norm"}
_GEMMA_NORMS = {
    _L + "input_layernorm": _B + "attn_norm", _L + "post_attention_layernorm": _B + "post_attention_norm",
    _L + "pre_feedforward_layernorm": _B + "ffn_norm", _L + "post_feedforward_layernorm": _B + "post_ffw_norm",
}  # fmt: skip
_LLAMA = _ENDS | _ATTENTION | _MLP | _NORMS
_FUSED = _ENDS | _NORMS | {
    _L + "self_attn.qkv_proj": _B + "attn_qkv", _L + "self_attn.o_proj": _B + "attn_output",
    _L + "mlp.gate_up_proj": _B + "ffn_up", _L + "mlp.down_proj": _B + "ffn_down",
}  # fmt: skip
_H = "transformer.h.{n}."
_GPT2 = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", _H + "attn.c_attn": _B + "attn_qkv", _H + "attn.c_proj": _B + "attn_output",
    _H + "mlp.c_fc": _B + "ffn_up", _H + "mlp.c_proj": _B + "ffn_down", _H + "ln_1": _B + "attn_norm",
    _H + "ln_2": _B + "ffn_norm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
        pairs: own templates -> templates of the file, both without `.weight`.
        experts: own templates of one expert's modules -> template of the stacked tensor.
        packed: own templates of parameters that hold all experts -> template of the stacked tensor.
        turned: file templates whose rows stand in Meta's order -> which heads share them, `query` or `kv`.
    """

    pairs: Mapping[str, str]
    experts: Mapping[str, str]
    turned: Mapping[str, str]

    @property
    def table(self) -> Table:
        return _table(tuple({**self.pairs, **self.experts}.items()))


def _moe(block: str, router: str, names: tuple[str, str, str]) -> tuple[dict[str, str], dict[str, str]]:
    parts = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    experts = {f"{_L}{block}.experts.{{e}}.{name}": _B + part for name, part in zip(names, parts, strict=True)}
    return {_L + router: _B + "ffn_gate_inp"}, experts


_PROJ = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_ROUTER, _MIXTRAL = _moe("block_sparse_moe", "block_sparse_moe.gate", ("w1", "w3", "w2"))
_QWEN_ROUTER, _QWEN = _moe("mlp", "mlp.gate", _PROJ)
_SHARED = {
    _L + "mlp.shared_expert.gate_proj": _B + "ffn_gate_shexp", _L + "mlp.shared_expert.up_proj": _B + "ffn_up_shexp",
    _L + "mlp.shared_expert.down_proj": _B + "ffn_down_shexp", _L + "mlp.shared_expert_gate": _B + "ffn_gate_inp_shexp",
}  # fmt: skip
_META = {_B + "attn_q": "query", _B + "attn_k": "kv"}
_NONE: dict[str, str] = {}

ARCHITECTURES = {
    "llama": Architecture(_LLAMA | _MIXTRAL_ROUTER, _MIXTRAL, _META),
    "qwen2": Architecture(_LLAMA, _NONE, _NONE),
    "qwen3": Architecture(_LLAMA | _HEAD_NORMS, _NONE, _NONE),
    "qwen2moe": Architecture(_ENDS | _ATTENTION | _NORMS | _QWEN_ROUTER | _SHARED, _QWEN, _NONE),
    "qwen3moe": Architecture(_ENDS | _ATTENTION | _NORMS | _HEAD_NORMS | _QWEN_ROUTER, _QWEN, _NONE),
    "gemma": Architecture(_TIED | _ATTENTION | _MLP | _NORMS, _NONE, _NONE),
    "gemma2": Architecture(_TIED | _ATTENTION | _MLP | _GEMMA_NORMS, _NONE, _NONE),
    "gemma3": Architecture(_ENDS | _ATTENTION | _MLP | _GEMMA_NORMS | _HEAD_NORMS, _NONE, _NONE),
    "phi3": Architecture(_FUSED, _NONE, _NONE),
    "gpt2": Architecture(_GPT2, _NONE, _NONE),
}  # fmt: skip
"""general.architecture -> its names. What is not here is refused by name, not guessed."""

OF_MODEL = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3",
    "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
"""model_type of a base's config -> general.architecture."""


@cache
def _table(pairs: tuple[tuple[str, str], ...]) -> Table:
    return Table(dict(pairs))

"""Virtual tokens: prompts, prefixes and what LLaMA-Adapter attends to."""

from __future__ import annotations

from typing import Any

import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from peft.tuners.adaption_prompt import AdaptedAttention

from adapterkit.methods import METHODS

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PAIR: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3}
CASES = {
    "prompt": ("llama", PromptTuningConfig(**CAUSAL)),
    "prompt_pair": ("t5", PromptTuningConfig(**PAIR)),
    "prompt_classifier": ("llama", PromptTuningConfig(**CAUSAL, modules_to_save=["lm_head"])),
    "p_tuning": ("llama", PromptEncoderConfig(**CAUSAL, encoder_hidden_size=5)),
    "cpt": (
        "llama",
        CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[4, 1, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3]),
    ),
    "multitask_prompt": ("llama", MultitaskPromptTuningConfig(**CAUSAL, num_tasks=2, num_ranks=2)),
    "multitask_prompt_pair": ("t5", MultitaskPromptTuningConfig(**PAIR, num_tasks=2)),
    "prefix": ("llama", PrefixTuningConfig(**CAUSAL)),
    "prefix_projected": ("llama", PrefixTuningConfig(**CAUSAL, prefix_projection=True, encoder_hidden_size=5)),
    "prefix_pair": ("t5", PrefixTuningConfig(**PAIR)),
    "cartridge": ("llama", CartridgeConfig(**CAUSAL, num_frozen_tokens=2)),
    "adaption_prompt": ("llama", AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)),
}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped attention."""
    if not isinstance(module, AdaptedAttention):
        return None
    return METHODS["adaption_prompt"](P=module.adaption_prompt[0], gate=module.adaption_gate)


def update_of_model(model: Any, config: Any) -> Any:
    """The virtual tokens as PEFT computes them; each layer's keys and values cut out one by one."""
    encoder, pair = model.prompt_encoder["default"], config.num_transformer_submodules == 2
    if config.peft_type == "MULTITASK_PROMPT_TUNING":
        tensors = {"P": encoder.embedding.weight, "columns": encoder.prefix_task_cols, "rows": encoder.prefix_task_rows}
        return METHODS["multitask_prompt"](**tensors, decoder=pair)
    whole = model.get_prompt_embedding_to_save("default")
    if config.peft_type not in ("PREFIX_TUNING", "CARTRIDGE"):
        return METHODS["prompt"](P=whole, used=config.num_virtual_tokens if pair else 0)
    d, heads = config.token_dim // config.num_attention_heads, config.num_attention_heads
    P = torch.empty(config.num_layers, 2, heads, config.num_virtual_tokens, d)
    for layer in range(config.num_layers):
        for kind in range(2):
            for head in range(heads):
                start = ((layer * 2 + kind) * heads + head) * d
                P[layer, kind, head] = whole[:, start : start + d]
    return METHODS["prefix"](P=P, step=config.num_transformer_submodules)

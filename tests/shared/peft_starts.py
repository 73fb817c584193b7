"""A small Llama whose adapters start with the same values as PEFT's."""

import torch
import transformers

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip

IDS = torch.arange(8 * 6).reshape(8, 6) % 29


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()

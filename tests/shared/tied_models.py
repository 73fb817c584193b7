"""Small models with tied embedding and head, and adapters that PEFT trains on them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 12

TOKENS = torch.tensor([[1, 2, 5, 7, 3, 0]])


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


BASES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "llama": (llama, "embed_tokens", "q_proj"),
    "gpt2": (gpt2, "wte", "c_attn"),
    "t5": (t5, "shared", "q"),
}
"""Name -> the model, its embedding, and an inner layer."""


def lora(**settings: Any) -> Callable[[str, str], Any]:
    """Return a config in which E and Q are replaced by the embedding and the inner layer."""

    def make(embedding: str, inside: str) -> Any:
        from peft import LoraConfig

        words = {"E": embedding, "Q": inside}
        named = dict(settings)
        for key in {"target_modules", "modules_to_save"} & settings.keys():
            named[key] = [words.get(word, word) for word in settings[key]]
        rows = settings.get("trainable_token_indices")
        if isinstance(rows, dict):
            named["trainable_token_indices"] = {words.get(word, word): index for word, index in rows.items()}
        return LoraConfig(r=2, init_lora_weights=False, **named)

    return make


def tokens(**settings: Any) -> Callable[[str, str], Any]:
    def make(*_: str) -> Any:
        from peft import TrainableTokensConfig

        return TrainableTokensConfig(token_indices=[1, 5, 7], init_weights=False, **settings)

    return make


KINDS = {
    "lora at the embedding": lora(target_modules=["Q", "E"]),
    "lora at the head": lora(target_modules=["Q", "lm_head"]),
    "lora at both": lora(target_modules=["E", "lm_head"]),
    "lora at the embedding, tied": lora(target_modules=["Q", "E"], ensure_weight_tying=True),
    "lora at the head, tied": lora(target_modules=["Q", "lm_head"], ensure_weight_tying=True),
    "dora at the embedding": lora(target_modules=["E"], use_dora=True),
    "dora at the embedding, tied": lora(target_modules=["E"], use_dora=True, ensure_weight_tying=True),
    "whole embedding": lora(target_modules=["Q"], modules_to_save=["E"]),
    "whole head": lora(target_modules=["Q"], modules_to_save=["lm_head"]),
    "whole both": lora(target_modules=["Q"], modules_to_save=["E", "lm_head"]),
    "whole embedding, tied": lora(target_modules=["Q"], modules_to_save=["E"], ensure_weight_tying=True),
    "rows": lora(target_modules=["Q"], trainable_token_indices=[1, 5, 7]),
    "rows by name": lora(target_modules=["Q"], trainable_token_indices={"E": [1, 5, 7]}),
    "rows of both": lora(target_modules=["Q"], trainable_token_indices={"E": [1, 5, 7], "lm_head": [1, 5, 7]}),
    "other rows of the head": lora(target_modules=["Q"], trainable_token_indices={"E": [1, 7], "lm_head": [2]}),
    "rows of the head": lora(target_modules=["Q"], trainable_token_indices={"lm_head": [2, 5]}),
    "rows, tied": lora(target_modules=["Q"], trainable_token_indices=[1, 5, 7], ensure_weight_tying=True),
    "trainable tokens": tokens(),
    "trainable tokens of the head": tokens(target_modules=["lm_head"]),
}


def loaded(name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BASES[name][0]().__class__.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **inputs).logits.double()


def trained(name: str, base: Path, kind: str, folder: Path) -> torch.Tensor:
    """Save a PEFT adapter with random values; return the logits of its model."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(loaded(name, base), KINDS[kind](*BASES[name][1:])).eval()
        random, seen = torch.Generator().manual_seed(1), set()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.data_ptr() not in seen:
                    seen.add(parameter.data_ptr())
                    parameter.add_(torch.randn(parameter.shape, generator=random) * 0.3)
        model.save_pretrained(folder)
    return logits(model)

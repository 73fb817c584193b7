"""TinyLoRA, with all kinds of sharing, of linear layers, embeddings and GPT-2's Conv1D."""

import warnings

from peft import TinyLoraConfig

from peft_cases import Layers, gpt2, llama


def tinylora(**options):
    with warnings.catch_warnings(action="ignore"):  # of PEFT, where P is not saved
        return TinyLoraConfig(**{"r": 3, "u": 5, "init_weights": "uniform", "init_v_bound": 1.0, **options})


CASES = {
    "tinylora": (Layers, tinylora(target_modules=["q", "up", "emb", "head.1"], r=4)),
    "tinylora of an embedding": (llama, tinylora(target_modules=["embed_tokens", "q_proj"])),
    "tied tinylora": (Layers, tinylora(target_modules=["q", "up"], weight_tying=1.0)),
    "half tied tinylora": (llama, tinylora(target_modules="all-linear", weight_tying=0.5)),
    "tinylora drawn again": (llama, tinylora(target_modules=["k_proj", "down_proj"], save_projection=False)),
    "tinylora of gpt-2": (gpt2, tinylora(target_modules=["c_attn", "c_proj"], weight_tying=0.4)),
}

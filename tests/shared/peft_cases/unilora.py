"""Uni-LoRA, with and without its positions, of linear layers and GPT-2's Conv1D."""

from peft import UniLoraConfig

from peft_cases import Layers, gpt2, llama


def unilora(**options):
    return UniLoraConfig(**{"r": 3, "theta_d_length": 50, "init_weights": False, **options})


CASES = {
    "unilora": (Layers, unilora(target_modules=["q", "up"], save_indices=True)),
    "unilora drawn again": (llama, unilora(target_modules="all-linear")),
    "unilora of one module": (Layers, unilora(target_modules=["head.1"], proj_seed=5)),
    "unilora of gpt-2": (gpt2, unilora(target_modules=["c_attn", "c_proj"], save_indices=True)),
    "unilora of gpt-2 drawn again": (gpt2, unilora(target_modules=["c_attn", "c_proj", "c_fc"], theta_d_length=7)),
}

"""VeRA: weights of several sizes share projections."""

from peft import VeraConfig

from peft_cases import Layers, gpt2, llama


def vera(**options):
    return VeraConfig(**{"r": 5, "init_weights": False, **options})


CASES = {
    "vera": (Layers, vera(target_modules=["q", "up", "head.1"])),
    "vera of gpt-2": (gpt2, vera(target_modules=["c_attn", "c_fc", "mlp.c_proj"], bias="vera_only")),
    "vera of llama": (llama, vera(target_modules="all-linear", modules_to_save=["model.norm"])),
}

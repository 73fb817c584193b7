"""PVeRA, at its mean."""

from peft import PveraConfig

from peft_cases import Layers, gpt2


def pvera(**options):
    return PveraConfig(**{"r": 5, "init_weights": False, **options})


CASES = {
    "pvera": (Layers, pvera(target_modules=["q", "up", "head.1"])),
    "pvera of gpt-2": (gpt2, pvera(target_modules=["c_attn", "c_fc", "mlp.c_proj"], generator_seed=3)),
}

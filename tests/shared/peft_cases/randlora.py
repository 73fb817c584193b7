"""RandLoRA: wide, tall and square weights that share bases."""

from peft import RandLoraConfig

from peft_cases import Layers, gpt2, llama


def randlora(**options):
    return RandLoraConfig(**{"r": 3, "randlora_alpha": 7, "init_weights": False, **options})


CASES = {
    "randlora": (Layers, randlora(target_modules=["q", "up", "head.1"])),
    "sparse randlora": (Layers, randlora(target_modules=["q", "up"], sparse=True)),
    "randlora of gpt-2": (gpt2, randlora(target_modules=["c_attn", "c_fc", "mlp.c_proj"], r=2)),
    "randlora of llama": (llama, randlora(target_modules="all-linear")),
}

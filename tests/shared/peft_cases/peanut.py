"""PEANuT of several depths and activations."""

from peft import PeanutConfig

from peft_cases import Layers


def peanut(**options):
    return PeanutConfig(**{"r": 3, "init_weights": False, "target_modules": ["q", "up"], **options})


CASES = {
    "peanut": (Layers, peanut()),
    "deep peanut": (Layers, peanut(depth=2, act_fn="gelu", scaling=0.5)),
    "peanut of silu": (Layers, peanut(depth=1, act_fn="silu", modules_to_save=["head.0"])),
}

"""DEFT and PaRa, both projections."""

from peft import DeftConfig

from peft_cases import Layers, gpt2


def deft(**options):
    return DeftConfig(**{"r": 3, "init_weights": False, "target_modules": ["q", "up", "head.1"], **options})


CASES = {
    "deft": (Layers, deft()),
    "deft with qr": (Layers, deft(decomposition_method="qr", alpha=5)),
    "deft with a rank above the outputs": (Layers, deft(decomposition_method="qr", r=5, alpha=None)),
    "para": (Layers, deft(para=True)),
    "para with qr": (Layers, deft(para=True, decomposition_method="qr", target_modules=["q", "up"])),
    "deft of gpt-2": (
        gpt2,
        deft(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, decomposition_method="qr", alpha=2),
    ),
}

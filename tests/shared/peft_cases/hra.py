"""HRA: chains of reflections, and orthogonal ones."""

from peft import HRAConfig

from peft_cases import Layers, llama
from peft_cases.boft import Kernels


def hra(**options):
    return HRAConfig(**{"r": 3, "init_weights": False, "target_modules": ["q", "up", "point"], **options})


CASES = {
    "hra": (Layers, hra()),
    "orthogonal hra": (Layers, hra(apply_GS=True)),
    "hra of convolutions": (Kernels, hra(target_modules=["conv", "point"], r=4)),
    "orthogonal hra of convolutions": (Kernels, hra(target_modules=["conv", "point"], r=4, apply_GS=True)),
    "hra of llama": (llama, hra(target_modules="all-linear", r=2)),
}

"""PEANuT."""

from typing import Any

import torch
from peft import PeanutConfig
from peft.tuners.peanut.layer import PeanutLayer

from adapterkit.methods.peanut import PEANuT

CASES = {
    "peanut": ("Layers", PeanutConfig(r=2, depth=2, act_fn="silu", scaling=0.5, target_modules=["q", "up"])),
    "peanut_flat": ("Layers", PeanutConfig(r=2, target_modules=["q"])),
}


def update_of(_path: str, layer: Any, _config: Any) -> PEANuT | None:
    """Both ends, and the matrices between them, stacked."""
    if not isinstance(layer, PeanutLayer):
        return None
    sides = {"encoders": layer.peanut_encoders["default"], "decoders": layer.peanut_decoders["default"]}
    stacks = {name: torch.stack([part.weight for part in parts]) for name, parts in sides.items() if len(parts)}
    return PEANuT(
        A=layer.peanut_A["default"].weight, B=layer.peanut_B["default"].weight, **stacks,
        activation=layer.act_fn["default"], scaling=layer.scaling["default"],
    )  # fmt: skip

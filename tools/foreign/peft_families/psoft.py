"""PSOFT."""

from __future__ import annotations

from typing import Any

from peft import PsoftConfig
from peft.tuners.psoft.layer import PsoftLayer

from adapterkit.methods import METHODS

CASES = {
    "psoft": ("Layers", PsoftConfig(r=3, psoft_alpha=5, target_modules=["q", "up"])),
    "psoft_free": (
        "Layers", PsoftConfig(r=2, psoft_orth=False, psoft_mag_a=False, ab_svd_init="pissa_init", target_modules=["q"])
    ),
}  # fmt: skip


def update_of(_path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module; A and B are its base's."""
    if not isinstance(module, PsoftLayer):
        return None
    R = module.psoft_R["default"]
    tensors = {"pairs" if R.orth else "R": R.weight, "a": R.vector_a, "b": R.vector_b}
    return METHODS["psoft"](**tensors, symmetric=config.ab_svd_init == "pissa_init")

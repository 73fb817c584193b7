"""LoKr."""

from __future__ import annotations

from typing import Any

from peft import LoKrConfig
from peft.tuners.lokr.layer import LoKrLayer

from adapterkit.methods import METHODS


def config(*modules: str, **options: Any) -> LoKrConfig:
    """A LoKr config whose values differ from PEFT's defaults."""
    return LoKrConfig(**{"r": 1, "alpha": 3, "target_modules": list(modules), **options})


CASES = {
    "lokr": ("Layers", config("q", "up", "conv1", "conv2", "point", r=6)),
    "lokr_apart": ("Layers", config("q", "conv1", alpha_pattern={"q": 5}, decompose_both=True, decompose_factor=4)),
    "lokr_cores": ("Layers", config("q", "conv2", "point", use_effective_conv2d=True)),
}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; a core swaps the axes of the factor on the side of the outputs.

    PEFT's torch.kron takes a second factor of three axes for a stack of matrices.
    """
    if not isinstance(module, LoKrLayer):
        return None
    held = {name: getattr(module, f"lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    tensors = {name: values["default"] for name, values in held.items() if "default" in values}
    if "t2" in tensors:
        tensors["w2_in"] = tensors.pop("w2_b")
        tensors["w2_a"] = tensors["w2_a"].T
    stacked = "w2" in tensors and tensors["w2"].ndim == 3
    return METHODS["lokr"](**tensors, scaling=module.scaling["default"], stacked=stacked)

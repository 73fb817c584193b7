"""GLoRA."""

from typing import Any

from peft import GloraConfig
from peft.tuners.glora.layer import GloraLayer

from adapterkit.methods.glora import GLoRA


def config(A_B: Any, C: Any, D_E: Any) -> GloraConfig:
    """The forms of the supports."""
    return GloraConfig(r=2, config_A_B=A_B, config_C=C, config_D_E=D_E, target_modules=["q", "up"])


CASES = {
    "glora": ("Layers", config("lora", "lora", "constant")),
    "glora_vectors": ("Layers", config("vector", "vector", "vector")),
    "glora_constants": ("Layers", config("constant", "none", "constant")),
}


def update_of(_path: str, layer: Any, config: Any) -> GLoRA | None:
    """The supports, each in the form that its config says."""
    if not isinstance(layer, GloraLayer):
        return None
    forms = {"A": config.config_A_B, "B": config.config_A_B, "C": config.config_C}
    tensors = {}
    for name in "ABCDE":
        path, form = getattr(layer, f"glora_{name}")["default"], forms.get(name, config.config_D_E)
        if form == "lora":
            tensors |= {f"{name}_d": path.Xd, f"{name}_u": path.Xu}
        elif form != "none":
            tensors[name if form == "vector" else f"{name}_c"] = path.X.flatten()
    return GLoRA(**tensors)

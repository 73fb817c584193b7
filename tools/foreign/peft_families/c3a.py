"""C3A."""

from typing import Any

from peft import C3AConfig
from peft.tuners.c3a.layer import C3ALayer

from adapterkit.methods.c3a import C3A

CASES = {"c3a": ("Layers", C3AConfig(block_size=2, target_modules=["q", "up"]))}


def update_of(_path: str, layer: Any, _config: Any) -> C3A | None:
    """The kernel."""
    if not isinstance(layer, C3ALayer):
        return None
    return C3A(kernel=layer.c3a_kernel["default"])

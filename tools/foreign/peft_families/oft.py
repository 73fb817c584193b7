"""OFT."""

from __future__ import annotations

from typing import Any

from peft import OFTConfig
from peft.tuners.oft.layer import OFTLayer

from adapterkit.methods import METHODS

GIVEN: dict[str, Any] = {"target_modules": ["q", "up", "point"]}

CASES = {
    "oft": ("Layers", OFTConfig(oft_block_size=2, use_cayley_neumann=False, **GIVEN)),
    "oft_series": ("Layers", OFTConfig(r=1, oft_block_size=0, coft=True, eps=0.5, **GIVEN)),
}


def update_of(_path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module."""
    if not isinstance(module, OFTLayer):
        return None
    terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else 0
    pairs = module.oft_R["default"].weight
    kernel = getattr(module.get_base_layer(), "kernel_size", (1, 1))
    if kernel != (1, 1):
        return METHODS["oft_patches"](pairs=pairs, terms=terms, coft=config.coft, eps=config.eps)
    return METHODS["oft"](pairs=pairs, terms=terms, coft=config.coft, eps=config.eps)

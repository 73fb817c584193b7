"""OSF."""

from __future__ import annotations

from typing import Any

from peft import OSFConfig
from peft.tuners.osf.layer import OSFLayer

from adapterkit.methods import METHODS

CASES = {
    "osf": ("Layers", OSFConfig(target_modules=["q", "up"])),
    "osf_ranks": ("Layers", OSFConfig(target_modules=["q", "up"], effective_rank=0.8, rank_pattern={"1.q": 1})),
}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; what it takes off is its base's."""
    if not isinstance(module, OSFLayer):
        return None
    held = module.osf_svd_params["default"]
    return METHODS["osf"](U=held["U_low"], S=held["S_low"], V=held["V_low"])

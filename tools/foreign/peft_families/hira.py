"""HiRA."""

from __future__ import annotations

from typing import Any

from peft import HiraConfig
from peft.tuners.hira.layer import HiraLayer

from adapterkit.methods import METHODS

CASES = {"hira": ("Layers", HiraConfig(r=2, target_modules=["q", "conv1", "conv2", "conv3"]))}


def update_of(_path: str, module: Any, _config: Any) -> Any:
    """The update of a wrapped module; B only mixes channels."""
    if not isinstance(module, HiraLayer):
        return None
    A, B = module.hira_A["default"], module.hira_B["default"]
    return METHODS["hira"](A=A, B=B.reshape(B.shape[:2]))

"""RoAd."""

from __future__ import annotations

from typing import Any

from peft import RoadConfig
from peft.tuners.road.layer import RoadLayer

from adapterkit.methods import METHODS

CASES = {
    f"road_{variant}": (
        "Layers", RoadConfig(variant=f"road_{variant}", group_size=2, target_modules=["q", "up"])
    )
    for variant in (1, 2, 4)
}  # fmt: skip


def update_of(_path: str, module: Any, config: Any) -> Any:
    """The update of a wrapped module."""
    if not isinstance(module, RoadLayer):
        return None
    theta, alpha = module.road_theta["default"], module.road_alpha["default"]
    return METHODS["road"](theta=theta, alpha=alpha, variant=int(config.variant[-1]), group=config.group_size)

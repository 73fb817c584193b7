"""FourierFT."""

from typing import Any

from peft import FourierFTConfig
from peft.tuners.fourierft.layer import FourierFTLayer

from adapterkit.methods.fourierft import FourierFT

GIVEN: dict[str, Any] = {"n_frequency": 5, "n_frequency_pattern": {"up": 3}, "scaling": 2.5}
CASES = {"fourierft": ("Layers", FourierFTConfig(**GIVEN, target_modules=["q", "up"]))}
NEEDS_BASE = True


def update_of(_path: str, layer: Any, _config: Any) -> FourierFT | None:
    """Coefficients and their positions."""
    if not isinstance(layer, FourierFTLayer):
        return None
    return FourierFT(
        index=layer.indices["default"], spectrum=layer.fourierft_spectrum["default"],
        scaling=layer.fourierft_scaling["default"],
        outputs=layer.out_features, inputs=layer.in_features,
    )  # fmt: skip

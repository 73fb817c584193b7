"""WaveFT."""

from typing import Any

import torch
from peft import WaveFTConfig
from peft.tuners.waveft.layer import WaveFTLayer
from peft.tuners.waveft.wavelet import Wavelet

from adapterkit.methods.waveft import WaveFT

CASES = {
    "waveft": (
        "Layers",
        WaveFTConfig(n_frequency=6, wavelet_family="sym4", scaling=1.5, target_modules=["q", "up"]),
    ),
    "waveft_elements": (
        "Layers",
        WaveFTConfig(n_frequency=6, use_idwt=False, random_loc_seed=3, target_modules=["q", "up"]),
    ),
}
NEEDS_BASE = True


def update_of(_path: str, layer: Any, _config: Any) -> WaveFT | None:
    """Coefficients, their positions, and the wavelet's filter."""
    if not isinstance(layer, WaveFTLayer):
        return None
    taps = Wavelet(layer.waveft_wavelet_family["default"]).rec_lo if layer.waveft_use_idwt["default"] else None
    return WaveFT(
        index=layer.waveft_indices["default"], spectrum=layer.waveft_spectrum["default"],
        scaling=layer.waveft_scaling["default"],
        low_pass=None if taps is None else torch.tensor(taps, dtype=torch.float64),
        outputs=layer.out_features, inputs=layer.in_features,
    )  # fmt: skip

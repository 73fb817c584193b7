"""The readings of a folder: departures of the library's forward from the papers, and facts that files do not state."""

from __future__ import annotations

from .._format import Departure

DEPARTURES = {
    "dora_norm_and_bias": Departure(
        "dora_outputs: the norm is of W + B @ A without the scaling, and the factor multiplies the layer's bias too",
        "dora: the norm is of W + scaling * B @ A, and the bias stays",
    ),
    "lora_before_1_1": Departure(
        "LoRA of adapters before 1.1 has the factor 1, inside a union too",
        "alpha / r",
    ),
}

REFT = ("noreft", "direft")
"""The two meanings of a ReFT without orthogonality; the library writes the same file for both."""

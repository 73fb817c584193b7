"""Define the values of `compat`: differences between the adapters library and papers, and ambiguous files."""

from __future__ import annotations

from .._format import Departure

DEPARTURES = {
    "dora_norm_and_bias": Departure(
        "dora_outputs: the norm is that of W + B @ A, without the scaling; m / norm multiplies the bias, too",
        "dora: the norm is that of W + scaling * B @ A, and the bias is unchanged",
    ),
    "lora_before_1_1": Departure(
        "LoRA from adapters before 1.1 has the scaling 1, also inside a union",
        "alpha / r",
    ),
}

REFT = ("noreft", "direft")
"""The two possible meanings of a ReFT without orthogonality, for which the adapters library writes the same file."""

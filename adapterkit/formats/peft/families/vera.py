"""VeRA: `vera_lambda_b` [out], `vera_lambda_d` [r]; for all modules `vera_A` [r, inputs], `vera_B` [outputs, r]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ....methods.vera import VeRA
from ._projections import Projections

if TYPE_CHECKING:
    from collections.abc import Mapping


class VeraFamily(Projections):
    """The family of the peft_type VERA."""

    peft_type = "VERA"
    method = VeRA
    parts = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    harmless: ClassVar[Mapping[str, str]] = {"d_initial": "initial values", "vera_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "d_initial": 0.1,
        "init_weights": True,
        "projection_prng_key": 0,
        "vera_dropout": 0.0,
    }

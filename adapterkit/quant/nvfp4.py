"""NVFP4 from NVIDIA's ModelOpt: w = e2m1 * scale * second scale.

NVIDIA 2025, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, section 2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import Packed, Scheme
from ._floats import float4

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

PARTS = ("weight", "weight_scale", "weight_scale_2")


class Nvfp4(Scheme):
    """A module has `weight` `[out, in/2]` in bytes, `weight_scale` `[out, in/16]` and a single `weight_scale_2`."""

    url = "https://github.com/NVIDIA/Model-Optimizer"
    description = "NVFP4 of ModelOpt: 4-bit floats, one 8-bit scale per 16 values, and one scale for the whole tensor"
    oracle = "the published formula"

    def detect(self, base: Checkpoint) -> bool:
        return any(name.endswith(".weight_scale_2") for name in base.tensors)

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        for name in base.tensors:
            if name.endswith(".weight_scale_2"):
                yield float4(base, name.removesuffix(".weight_scale_2"), PARTS, divide=False)

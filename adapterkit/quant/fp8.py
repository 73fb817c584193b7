"""fp8: w = q * scale, with a scale per tensor, row, or block (DeepSeek's layout: 128 x 128).

DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 3.3; Micikevicius et al. 2022, arXiv:2209.05433
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import Malformed
from ._float8 import DTYPES, scaled
from ._scheme import DAMAGED, Packed, Scheme, settings

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

INPUTS = ("input_scale", "input_scale_ub", "activation_scale", "activation_scale_ub")
"""Scales of a layer's inputs, which only fp8 arithmetic uses."""


class Fp8(Scheme):
    """`<weight>` in an 8-bit float, and `<weight>_scale_inv` or `<weight>_scale`, whose shape shows what shares one."""

    url = "https://huggingface.co/docs/transformers/main/en/quantization/finegrained_fp8"
    description = "8-bit floats with a scale for the tensor, a row, or a block (DeepSeek)"
    oracle = "transformers"

    def detect(self, base: Checkpoint) -> bool:
        if settings(base).get("quant_method") == "compressed-tensors":
            return False
        return any(tensor.dtype.name in DTYPES and _scale(base, name) for name, tensor in base.tensors.items())

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        block = _block(base)
        for name, tensor in base.tensors.items():
            if tensor.dtype.name not in DTYPES or len(tensor.shape) < 2:
                continue
            scale = _scale(base, name)
            if scale is None:
                raise Malformed("8-bit floats without a scale", path=base.root, where=name, cure=DAMAGED)
            module = name.rpartition(".")[0]
            others = tuple(other for word in INPUTS if (other := f"{module}.{word}") in base.tensors)
            yield scaled(base, name, scale, block, others)


def _scale(base: Checkpoint, name: str) -> str | None:
    return next((key for word in ("_scale_inv", "_scale") if (key := name + word) in base.tensors), None)


def _block(base: Checkpoint) -> tuple[int, int] | None:
    said = settings(base).get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 2 or not all(type(n) is int and n > 0 for n in said):
        why = f"weight_block_size {said!r} is not two sizes"
        raise Malformed(why, path=base.root, where="config.json", cure=DAMAGED)
    return said[0], said[1]

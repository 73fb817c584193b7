"""fp8: w = q * scale, with a scale per tensor, row, or block (DeepSeek's layout: 128 x 128).

DeepSeek-AI 2024, DeepSeek-V3, arXiv:2412.19437, section 3.3; Micikevicius et al. 2022, arXiv:2209.05433
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import Malformed, Unsupported
from . import DAMAGED, Packed, Scheme, settings
from ._floats import DTYPES, scaled

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint

INPUTS = ("input_scale", "input_scale_ub", "activation_scale", "activation_scale_ub", "scale_input")
"""A tensor `<module>.<name>` with one of these names has scales for a layer's inputs. Only fp8 arithmetic uses it."""

COMFYUI = "scale_weight"
"""ComfyUI stores a weight's scale as `<module>.scale_weight`. Some weights in its files have no scale."""

LAYOUT = "comfy_quant"
"""ComfyUI's newer files store a module's format in `<module>.comfy_quant`, a JSON object as bytes."""

FORMATS = ("float8_e4m3fn", "float8_e5m2")
"""ComfyUI's formats that are plain 8-bit floats with a scale; the others reorder the scales for ComfyUI's kernels."""


class Fp8(Scheme):
    """`<weight>` is in 8-bit floats. `<weight>_scale_inv` or `<weight>_scale` has one scale per tensor, row or block.

    Weights of bytes with `<weight>_scale_inv` are packed 4-bit floats; they are read, but not written.

    ComfyUI's older files have `<module>.scale_weight` instead.
    """

    url = "https://huggingface.co/docs/transformers/main/en/quantization/finegrained_fp8"
    description = "8-bit floats with a scale for the tensor, a row, or a block (DeepSeek)"
    oracle = "transformers"

    def detect(self, base: Checkpoint) -> bool:
        if settings(base).get("quant_method") == "compressed-tensors":
            return False
        _check_layouts(base)
        return any(tensor.dtype.name in DTYPES and _scale(base, name) for name, tensor in base.tensors.items())

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        block = _block(base)
        comfyui = any(name.rpartition(".")[2] in (COMFYUI, LAYOUT) for name in base.tensors)
        for name, tensor in base.tensors.items():
            # transformers reads integers with such scales as 4-bit floats: some models have experts of this type.
            four_bits = tensor.dtype.name == "I8" and f"{name}_scale_inv" in base.tensors
            if not (tensor.dtype.name in DTYPES or four_bits) or len(tensor.shape) < 2:
                continue
            scale = _scale(base, name)
            if scale is None and comfyui:
                continue
            if scale is None:
                raise Malformed("the weight has 8-bit floats, but no scale", path=base.root, where=name, cure=DAMAGED)
            module = name.rpartition(".")[0]
            others = tuple(other for word in (*INPUTS, LAYOUT) if (other := f"{module}.{word}") in base.tensors)
            yield scaled(base, name, scale, block, others)


def _scale(base: Checkpoint, name: str) -> str | None:
    module, _, word = name.rpartition(".")
    keys = [f"{name}_scale_inv", f"{name}_scale", *([f"{module}.{COMFYUI}"] if word == "weight" else [])]
    return next((key for key in keys if key in base.tensors), None)


def _check_layouts(base: Checkpoint) -> None:
    """Check that this scheme can read each module's ComfyUI format.

    Raises:
        Unsupported: a module's format is not in `FORMATS`. Its tensors have the same names as plain fp8 tensors, but
            adapterkit must not read them as plain fp8, because their scales can have another order.
        Malformed: a module's format is not a JSON object.
    """
    for name, tensor in base.tensors.items():
        if name.rpartition(".")[2] != LAYOUT:
            continue
        try:
            layout = json.loads(bytes(tensor.fetch())) if tensor.nbytes < 1 << 16 else None
        except ValueError:
            layout = None
        if not isinstance(layout, dict):
            raise Malformed("the tensor does not contain a JSON object", path=base.root, where=name, cure=DAMAGED)
        if layout.get("format") not in FORMATS:
            why = f"the module has ComfyUI's format {layout.get('format')!r}; known: {', '.join(FORMATS)}"
            cure = "Merge into the original, unquantized model, and quantize the result with ComfyUI's tool"
            raise Unsupported(why, path=base.root, where=name, cure=cure)


def _block(base: Checkpoint) -> tuple[int, int] | None:
    block_size = settings(base).get("weight_block_size")
    if block_size is None:
        return None
    if (
        not isinstance(block_size, list)
        or len(block_size) != 2
        or not all(type(n) is int and n > 0 for n in block_size)
    ):
        why = f"weight_block_size {block_size!r} is not a list of two positive whole numbers"
        raise Malformed(why, path=base.root, where="config.json", cure=DAMAGED)
    return block_size[0], block_size[1]

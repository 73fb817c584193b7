"""Packs weights in memory by the formula of every quantization scheme, and packs them again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterkit.io.checkpoint import Checkpoint
from adapterkit.io.ggml_blocks import BLOCKS, decoded, encoded
from adapterkit.io.lazy import DTYPES, Lazy, from_numpy
from adapterkit.quant import dequantized

Array = Any
Parts = dict[str, Lazy]

NF4 = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
       0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
"""The sixteen levels of bitsandbytes' nf4, Dettmers et al. 2023."""

GROUP = 64
"""Number of columns that share a scale in GPTQ and AWQ; size of a block in nf4."""


def zeros(dtype: str, *shape: int) -> Lazy:
    """Return a tensor of zeros."""
    kind = DTYPES[dtype]
    count = int(np.prod(shape)) * kind.itemsize
    return Lazy(shape, kind, lambda: bytes(count))


def nf4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in bitsandbytes' 4 bits, without double quantization."""
    state = json.dumps({"quant_type": "nf4", "blocksize": GROUP, "dtype": "float32", "shape": [out, ins]}).encode()
    return "bitsandbytes", {
        "m.weight": zeros("U8", out * ins // 2, 1), "m.weight.absmax": zeros("F32", out * ins // GROUP),
        "m.weight.quant_map": from_numpy(np.array(NF4, "f4")),
        "m.weight.quant_state.bitsandbytes__nf4": from_numpy(np.frombuffer(state, np.uint8)),
    }  # fmt: skip


def points(word: int, *shape: int) -> Lazy:
    """Return zero points of four bits; equal ones are a symmetric grid."""
    return from_numpy(np.full(shape, word, np.int32))


def gptq(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in GPTQ of 4 bits."""
    groups = ins // GROUP
    return "gptq", {
        "m.qweight": zeros("I32", ins // 8, out), "m.qzeros": points(0x77777777, groups, out // 8),
        "m.scales": zeros("F16", groups, out),
    }  # fmt: skip


def awq(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in AWQ of 4 bits."""
    groups = ins // GROUP
    return "awq", {
        "m.qweight": zeros("I32", ins, out // 8), "m.qzeros": points(0x77777778, groups, out // 8),
        "m.scales": zeros("F16", groups, out),
    }  # fmt: skip


def mxfp4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack one expert in MXFP4."""
    return "mxfp4", {"m_blocks": zeros("U8", 1, out, ins // 32, 16), "m_scales": zeros("U8", 1, out, ins // 32)}


def nvfp4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in ModelOpt's NVFP4."""
    return "modelopt", {
        "m.weight": zeros("U8", out, ins // 2), "m.weight_scale": zeros("F8_E4M3", out, ins // 16),
        "m.weight_scale_2": zeros("F32", 1),
    }  # fmt: skip


def fp8(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in 8-bit floats with a scale for each row."""
    return "fp8", {"m.weight": zeros("F8_E4M3", out, ins), "m.weight_scale": zeros("F32", out, 1)}


SCHEMES: Mapping[str, Callable[[int, int], tuple[str, Parts]]] = {
    "nf4": nf4, "gptq": gptq, "awq": awq, "mxfp4": mxfp4, "nvfp4": nvfp4, "fp8": fp8,
}  # fmt: skip
SETTINGS = {"gptq": {"bits": 4, "group_size": GROUP}, "awq": {"bits": 4, "group_size": GROUP}}


class PackedWeight:
    """A weight of a base in a scheme, rounded to nearest from another weight; `rows` returns the base's numbers."""

    def __init__(self, scheme: str, W: Array) -> None:
        self.scheme, self.shape = scheme, W.shape
        if scheme not in BLOCKS:
            method, parts = SCHEMES[scheme](*W.shape)
            config = {"quantization_config": {"quant_method": method, **SETTINGS.get(scheme, {})}}
            made = Checkpoint(Path("memory"), parts, (), {}, {}, config, None)
            self.base = dequantized(made, packs=True)
            (self.packed,) = self.base.packed.values()
            self.packed, self.bytes = self._packed(W)
        self.rows = self.again(W)

    def again(self, W: Array) -> Array:
        """Pack another weight in place of this one; return its numbers."""
        if self.scheme in BLOCKS:
            data = encoded(self.scheme, np.ascontiguousarray(W, "f4").reshape(-1))
            self.bytes = len(data)
            return decoded(self.scheme, data).reshape(self.shape)
        packed, self.bytes = self._packed(W)
        rows = packed.rows(0, int(np.prod(packed.shape[:-1]))).astype("f4")
        return rows.T if self.scheme == "mxfp4" else rows

    def _packed(self, W: Array) -> tuple[Any, int]:
        rows = np.ascontiguousarray(W.T if self.scheme == "mxfp4" else W, "f4")
        made = self.packed.pack(lambda start, stop: rows[start:stop])
        stored = self.base.stored.tensors

        def lazy(name: str, array: Array) -> Lazy:
            data = np.ascontiguousarray(array).tobytes()
            return Lazy(stored[name].shape, stored[name].dtype, lambda: data)

        parts = {name: lazy(name, array) for name, array in made.items()}
        return self.base.unpacked_again(self.packed, parts), sum(part.nbytes for part in parts.values())

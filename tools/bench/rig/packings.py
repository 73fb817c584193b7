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


FP4 = [size * sign for sign in (1, -1) for size in (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)]
"""The sixteen levels of bitsandbytes' fp4."""


def nf4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in bitsandbytes' nf4, without double quantization."""
    return _levels("nf4", NF4, out, ins)


def fp4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in bitsandbytes' fp4, without double quantization."""
    return _levels("fp4", FP4, out, ins)


def _levels(kind: str, levels: list[float], out: int, ins: int) -> tuple[str, Parts]:
    state = json.dumps({"quant_type": kind, "blocksize": GROUP, "dtype": "float32", "shape": [out, ins]}).encode()
    return "bitsandbytes", {
        "m.weight": zeros("U8", out * ins // 2, 1), "m.weight.absmax": zeros("F32", out * ins // GROUP),
        "m.weight.quant_map": from_numpy(np.array(levels, "f4")),
        f"m.weight.quant_state.bitsandbytes__{kind}": from_numpy(np.frombuffer(state, np.uint8)),
    }  # fmt: skip


def int8(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in bitsandbytes' int8, with a scale for each row."""
    return "bitsandbytes", {"m.weight": zeros("I8", out, ins), "m.SCB": zeros("F32", out)}


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


def gptq_8(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in GPTQ of 8 bits."""
    groups = ins // GROUP
    return "gptq", {
        "m.qweight": zeros("I32", ins // 4, out), "m.qzeros": points(0x7F7F7F7F, groups, out // 4),
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


def fp8_block(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in 8-bit floats with a scale for each square of 64 x 64 numbers."""
    return "fp8", {"m.weight": zeros("F8_E4M3", out, ins),
                   "m.weight_scale_inv": zeros("F32", out // GROUP, ins // GROUP)}  # fmt: skip


def fp8_tensor(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in 8-bit floats with one scale."""
    return "fp8", {"m.weight": zeros("F8_E4M3", out, ins), "m.weight_scale": zeros("F32", 1, 1)}


def ct_int4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in compressed-tensors' words of 4-bit integers."""
    return "compressed-tensors", {
        "m.weight_packed": zeros("I32", out, ins // 8), "m.weight_scale": zeros("BF16", out, ins // GROUP),
        "m.weight_shape": from_numpy(np.array([out, ins])),
    }  # fmt: skip


def ct_int8(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in compressed-tensors' 8-bit integers, with a scale for each row."""
    return "compressed-tensors", {"m.weight": zeros("I8", out, ins), "m.weight_scale": zeros("BF16", out, 1)}


def ct_float(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in compressed-tensors' 8-bit floats, with a scale for each row."""
    return "compressed-tensors", {"m.weight": zeros("F8_E4M3", out, ins), "m.weight_scale": zeros("BF16", out, 1)}


def ct_nvfp4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in compressed-tensors' NVFP4; the global scale is a divisor."""
    return "compressed-tensors", {
        "m.weight_packed": zeros("U8", out, ins // 2), "m.weight_scale": zeros("F8_E4M3", out, ins // 16),
        "m.weight_global_scale": from_numpy(np.ones(1, "f4")),
    }  # fmt: skip


def torchao_int4(out: int, ins: int) -> tuple[str, Parts]:
    """Pack in torchao's 4-bit integers, with zero points, each stored in 8 bits."""
    return "torchao", {
        "m._weight_qdata": zeros("I8", out, ins), "m._weight_scale": zeros("BF16", out, ins // GROUP),
        "m._weight_zero_point": zeros("I8", out, ins // GROUP),
    }  # fmt: skip


SCHEMES: Mapping[str, Callable[[int, int], tuple[str, Parts]]] = {
    "nf4": nf4, "fp4": fp4, "int8": int8, "gptq": gptq, "gptq-8": gptq_8, "awq": awq, "mxfp4": mxfp4, "nvfp4": nvfp4,
    "fp8": fp8, "fp8-block": fp8_block, "fp8-tensor": fp8_tensor, "ct-int4": ct_int4, "ct-int8": ct_int8,
    "ct-float": ct_float, "ct-nvfp4": ct_nvfp4, "torchao-int4": torchao_int4,
}  # fmt: skip
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "gptq": {"bits": 4, "group_size": GROUP}, "gptq-8": {"bits": 8, "group_size": GROUP},
    "awq": {"bits": 4, "group_size": GROUP}, "fp8-block": {"weight_block_size": [GROUP, GROUP]},
    "ct-int4": {"format": "pack-quantized", "config_groups": {"0": {"weights": {"num_bits": 4}}}},
    "ct-int8": {"format": "int-quantized", "config_groups": {"0": {"weights": {"num_bits": 8}}}},
    "ct-float": {"format": "float-quantized", "config_groups": {"0": {"weights": {"num_bits": 8}}}},
    "ct-nvfp4": {"format": "nvfp4-pack-quantized", "config_groups": {"0": {"weights": {"num_bits": 4}}}},
}  # fmt: skip


def metadata(scheme: str) -> dict[str, dict[str, str]]:
    """Return the file's metadata, which describes torchao's tensors."""
    if scheme != "torchao-int4":
        return {}
    kind = {"_type": "IntxUnpackedToInt8Tensor", "_data": {
        "target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, GROUP],
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
    }}  # fmt: skip
    return {"memory": {"tensor_names": '["m.weight"]', "m.weight": json.dumps(kind)}}


class PackedWeight:
    """A weight of a base in a scheme, rounded to nearest from another weight; `rows` returns the base's numbers."""

    def __init__(self, scheme: str, W: Array) -> None:
        self.scheme, self.shape = scheme, W.shape
        if scheme not in BLOCKS:
            method, parts = SCHEMES[scheme](*W.shape)
            config = {"quantization_config": {"quant_method": method, **SETTINGS.get(scheme, {})}}
            made = Checkpoint(Path("memory"), parts, (), {}, metadata(scheme), config, None)
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

"""Olive: factors turned, the scaling inside B. Layout: olive/cli/convert_adapters.py."""

from __future__ import annotations

import io
import zipfile

import numpy as np
from flatbuffer import onnx_adapter
from fused import wanted
from sample import Sample, f32, pair


def samples() -> dict[str, Sample]:
    """Both containers, of the same numbers."""
    keys, updates = {}, []
    for module, out, in_ in (("0.self_attn.q_proj", 16, 16), ("1.mlp.down_proj", 16, 24)):
        A, B = pair(f"olive.{module}", out, in_)
        keys |= {f"model.layers.{module}.lora_A.weight": A.T, f"model.layers.{module}.lora_B.weight": B.T}
        updates.append(wanted(module, A, B, 1.0))
    values = {key: f32(value) for key, value in keys.items()}
    return {
        "onnx_adapter": Sample({"adapter.onnx_adapter": onnx_adapter(values)}, updates),
        "npz": Sample({"adapter.npz": _npz(keys)}, updates),
    }


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    """What `numpy.savez` writes, of no time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            data = io.BytesIO()
            np.save(data, np.ascontiguousarray(array, dtype="<f4"))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), data.getvalue())
    return file.getvalue()

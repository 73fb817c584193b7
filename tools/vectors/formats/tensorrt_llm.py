"""TensorRT-LLM: two arrays. Layout: examples/hf_lora_convert.py of v0.12.0; numbers in tensorrt_llm/lora_manager.py."""

from __future__ import annotations

import io

import numpy as np
from fused import wanted
from sample import Sample, pair

Q, DOWN = 1, 6


def samples() -> dict[str, Sample]:
    """Two modules of several ranks, the shorter row with zeros behind it."""
    A, B = pair("tensorrt_llm.q", 16, 16, 2)
    C, D = pair("tensorrt_llm.down", 16, 24, 3)
    rows = [np.concatenate([one.reshape(-1), other.reshape(-1)]) for one, other in ((A, B), (C, D))]
    width = max(map(len, rows))
    weights = np.stack([np.pad(row, (0, width - len(row))) for row in rows])[None].astype("<f4")
    config = np.array([[[Q, 0, 2], [DOWN, 1, 3]]], dtype="<i4")
    files = {"model.lora_weights.npy": _npy(weights), "model.lora_config.npy": _npy(config)}
    updates = [wanted("0.self_attn.q_proj", A, B, 1.0), wanted("1.mlp.down_proj", C, D, 1.0)]
    return {"lora": Sample(files, updates)}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()

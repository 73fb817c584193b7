"""onnxruntime's adapters: a flatbuffer of named values, beside the record of what they mean (spec/README.md)."""

from __future__ import annotations

from container import Stored, numbers, text
from flatbuffer import onnx_adapter
from sample import Sample, Wanted, pair


def samples() -> dict[str, Sample]:
    """Two methods, one of them on two axes."""
    A, B = pair("onnx_adapter.q", 16, 16)
    C, D = pair("onnx_adapter.up", 24, 16)
    updates = [
        Wanted("model.layers.0.self_attn.q_proj", {"A": A, "B": B}, {"scaling": 1.5}),
        Wanted(
            "model.layers.1.mlp.up_proj",
            {"A": C, "B": D, "magnitude": numbers("onnx_adapter.m", 24, positive=True)},
            {"scaling": 0.5},
            "dora",
        ),
    ]
    values: dict[str, Stored] = {}
    record = text({"version": "1.0", "updates": [update.record(values) for update in updates]})
    files = {"adapter.onnx_adapter": onnx_adapter(values), "adapter.onnx_adapter.json": record.encode()}
    return {"two_methods": Sample(files, updates)}

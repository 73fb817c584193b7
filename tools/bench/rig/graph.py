"""Writes the inputs of the graph benchmark: a chain of float32 linear layers in one data file, and a LoRA on each.

The graph is like those of torch's old exporter: it has weights `[in, out]` whose names are lost, and nodes with the
paths of modules. Values are random from fixed seeds and written one tensor at a time, so memory stays small.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from safetensors.numpy import save_file

RANK, ALPHA = 16, 32
BLOCK_ROWS = 1024


def paths(layers: int) -> list[str]:
    """The names of the modules, in order."""
    return [f"model.layers.{n}.proj" for n in range(layers)]


def write_model(dest: Path, layers: int, width: int) -> None:
    """Write `model.onnx` and `model.onnx.data` to a folder."""
    nodes, stored, last, size = [], [], "x", 4 * width * width
    for number, path in enumerate(paths(layers)):
        name, out = f"onnx::MatMul_{number}", f"h{number}"
        nodes.append(helper.make_node("MatMul", [last, name], [out], f"/{path.replace('.', '/')}/MatMul"))
        stored.append(outside(name, [width, width], number * size, size))
        last = out
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", width])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", "length", width])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with open(dest / "model.onnx.data", "wb") as data:
        for number in range(layers):
            rng = np.random.default_rng(number)
            for _ in range(0, width, BLOCK_ROWS):
                block = rng.standard_normal((min(BLOCK_ROWS, width), width), dtype="f4")
                data.write((block * np.float32(width**-0.5)).tobytes())
    (dest / "model.onnx").write_bytes(model.SerializeToString())


def outside(name: str, shape: list[int], offset: int, length: int) -> TensorProto:
    """Return a tensor that refers to bytes of the data file."""
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_adapter(dest: Path, layers: int, width: int) -> None:
    """Write a LoRA of rank 16, float32, on every linear layer, in PEFT's format."""
    dest.mkdir()
    rng, tensors = np.random.default_rng(99), {}
    for path in paths(layers):
        key = f"base_model.model.{path}.lora_"
        tensors[f"{key}A.weight"] = rng.standard_normal((RANK, width), dtype="f4") * np.float32(0.02)
        tensors[f"{key}B.weight"] = rng.standard_normal((width, RANK), dtype="f4") * np.float32(0.005)
    save_file(tensors, dest / "adapter_model.safetensors", {"format": "pt"})
    record = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["proj"], "bias": "none"}
    (dest / "adapter_config.json").write_text(json.dumps(record))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--width", type=int, default=8192)
    options = parser.parse_args()
    options.folder.mkdir()
    write_model(options.folder, options.layers, options.width)
    write_adapter(options.folder / "adapter", options.layers, options.width)
    return 0


if __name__ == "__main__":
    sys.exit(main())

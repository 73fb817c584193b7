"""Calls of the public API whose types `mypy` and `pyright` must know; read by them, never run.

A user's editor and type checker see `py.typed` and then these types. Each `assert_type` fails the check of types
(`mypy` in `tools/check`) if a public function returns something else, or nothing that is known.
"""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch

import adapterkit as ak
from adapterkit.linalg.activations import sigmoid
from adapterkit.linalg.namespace import Numbers, namespace
from adapterkit.onnx.values import Value


def files(path: Path) -> None:
    """Read, write, tell and rewrite adapters."""
    adapter = ak.read(path, base="base", strict=True)
    assert_type(adapter, ak.Adapter)
    assert_type(ak.detect("lora"), str)
    assert_type(ak.write(adapter, path, "peft", on_loss="fold"), list[str])
    assert_type(ak.convert(path, "out", to="gguf", base="base"), ak.WriteResult)
    assert_type(ak.inspect(path), ak.Inspection)
    assert_type(ak.scan("hf://org/repo"), ak.Scan)
    assert_type(adapter.delta("model.q_proj", base="base"), torch.Tensor)
    assert_type(adapter.bind("base", rename="a=b"), ak.Adapter)
    assert_type(adapter.methods, tuple[str, ...])


def arithmetic(one: ak.Adapter, other: ak.Adapter) -> None:
    """Combine, compare and search."""
    assert_type(ak.combine([one, "other"], method="ties", density=0.5), ak.Adapter)
    assert_type(ak.diff(one, other), ak.Comparison)
    assert_type(ak.ops.scale(one, 0.5), ak.Adapter)
    assert_type(ak.ops.add([one, other], weights=[1, 1]), ak.Adapter)
    assert_type(ak.ops.stack([one, other]), ak.Adapter)
    assert_type(ak.ops.resize(one, rank=8), ak.Adapter)
    assert_type(ak.ops.extract("tuned", "base", rank=16), ak.Adapter)
    assert_type(ak.search([one, other], "data.jsonl", base="base"), ak.Search)


def merging(base: ak.Checkpoint, adapter: ak.Adapter) -> None:
    """Plan, merge, verify and judge."""
    options = ak.MergeOptions(dtype="bf16", shard_size=5 << 30)
    assert_type(ak.plan(base, adapter, options=options), ak.Plan)
    report = ak.merge(base, [adapter, Path("b")], "out", weights=[1, 0.5], options=options)
    assert_type(report, ak.Report)
    assert_type(ak.verify("out", base, adapter, sample=8), ak.Verification)
    assert_type(ak.names("base", adapter), ak.NameMap)
    assert_type(ak.report([adapter, "b"], base="base", out="r.html"), ak.AdapterReport)
    assert_type(ak.gate("base", adapter, merged="out"), ak.Gate)


def live(model: torch.nn.Module, adapter: ak.Adapter) -> None:
    """Attach to a model in memory."""
    created = ak.torch.create(model, "lora", targets=["q_proj"], rank=16)
    assert_type(created, ak.Adapter)
    handle = ak.torch.inject(model, adapter, name="style", weight=0.5, trainable=True)
    assert_type(handle.adapter(), ak.Adapter)
    handle.disable()
    handle.remove()


def graphs(path: Path, adapter: ak.Adapter) -> None:
    """Change ONNX graphs."""
    assert_type(ak.onnx.inject(path, adapter, "out.onnx", mode="slots"), ak.onnx.GraphReport)
    assert_type(ak.onnx.merge(path, [adapter], "out.onnx"), ak.onnx.GraphReport)


def hubs() -> None:
    """Pull and push."""
    ak.hub.pull("hf://org/repo@main", "dest")
    ak.hub.push("path", "hf://org/repo")


def formulas(array: np.ndarray[Any, np.dtype[Any]], tensor: torch.Tensor, value: Value) -> list[Numbers]:
    """Compute with arrays of any library; what comes out is of the library that went in."""
    assert_type(namespace(tensor).exp(tensor), torch.Tensor)
    assert_type(sigmoid(tensor), torch.Tensor)
    assert_type(sigmoid(value), Value)
    return [array, tensor, value]

"""The bases of the quantized vectors, and adapters for them."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.methods.lora import LoRA
from adapterkit.quant import dequantized

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "quant"

CASES = sorted(path.parent for path in VECTORS.glob("*/*/config.json") if path.parts[-3] != "hqq")


def name(case):
    """Return the id of a vector for the names of tests."""
    return case.relative_to(VECTORS).as_posix()


def stored(folder):
    """Return all packed weights, dequantized by the library of their scheme; separate experts are stacked."""
    packed = dequantized(open_checkpoint(folder)).packed.values()
    weights = [weight.lazy().torch().double().numpy() for weight in packed]
    return weights[0] if len(weights) == 1 else np.stack(weights)


def target(case):
    key, W = next(iter(load_file(case / "expected.safetensors").items()))
    return key.removesuffix(".weight"), W


def adapter_for(case, size=1.0, seed=0):
    """Return a LoRA whose change is `size` times as large as the weight, and the change in float64."""
    path, W = target(case)
    rng = np.random.default_rng(seed)
    *lead, out, ins = W.shape
    stacked = path.endswith("up") or len(W.shape) == 3
    if stacked and case.parent.name == "mxfp4":
        out, ins = ins, out
    A, B = rng.normal(size=(*lead, 2, ins)), rng.normal(size=(*lead, out, 2))
    delta = B @ A
    scaling = float(size * np.linalg.norm(W.double().numpy()) / np.linalg.norm(delta))
    A, B = A.astype(np.float32), B.astype(np.float32)
    layout = "out *in" if not stacked else ("e in out *k" if case.parent.name == "mxfp4" else "e out *in")
    update = LoRA(A=torch.tensor(A), B=torch.tensor(B), scaling=scaling)
    delta = scaling * (B.astype(float) @ A.astype(float))
    delta = delta.swapaxes(-1, -2) if layout.startswith("e in") else delta
    return ak.Adapter({ak.Target(path, layout=layout): (update,)}), W, delta

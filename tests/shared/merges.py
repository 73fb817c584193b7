"""Bases and adapters for merges, and the float64 formulas that merged weights are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.methods.dense import Dense
from adapterkit.methods.dora import DoRA
from adapterkit.methods.ia3 import IA3
from adapterkit.methods.lora import LoRA
from adapterkit.methods.replacement import Replacement
from adapterkit.methods.rows import Rows

Target = ak.Target


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale


def f64(t: torch.Tensor) -> np.ndarray:
    return t.double().numpy()


def bits_of_precision(dtype: torch.dtype) -> int:
    return {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]


def worst_ulp(got: torch.Tensor, exact: np.ndarray) -> float:
    """Return the largest error of any element, in units in the last place of the exact value."""
    smallest = torch.finfo(got.dtype).smallest_normal
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), smallest)))
    return float((np.abs(f64(got) - exact) / np.exp2(exponent - bits_of_precision(got.dtype) + 1)).max())


def save_base(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n in names if weight_map[n] == file}, folder / file, {"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return folder


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lora(out: int, in_: int, r: int = 4, seed: int = 1, scale: float = 0.1, scaling: float = 0.5) -> LoRA:
    return LoRA(A=rand(r, in_, seed=seed, scale=scale), B=rand(out, r, seed=seed + 7, scale=scale), scaling=scaling)


def lora_delta(u: LoRA) -> np.ndarray:
    return u.scaling * np.einsum("or,r...->o...", f64(u.B), f64(u.A))


def dora_weight(u: DoRA, W: np.ndarray) -> np.ndarray:
    V = W + u.scaling * np.einsum("or,r...->o...", f64(u.B), f64(u.A))
    norm = np.sqrt((V.reshape(len(V), -1) ** 2).sum(1)).reshape(-1, *[1] * (V.ndim - 1))
    return f64(u.magnitude).reshape(norm.shape) * V / norm


# (name, stored shape, target, updates, W in the view [out, in, *k] -> W')
CASES = {
    "lora": ((96, 40), Target("m"), [lora(96, 40)], lambda W, u: W + lora_delta(u[0])),
    "lora_many_blocks": ((1500, 700), Target("m"), [lora(1500, 700, 8)], lambda W, u: W + lora_delta(u[0])),
    "lora_in_out": ((40, 96), Target("m", "in out *k"), [lora(96, 40)], lambda W, u: W + lora_delta(u[0])),
    "lora_in_out_many_blocks": (
        (1500, 700), Target("m", "in out *k"), [lora(700, 1500)], lambda W, u: W + lora_delta(u[0]),
    ),
    "lora_conv": (
        (12, 6, 3, 3), Target("m"), [LoRA(A=rand(4, 6, 3, 3), B=rand(12, 4))], lambda W, u: W + lora_delta(u[0]),
    ),
    "lora_conv1x1": ((12, 6, 1, 1), Target("m"), [lora(12, 6)], lambda W, u: W + lora_delta(u[0])[..., None, None]),
    "lora_rows_of_fused": (
        (96, 40), Target("m", rows=(32, 64)), [lora(32, 40)],
        lambda W, u: np.concatenate([W[:32], W[32:64] + lora_delta(u[0]), W[64:]]),
    ),
    "dora": (
        (96, 40), Target("m"), [DoRA(A=rand(4, 40), B=rand(96, 4), magnitude=rand(96).abs() + 1, scaling=0.5)],
        lambda W, u: dora_weight(u[0], W),
    ),
    "dora_in_out": (
        (40, 96), Target("m", "in out *k"),
        [DoRA(A=rand(4, 40), B=rand(96, 4), magnitude=rand(96).abs() + 1, scaling=0.5)],
        lambda W, u: dora_weight(u[0], W),
    ),
    "ia3_out": ((96, 40), Target("m"), [IA3(l=rand(96))], lambda W, u: W * f64(u[0].l)[:, None]),
    "ia3_in": ((96, 40), Target("m"), [IA3(l_in=rand(40))], lambda W, u: W * f64(u[0].l_in)[None]),
    "ia3_conv": ((12, 6, 3, 3), Target("m"), [IA3(l_in=rand(6))], lambda W, u: W * f64(u[0].l_in)[None, :, None, None]),
    "dense": ((96, 40), Target("m"), [Dense(D=rand(96, 40), scaling=0.3)], lambda W, u: W + 0.3 * f64(u[0].D)),
    "replacement": ((96, 40), Target("m"), [Replacement(weight=rand(96, 40))], lambda _, u: f64(u[0].weight)),
    "rows": (
        (50, 16), Target("m", "in out *k"), [Rows(index=torch.tensor([3, 49]), values=rand(2, 16))],
        lambda W, u: np.concatenate([W[:, :3], f64(u[0].values)[:1].T, W[:, 4:49], f64(u[0].values)[1:].T], 1),
    ),
    "replacement_then_lora": (
        (96, 40), Target("m"), [Replacement(weight=rand(96, 40)), lora(96, 40)],
        lambda _, u: f64(u[0].weight) + lora_delta(u[1]),
    ),
}  # fmt: skip


def big_base(folder: Path, shards: int = 3) -> tuple[Path, ak.Adapter]:
    tensors = {f"layers.{i}.q.weight": rand(300, 200, seed=i).bfloat16() for i in range(6)}
    tensors |= {f"layers.{i}.norm.weight": rand(300, seed=i).bfloat16() for i in range(6)}
    tensors |= {"count": torch.tensor([3]), "mask": torch.tensor([True, False])}
    adapter = ak.Adapter({Target(f"layers.{i}.q"): (lora(300, 200, seed=i),) for i in range(4)})
    return save_base(folder, tensors, shards), adapter

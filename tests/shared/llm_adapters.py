"""A small Llama, adapters for it, and a path for the files of each format, for tests of language models' formats."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.io.lazy import as_lazy, from_numpy
from adapterkit.methods.lora import LoRA

VECTORS = Path(__file__).parents[2] / "spec" / "vectors"
BASE = VECTORS / "bases" / "llama"
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip

FILES = {
    "gguf": "a.gguf", "litgpt": "folder", "loralib": "lora.pt", "megatron": "a.safetensors", "minlora": "lora.pt",
    "mlx": "folder", "nemo": "a.nemo", "olive": "a.onnx_adapter", "onnx_adapter": "b.onnx_adapter",
    "tensorrt_llm": "folder", "tinker": "folder", "torchtune": "adapter_model.pt",
}  # fmt: skip
"""Format -> a valid name of its file or folder."""


def lora(out, in_, rank=2, scaling=2.0, seed=0, dtype="f4", **fields):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(rank, in_)).astype(dtype), rng.normal(size=(out, rank)).astype(dtype)
    return LoRA(A=from_numpy(A), B=from_numpy(B), scaling=scaling, **fields)


def llama(layers=(0, 1), names=tuple(SHAPES), **fields):
    """Return a LoRA of each of these modules."""
    paths = [(f"model.layers.{layer}.{name}", SHAPES[name]) for layer in layers for name in names]
    return ak.Adapter({ak.Target(p): (lora(*s, seed=i, **fields),) for i, (p, s) in enumerate(paths)})


def deltas(adapter):
    """Return the change of each weight by LoRAs, in float64."""

    def whole(update):
        A, B = (as_lazy(leaf).numpy().astype("f8") for leaf in (update.A, update.B))
        return update.scaling * B @ A.reshape(len(A), -1)

    return {str(target): sum(map(whole, updates)) for target, updates in adapter.updates.items()}


def place(folder, name):
    """Return a path for a file of a format, in a separate folder."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    return own / FILES[name]


def content(path):
    """Return the bytes of a file and the files beside it, or of each file of a folder."""
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}


def merged(base, adapter, out):
    """Return the weights of a base with a merged adapter."""
    ak.merge(base, [adapter], out)
    return {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}


def write_base(folder, config, shapes):
    """Write a base with these shapes."""
    rng = np.random.default_rng(9)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FOLDERS = {"adapterhub", "litgpt", "mlx", "peft", "shared_outer", "tensorrt_llm", "tinker"}

OTHERS = {"keras_hub": "a.lora.h5", "nola": "a.pt"}
"""Formats whose files need a suffix of their own."""


def where(folder, name):
    """Return a path for a format's files in a folder."""
    if name in FILES:
        return place(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (name if name in FOLDERS else OTHERS.get(name, "a.safetensors"))

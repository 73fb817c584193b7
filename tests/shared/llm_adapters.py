"""What tests of language models' formats share: a small Llama, adapters of it, and a place for each format's files."""

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
"""format -> what a file or folder of it may be called."""


def lora(out, in_, rank=2, scaling=2.0, seed=0, dtype="f4", **fields):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(rank, in_)).astype(dtype), rng.normal(size=(out, rank)).astype(dtype)
    return LoRA(A=from_numpy(A), B=from_numpy(B), scaling=scaling, **fields)


def llama(layers=(0, 1), names=tuple(SHAPES), **fields):
    """A LoRA of each of these modules."""
    paths = [(f"model.layers.{layer}.{name}", SHAPES[name]) for layer in layers for name in names]
    return ak.Adapter({ak.Target(p): (lora(*s, seed=i, **fields),) for i, (p, s) in enumerate(paths)})


def deltas(adapter):
    """What LoRAs add to each weight, in float64."""

    def whole(update):
        A, B = (as_lazy(leaf).numpy().astype("f8") for leaf in (update.A, update.B))
        return update.scaling * B @ A.reshape(len(A), -1)

    return {str(target): sum(map(whole, updates)) for target, updates in adapter.updates.items()}


def place(folder, name):
    """A path for a file of a format, in a folder of its own."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    return own / FILES[name]


def content(path):
    """The bytes of a file, or of each file of a folder, and what lies beside it."""
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in path.parent.rglob("*") if file.is_file()}


def merged(base, adapter, out):
    """The weights of a base with an adapter folded in."""
    ak.merge(base, [adapter], out)
    return {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}


def write_base(folder, config, shapes):
    """A base of these shapes."""
    rng = np.random.default_rng(9)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


FOLDERS = {"adapterhub", "litgpt", "mlx", "peft", "shared_outer", "tensorrt_llm", "tinker"}


def where(folder, name):
    """A path for a format's files in a folder."""
    if name in FILES:
        return place(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (name if name in FOLDERS else "a.pt" if name == "nola" else "a.safetensors")

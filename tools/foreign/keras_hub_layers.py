"""Checks spec/keras_hub.toml with keras-hub: the layers' numbers, names and kernels, and the changes that it loads.

    python tools/foreign/keras_hub_layers.py     needs keras-hub, torch and adapterkit; exit code 1 if something differs

For each model type, a small backbone of Keras Hub shows its layers. Then adapterkit writes an adapter of all modules,
with an alpha other than the rank, for a base of the same sizes. Keras Hub loads the file, and the change of each kernel
is compared with scaling * B @ A in float64.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras_hub
import numpy as np
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.formats.keras_hub import families
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA

HIDDEN, INNER, HEADS, KV, DIM, BLOCKS = 24, 40, 4, 2, 8, 3
CLOSE = 1e-6
COMMON = {"vocabulary_size": 16, "num_layers": BLOCKS, "num_query_heads": HEADS, "hidden_dim": HIDDEN}
HF = {
    "vocab_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "hidden_size": HIDDEN,
    "intermediate_size": INNER,
}  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama3Backbone", {}),
    "mistral": ("MistralBackbone", {}),
    "qwen2": ("QwenBackbone", {}),
    "qwen3": ("Qwen3Backbone", {"head_dim": DIM}),
    "gemma": ("GemmaBackbone", {"head_dim": DIM}),
    "gemma2": ("GemmaBackbone", {"head_dim": DIM, "use_post_ffw_norm": True, "use_post_attention_norm": True}),
}
"""transformers' model type -> the class in Keras Hub, and its arguments."""


def main() -> int:
    """How many checks failed."""
    failed = 0
    if MODELS.keys() != families().keys():
        failed += 1
        print(f"not checked: {', '.join(MODELS.keys() ^ families().keys())}")
    for kind, (name, extra) in MODELS.items():
        for kv in (KV, 1):
            worst = layers_and_changes(kind, name, extra, kv)
            failed += not worst < CLOSE
            print(f"{kind:<8}{kv} key heads: largest difference {worst:.1e}{'' if worst < CLOSE else ': WRONG'}")
    return failed


def layers_and_changes(kind: str, name: str, extra: dict[str, Any], kv: int) -> float:
    """Return the largest difference of a kernel's change, relative to its largest value; infinity for a wrong layer."""
    dim = extra.get("head_dim", HIDDEN // HEADS)
    inner = 2 * INNER if kind.startswith("gemma") else INNER
    backbone = getattr(keras_hub.models, name)(**COMMON, num_key_value_heads=kv, intermediate_dim=inner, **extra)
    layers = [each for each in backbone._flatten_layers(include_self=False) if each.weights]
    family = families()[kind]
    shapes = {
        "self_attn.q_proj": (HEADS * dim, HIDDEN), "self_attn.k_proj": (kv * dim, HIDDEN),
        "self_attn.v_proj": (kv * dim, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * dim),
        "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    random, changes, updates, weights, held = np.random.default_rng(0), {}, {}, {}, {}
    for block in range(BLOCKS):
        for own, layer in family.layers.items():
            number, (out, width) = family.number(block, layer), shapes[own]
            if layers[number].name != layer.name:
                print(f"{kind}: layer {number} is {layers[number].name}, not {layer.name}")
                return float("inf")
            A, B = random.normal(size=(3, width)).astype("f4"), random.normal(size=(out, 3)).astype("f4")
            path = f"model.layers.{block}.{own}"
            updates[ak.Target(path)] = (LoRA(A=from_numpy(A), B=from_numpy(B), scaling=2.5),)
            weights[f"{path}.weight"] = np.zeros((out, width), "f4")
            changes[path], held[path] = 2.5 * B.astype("f8") @ A, number
    before = {path: kernel(layers[number]) for path, number in held.items()}
    with tempfile.TemporaryDirectory() as temporary:
        base, file = Path(temporary, "base"), Path(temporary, "adapter.lora.h5")
        base.mkdir()
        save_file(weights, base / "model.safetensors")
        config = {"model_type": kind, **HF, "num_key_value_heads": kv, "head_dim": dim}
        (base / "config.json").write_text(json.dumps(config))
        ak.write(ak.Adapter(updates), file, "keras_hub", base, on_loss="fold")
        with h5py.File(file) as held_file:
            rank = int(held_file["lora/vars/rank"][()])
        backbone.enable_lora(rank, target_layer_names=[layer.name for layer in family.layers.values()])
        backbone.load_lora_weights(str(file))
    worst = 0.0
    for path, number in held.items():
        layer = family.layers[path.split(".", 3)[3]]
        change = kernel(layers[number]) - before[path]
        axes = layer.axes.split()
        if axes[0] == "heads" and axes[1] == "in":
            change = change.transpose(1, 0, 2)
        assert len(change.shape) == len(axes)
        change = change.reshape(changes[path].shape[::-1]).T
        worst = max(worst, float(np.abs(change - changes[path]).max() / np.abs(changes[path]).max()))
    return worst


def kernel(layer: Any) -> Any:
    """The kernel of a layer, with its LoRA, in float64."""
    value = layer.kernel
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, "f8")


if __name__ == "__main__":
    sys.exit(main())

"""Keras Hub: its own Llama with LoRA, its own file, its own merge."""

import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import keras_hub
import numpy as np

CASES = {
    "qv": ["query", "value"],
    "every": [
        "query", "key", "value", "attention_output", "feedforward_gate_dense", "feedforward_intermediate_dense",
        "feedforward_output_dense",
    ],
}  # fmt: skip
FILE = "adapter.lora.h5"
BASE = Path(__file__).resolve().parents[3] / "spec" / "vectors" / "bases" / "llama"
RANK = 2

NAMES = {
    "self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "value",
    "self_attn.o_proj": "attention_output", "mlp.gate_proj": "feedforward_gate_dense",
    "mlp.up_proj": "feedforward_intermediate_dense", "mlp.down_proj": "feedforward_output_dense",
}  # fmt: skip


def model():
    """The base, converted by Keras Hub."""
    return keras_hub.models.LlamaBackbone.from_preset(str(BASE), dtype="float32")


def layer(backbone, block, name):
    """A layer of a block, by its name."""
    whole = backbone.get_layer(f"transformer_layer_{block}")
    return next(each for each in whole._flatten_layers(include_self=False) if each.name == name)


def write(folder, _base, case):
    """Lets the tool save an adapter."""
    backbone, rng = model(), np.random.default_rng(3)
    backbone.enable_lora(RANK, target_layer_names=CASES[case])
    for block in range(backbone.num_layers):
        for name in CASES[case]:
            for value in (layer(backbone, block, name).lora_kernel_a, layer(backbone, block, name).lora_kernel_b):
                value.assign(rng.normal(size=value.shape).astype("f4"))
    backbone.save_lora_weights(str(folder / FILE))


def merged(folder, base):
    """What the tool loads from a file, folded into the base."""
    backbone = model()
    # A file has the numbers of all layers that were adapted.
    with h5py.File(folder / FILE) as file:
        rank, held = int(file["lora/vars/rank"][()]), {int(key) for key in file["lora"] if key != "vars"}
    layers = [each for each in backbone._flatten_layers(include_self=False) if each.weights]
    backbone.enable_lora(rank, target_layer_names=sorted({layers[number].name for number in held}))
    backbone.load_lora_weights(str(folder / FILE))
    found = {}
    for block in range(backbone.num_layers):
        for own, name in NAMES.items():
            one = layer(backbone, block, name)
            kernel = one.kernel  # With the LoRA added.
            value = np.asarray(kernel.detach().cpu() if hasattr(kernel, "detach") else kernel)
            key = f"model.layers.{block}.{own}.weight"
            found[key] = value.reshape(base[key].shape[::-1]).T
    return {key: value for key, value in found.items() if not np.array_equal(value, base[key])}

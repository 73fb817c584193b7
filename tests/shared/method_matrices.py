"""The vectors of methods as layers of small models, with the weights that an independent formula gives."""

from functools import cache

import numpy as np
from llm_adapters import VECTORS, write_base
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.io.computed import load
from adapterkit.io.lazy import as_lazy, from_numpy

LANGUAGE, IMAGE = "model.layers.{n}.mlp.down_proj", "unet.down_blocks.0.attentions.{n}.transformer_blocks.0.attn1.to_q"
LLAMA = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 4}


@cache
def cases(method, kind="f8"):
    """Return (update, W, W') of each plain matrix of a vector, with factors in one dtype; read once for all formats."""
    adapters = sorted((VECTORS / "methods").glob(f"{method}.*adapter.safetensors"), key=lambda path: len(path.name))
    return [case for adapter in adapters for case in _cases(adapter, kind)]


def _cases(adapter, kind):
    held = load_file(adapter.with_name(adapter.name.replace(".adapter.", ".expected.")))
    for target, updates in ak.read(adapter).updates.items():
        plain = target == Target(target.path) and len(updates) == 1 and not updates[0].changes_bias
        W, merged = held.get(f"{target}.weight"), held.get(f"{target}.merged.weight")
        if plain and W is not None and merged is not None and W.ndim == 2:
            for array in (W, merged):
                array.setflags(write=False)
            yield updates[0].map(lambda leaf: _typed(leaf, kind)), W, merged


def _typed(leaf, kind):
    return from_numpy(load(leaf).astype(kind)) if as_lazy(leaf).dtype.floating else leaf


def model(found, pattern, folder):
    """Return an adapter of such cases, its model, and the expected weights."""
    paths = [pattern.format(n=n) for n in range(len(found))]
    adapter = ak.Adapter({Target(path): (update,) for path, (update, _, _) in zip(paths, found, strict=True)})
    base = write_base(folder, LLAMA | {"num_hidden_layers": len(found)}, {})
    weights = {f"{path}.weight": W.astype("f4") for path, (_, W, _) in zip(paths, found, strict=True)}
    if pattern == LANGUAGE:  # litgpt needs the widths of the other layers.
        for word in ("gate", "up"):
            weights |= {key.replace("down", word): W.T.copy() for key, W in weights.items() if "down" in key}
    save_file(weights, base / "model.safetensors")
    return adapter, base, {path: merged for path, (_, _, merged) in zip(paths, found, strict=True)}


def made_of(adapter, weights):
    """Return W' at each target of an adapter, in float64; W for a target that has an update without effect."""
    new = {}
    for target, updates in adapter.updates.items():
        W = weights.get(target.path)
        for update in updates if W is not None else ():
            W = update.map(load).new_weight(W)
        new[target.path] = W
    return {path: W for path, W in new.items() if W is not None}


def close(new, expected, weights, tolerance):
    """Whether the changes are the same, relative to the largest of each; a missing target has no change."""
    for path, wanted in expected.items():
        W = weights[path]
        error, size = np.abs(new.get(path, W) - wanted).max(), np.abs(wanted - W).max()
        assert error <= tolerance * max(size, np.abs(W).max() * (path in new)), path

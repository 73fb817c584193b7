"""The library as a program that `adapterkit conformance` can call (README, section 16).

python reader.py check FILE...               python reader.py base FOLDER...        python reader.py canonical FILE...
python reader.py compute ADAPTER BASE        python reader.py merge ADAPTER BASE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import adapterkit as ak
from adapterkit.core.adapter import canonical
from adapterkit.errors import AdapterkitError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.strict_json import load_json


def check(path: str) -> dict[str, Any]:
    """Read an adapter, its values included."""
    adapter = ak.read(path, format="adapterkit")
    adapter.check_values()
    return {"ok": True, "targets": [str(target) for target in adapter.updates], "digest": adapter.digest()}


def base(path: str) -> dict[str, Any]:
    """Open a base."""
    tensors = open_checkpoint(path).tensors
    return {"ok": True, "tensors": {name: [leaf.dtype.name, list(leaf.shape)] for name, leaf in tensors.items()}}


def compute(adapter: str, base: str) -> dict[str, Any]:
    """Merge each target of a vector that is of weights, in float64; outputs of layers are left to live models."""
    import tempfile

    from safetensors.numpy import load_file, save_file

    held = ak.read(adapter, format="adapterkit")
    tensors = open_checkpoint(base).tensors
    outputs: dict[str, Any] = {}
    for target, updates in held.updates.items():
        if any(update.kind not in ("additive", "weight") for update in updates):
            outputs[target.path] = {"ok": False, "error": "Unsupported", "where": str(target)}
            continue
        with tempfile.TemporaryDirectory() as folder:
            names = {f"{target.path}.{leaf}" for leaf in ("weight", "bias")}
            own = {name: np.ascontiguousarray(tensors[name].numpy()) for name in names if name in tensors}
            save_file(own, Path(folder, "base.safetensors"))
            one = held.replace(updates=held.find(target.path))
            ak.merge(Path(folder, "base.safetensors"), one, Path(folder, "out.safetensors"), dtype="F64")
            merged = load_file(Path(folder, "out.safetensors"))
        outputs[target.path] = {
            f"merged.{name.rpartition('.')[2]}": {"shape": list(array.shape), "values": array.reshape(-1).tolist()}
            for name, array in merged.items()
        }
    return {"ok": True, "outputs": outputs}


def merge(adapter: str, base: str) -> dict[str, Any]:
    """Merge an adapter into a base of one file."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ak.merge(base, adapter, Path(folder, "out.safetensors"))
        tensors = open_checkpoint(Path(folder, "out.safetensors")).tensors
        found = {name: [leaf.dtype.name, list(leaf.shape), bytes(leaf.fetch()).hex()] for name, leaf in tensors.items()}
    return {"ok": True, "tensors": found}


def canonical_texts(path: str) -> dict[str, Any]:
    """The texts of JSON in a file, each as canonical JSON."""
    texts = json.loads(Path(path).read_text("utf-8"))
    return {"ok": True, "canonical": [canonical(load_json(each["json"])) for each in texts]}


def _told(run: Callable[..., dict[str, Any]], *paths: str) -> dict[str, Any]:
    try:
        return run(*paths)
    except AdapterkitError as error:
        return {"ok": False, "error": type(error).__name__, "where": error.where or ""}


if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    groups = [paths] if verb in ("compute", "merge") else [[path] for path in paths]
    for group in groups:
        run = {"check": check, "base": base, "compute": compute, "merge": merge, "canonical": canonical_texts}[verb]
        print(json.dumps({"path": group[0], **_told(run, *group)}))

"""The library as a program that `adapterkit conformance` can call (README, section 16).

python reader.py check FILE...               python reader.py base BASE...          python reader.py canonical FILE...
python reader.py rules FILE...
python reader.py compute ADAPTER BASE        python reader.py merge ADAPTER BASE
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import adapterkit as ak
from adapterkit.core.adapter import Adapter, canonical
from adapterkit.core.updates.rules import value_of
from adapterkit.errors import AdapterkitError, Malformed, StorageError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.strict_json import load_json

if TYPE_CHECKING:
    from torch import Tensor

CONTEXTS = ("embeddings", "decoder_embeddings", "past", "vocabulary")
"""What updates of context add without an input."""


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
    """Return what comes out at each path of a vector, all updates of its targets applied."""
    read, arrays = ak.read(adapter, format="adapterkit"), open_checkpoint(base).tensors
    outputs = {}
    for path in dict.fromkeys(target.path for target in read.updates):
        start = f"{path or '(model)'}."
        held = {name.removeprefix(start): leaf.torch() for name, leaf in arrays.items() if name.startswith(start)}
        given = {name: value for name, value in held.items() if not name.startswith("merged.") and name != "y"}
        outputs[path] = _told(lambda found, given=given: _outputs(found, given), read.replace(updates=read.find(path)))
    return {"ok": True, "outputs": outputs}


def _outputs(adapter: Adapter, held: Mapping[str, Tensor]) -> dict[str, Any]:
    kinds = {update.kind for _, update in adapter}
    if kinds == {"context"}:
        found = _contexts(adapter, held)
    elif kinds <= {"additive", "weight"}:
        found = _merged(adapter, held) | {"y": _live(adapter, held)}
    else:
        weights = adapter.replace(
            updates={
                target: kept
                for target, own in adapter.updates.items()
                if (kept := tuple(update for update in own if update.kind in ("additive", "weight")))
            }
        )
        if weights.updates:
            _merged(weights, held)  # Its faults come before those of outputs.
        found = {"y": _live(adapter, held)}
        if not found["y"].isfinite().all():
            (path,) = {target.path for target in adapter.updates}
            raise Malformed("what comes out is no number", where=f"{path}.y", cure="Look at the factors")
    return {
        name: {"shape": list(value.shape), "values": value.double().reshape(-1).tolist()}
        for name, value in found.items()
    }


def _contexts(adapter: Adapter, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    ((_, update),) = adapter.load(dtype=torch.float64)
    formulas: Any = update
    found = {name: getattr(formulas, name)() for name in CONTEXTS}
    if formulas.place == "attention":
        found["attention"] = formulas.attention(*(held[name] for name in "qkv"))
    if formulas.place == "prefix":
        found["prefix"] = formulas.prefix(held["x"])
    return {name: value for name, value in found.items() if value is not None}


def _merged(adapter: Adapter, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge into a base that has nothing but this path, in float64."""
    from safetensors.torch import load_file, save_file

    (path,) = {target.path for target in adapter.updates}
    names = {leaf: f"{path}.{leaf}" for leaf in ("weight", "bias") if leaf in held}
    with tempfile.TemporaryDirectory() as folder:
        source, out = (Path(folder, f"{name}.safetensors") for name in ("base", "out"))
        save_file({name: held[leaf].contiguous() for leaf, name in names.items()}, source)
        ak.merge(source, adapter, out, dtype="F64")
        merged = load_file(out)
    return {f"merged.{leaf}": merged[name] for leaf, name in names.items()}


def _live(adapter: Adapter, held: Mapping[str, Tensor]) -> Tensor:
    """Attach the updates to a live layer in float64, and call it."""
    import torch
    from vector_layers import layer_and_path

    held = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    first = next(iter(adapter.updates))
    residuals = (getattr(update, "residual", "") for _, update in adapter)
    residual = next((str(path) for path in residuals if path), "")
    model, path = layer_and_path(first.layout, held, residual)
    placed = adapter.replace(updates={replace(target, path=path): own for target, own in adapter.updates.items()})
    call = {name.removeprefix("call."): value for name, value in held.items() if name.startswith("call.")}
    call.pop("hidden_states", None)  # The model gives them by itself.
    inputs = [held[name] for name in ("x", "added") if name in held]
    try:
        ak.torch.inject(model, placed)
        with torch.no_grad():
            y: Tensor = model(*inputs, **call)
    except AdapterkitError as error:
        error.where = first.path + (error.where or "").removeprefix(path)
        raise
    return y


def merge(adapter: str, base: str) -> dict[str, Any]:
    """Merge an adapter into a base of one file."""
    read = ak.read(adapter, format="adapterkit")  # Its faults are named before the base's.
    with tempfile.TemporaryDirectory() as folder:
        ak.merge(base, read, Path(folder, "out.safetensors"))
        tensors = open_checkpoint(Path(folder, "out.safetensors")).tensors
        found = {name: [leaf.dtype.name, list(leaf.shape), bytes(leaf.fetch()).hex()] for name, leaf in tensors.items()}
    return {"ok": True, "tensors": found}


def canonical_texts(path: str) -> dict[str, Any]:
    """The texts of JSON in a file, each as canonical JSON."""
    texts = json.loads(Path(path).read_text("utf-8"))
    return {"ok": True, "canonical": [canonical(load_json(each["json"])) for each in texts]}


def rules(path: str) -> dict[str, Any]:
    """The values of expressions of rules, for the axes, attributes and tensors that stand beside each."""
    cases = json.loads(Path(path).read_text("utf-8"))
    found = [value_of(each["expression"], each["axes"] | each["attributes"], each["tensors"]) for each in cases]
    return {"ok": True, "values": [canonical(value) for value in found]}


def _told(run: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return run(*given)
    except AdapterkitError as error:
        # A path that cannot be read is `UsageError` in the specification's classes, at any place.
        name = "UsageError" if isinstance(error, StorageError) else type(error).__name__
        return {"ok": False, "error": name, "where": error.where or ""}


VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    "check": check,
    "base": base,
    "compute": compute,
    "merge": merge,
    "canonical": canonical_texts,
    "rules": rules,
}

if __name__ == "__main__":
    verb, *paths = sys.argv[1:]
    for group in [paths] if verb in ("compute", "merge") else [[path] for path in paths]:
        print(json.dumps({"path": group[0], **_told(VERBS[verb], *group)}))

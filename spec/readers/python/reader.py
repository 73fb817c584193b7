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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target, canonical
from adapterkit.core.shapes import value_of
from adapterkit.core.updates import Update
from adapterkit.errors import AdapterkitError, Malformed, StorageError, Unsupported, UsageError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.strict_json import load_json
from adapterkit.methods._bottleneck import Sublayer
from adapterkit.methods._grouped import AcrossGroups
from adapterkit.methods.invertible import Invertible
from adapterkit.methods.reft import ReFT
from adapterkit.naming.binding import Site, check_site

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
    """What comes out at a path; its faults are looked for in the order of section 16."""
    first = next(iter(adapter.updates))
    if any(update.kind == "context" for _, update in adapter):
        if len(list(adapter)) > 1:
            raise Unsupported("an update of context beside another", where=str(first), cure="Take one of them out")
        found = _contexts(adapter, held)
        for name, value in found.items():
            if not value.isfinite().all():
                raise Malformed("what comes out is no number", where=f"{first}.{name}", cure="Look at the tensors")
    else:
        found = _changed(adapter, held)
    return {
        name: {"shape": list(value.shape), "values": value.double().reshape(-1).tolist()}
        for name, value in found.items()
    }


def _attended(update: Any, given: list[Tensor | None]) -> bool:
    """Whether what enters an attention suits the formula."""
    if any(t is None or not t.is_floating_point() for t in given):
        return False
    shapes = [list(t.shape) for t in given if t is not None]
    dims = update.dims()
    if len(given) == 1:
        return len(shapes[0]) == 3 and shapes[0][2] == dims.get("width") and shapes[0][1] > 0
    q, k, v = shapes
    return (
        len(q) == 4
        and len(k) == 3
        and k == v
        and k[1] == len(update.P)
        and k[2] == q[3]
        and k[0] == q[1]
        and len(update.gate) in (1, q[1])
    )


def _changed(adapter: Adapter, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The merged weight and bias and the output of a layer; the output alone behind an update of kind `output`."""
    from vector_layers import suited

    weights: dict[Target, tuple[Update, ...]] = {}
    outputs: dict[Target, tuple[Update, ...]] = {}
    for target, own in adapter.updates.items():
        for updates, of in ((weights, ("additive", "weight")), (outputs, ("output",))):
            if kept := tuple(update for update in own if update.kind in of):
                updates[target] = kept
    first = next(iter(adapter.updates))
    merged = _merged(adapter.replace(updates=weights), held)
    _check_types(adapter, held)
    (hidden,) = {_hidden(update) for own in outputs.values() for update in own if _hidden(update)} or {None}
    given = suited(held, first.layout, hidden)
    if not any(isinstance(update, Sublayer) for own in outputs.values() for update in own):
        given = {name: value for name, value in given.items() if name not in ("added", "norm_weight", "norm_bias")}
    if not outputs:
        y = _live(adapter, given) if "x" in given else None
        return merged if y is None or not y.isfinite().all() else merged | {"y": y}
    _check_outputs(outputs, held, given, first.layout)
    y = _live(adapter, given)
    if not y.isfinite().all():
        raise Malformed("what comes out is no number", where=f"{first.path}.y", cure="Look at the factors")
    return {"y": y}


def _hidden(update: Update) -> int | None:
    """The channels of `hidden_states` that a formula reads."""
    if "hidden_states" not in getattr(update, "asks", ()):
        return None
    dims: Mapping[str, Any] = update.dims()
    hidden: int | None = dims.get("hidden", dims.get("size"))
    return hidden


def _check_outputs(
    outputs: Mapping[Target, tuple[Update, ...]], held: Mapping[str, Tensor], given: Mapping[str, Tensor], layout: str
) -> None:
    """What the weight, the call and the block do not have of all that updates of outputs need."""
    from vector_layers import convolves, layer_shape, whole

    shapes = {name: tuple(held[name].shape) for name in ("weight", "bias") if name in held}
    for target in outputs:
        if target.rows is not None or target.stacked:
            raise Unsupported("an output update of a slice, or of experts", where=str(target), cure="Take it out")
    for target, own in outputs.items():
        # A residual is told by `added` here, which the update itself does not know.
        own = tuple(replace(update, residual="first") if isinstance(update, Sublayer) else update for update in own)
        check_site(Site(target, own, *(name if name in shapes else None for name in ("weight", "bias"))), shapes)
    for target, own in outputs.items():
        for update in own:
            asked = {"x", *(f"call.{name}" for name in getattr(update, "asks", ()))}
            asked |= {"added"} if getattr(update, "residual", "") else set()
            asked |= {"norm_weight"} if getattr(update, "norm", "") else set()
            if getattr(update, "norm", "") and not getattr(update, "original_ln_after", True):
                raise Unsupported("leaves out a norm of the block", where=str(target), cure="Set original_ln_after")
            if getattr(update, "lacks_experts", False) or not asked <= given.keys():
                lacks = ", ".join(sorted(asked - given.keys())) or "experts"
                raise UsageError(f"its formula needs {lacks}", where=str(target), cure="Give it with the base")
    for target, own in outputs.items():
        beside = {(update.residual, update.norm) for update in own if isinstance(update, Sublayer)}
        tokens, conv = whole(given["x"]), convolves(target.layout, given["weight"])
        axes = given["x"].ndim + tokens  # of the output
        strange = (
            any(_parallel(update, given) for update in own) and layer_shape(target.layout, given) != given["x"].shape
        )
        strange |= (
            target.layout != layout
            or axes < 2
            or len(beside) > 1
            or (tokens and any(_reads(update, given) for update in own))
        )
        strange |= axes > 3 and any(isinstance(update, ReFT) for update in own)
        grouped = [update for update in own if isinstance(update, AcrossGroups)]
        strange |= bool(grouped) and conv and target.layout == "in out *k"
        strange |= any(given["x"].shape[1 if conv else -1] != update.A.shape[1] for update in grouped)
        strange |= "added" in given and any(
            isinstance(b, Sublayer) and not isinstance(a, Sublayer) for a, b in pairwise(own)
        )
        if strange:
            raise Unsupported("no formula says what comes out (R-13.4)", where=str(target), cure="Take it out")


def _reads(update: Update, given: Mapping[str, Tensor]) -> bool:
    """Whether a formula computes with x itself, not by way of the layer alone."""
    if isinstance(update, Sublayer):
        return _parallel(update, given)
    return update.reverse if isinstance(update, Invertible) else not isinstance(update, ReFT)


def _parallel(update: Update, given: Mapping[str, Tensor]) -> bool:
    """Whether it reads x because the target has no residual."""
    return isinstance(update, Sublayer) and update.parallel and "added" not in given


def _contexts(adapter: Adapter, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    ((_, update),) = adapter.load(dtype=torch.float64)
    formulas: Any = update
    found = {name: getattr(formulas, name)() for name in CONTEXTS}
    if formulas.place in ("attention", "prefix"):
        asked = ["q", "k", "v"] if formulas.place == "attention" else ["x"]
        (target,) = adapter.updates
        if not _attended(formulas, [held.get(name) for name in asked]):
            why = f"its formula needs {', '.join(asked)}"
            raise UsageError(why, where=str(target), cure="Give them with the base")
        found[formulas.place] = getattr(formulas, formulas.place)(*(held[name].double() for name in asked))
    return {name: value for name, value in found.items() if value is not None}


def _merged(adapter: Adapter, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Merge into a base that has nothing but this path, in float64; an adapter without updates changes nothing."""
    from safetensors.torch import load_file, save_file

    if not adapter.updates:
        return {}
    (path,) = {target.path for target in adapter.updates}
    names = {leaf: f"{path}.{leaf}" for leaf in ("weight", "bias") if leaf in held}
    with tempfile.TemporaryDirectory() as folder:
        source, out = (Path(folder, f"{name}.safetensors") for name in ("base", "out"))
        save_file({name: held[leaf].contiguous() for leaf, name in names.items()}, source)
        ak.plan(source, adapter, dtype="F64")  # What does not fit is told before types, and they before numbers.
        _check_types(adapter, held)
        ak.merge(source, adapter, out, dtype="F64")
        merged = load_file(out)
    return {f"merged.{leaf}": merged[name] for leaf, name in names.items()}


def _check_types(adapter: Adapter, held: Mapping[str, Tensor]) -> None:
    """The weight and the bias are of types that a merge writes, also where they do not change."""
    path = next(iter(adapter.updates)).path
    for leaf in ("weight", "bias"):
        if leaf in held and (not held[leaf].is_floating_point() or str(held[leaf].dtype) == "torch.float8_e8m0fnu"):
            why = f"a {leaf} of type {held[leaf].dtype}"
            raise Unsupported(why, where=f"{path}.{leaf}", cure="Give the base in a type of floats")


def _live(adapter: Adapter, held: Mapping[str, Tensor]) -> Tensor:
    """Attach the updates to a live layer in float64, and call it."""
    import torch
    from vector_layers import layer_and_path

    held = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    if not held["x"].is_floating_point():
        held["x"] = held["x"].long()
    first = next(iter(adapter.updates))
    residuals = (getattr(update, "residual", "") for _, update in adapter)
    residual = next((str(path) for path in residuals if path), "")
    model, path = layer_and_path(first.layout, held, residual)
    placed = adapter.replace(
        updates={
            replace(target, path=path): tuple(_beside(update) for update in own)
            for target, own in adapter.updates.items()
        }
    )
    call = {name.removeprefix("call."): value for name, value in held.items() if name.startswith("call.")}
    call.pop("hidden_states", None)  # The model gives them by itself.
    if "mask" in call:
        call["attention_mask"] = call.pop("mask")
    inputs = [held[name] for name in ("x", "added") if name in held]
    try:
        ak.torch.inject(model, placed)
        with torch.no_grad():
            y: Tensor = model(*inputs, **call)
    except AdapterkitError as error:
        error.where = first.path + (error.where or "").removeprefix(path)
        raise
    return y


def _beside(update: Update) -> Update:
    """The update with the names that the modules beside a vector's layer have."""
    names = {"residual": "first", "norm": "last"}
    given = {name: word for name, word in names.items() if getattr(update, name, "")}
    if not getattr(update, "residual", "") and "norm" in given:
        given["norm"] = ""  # The target adds the residual itself, and holds the norm.
    placed: Any = update
    return replace(placed, **given) if given else update


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

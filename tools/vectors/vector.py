"""One method's vector: a native adapter with one target a case, and a base beside it with what must come out."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import methods
import numpy as np
from building import Case, Pair, Update
from container import Stored, layout, native, numbers, pack, stored
from layers import Array, apply

METHODS = Path(__file__).resolve().parents[2] / "spec" / "methods"


def vectors(method: str, cases: list[Case]) -> dict[str, bytes]:
    """File name -> content of a method's vectors: one for each version of the method, with the cases that need it."""
    versions: dict[int, list[Case]] = {}
    for case in cases:
        versions.setdefault(max(map(version_of, case.updates)), []).append(case)
    files: dict[str, bytes] = {}
    for version, own in versions.items():
        files |= _vector(method if version == 1 else f"{method}.{version}", own)
    return files


def version_of(update: Update) -> int:
    """The oldest version of a method that has all attributes of an update, by the method's entry in the spec."""
    entry = tomllib.loads((METHODS / f"{update.method}.toml").read_text("utf-8"))
    since = {attribute["name"]: attribute.get("since", 1) for attribute in entry.get("attributes", [])}
    return max((since[name] for name in update.attributes), default=1)


def spec_of(cases: list[Case]) -> str:
    """The oldest version of the spec that has the methods of these cases in their versions."""
    updates = [update for case in cases for update in case.updates]
    entries = {u.method: tomllib.loads((METHODS / f"{u.method}.toml").read_text("utf-8")) for u in updates}
    return max(str(entries[u.method]["since"][version_of(u) - 1]) for u in updates)


def _vector(method: str, cases: list[Case]) -> dict[str, bytes]:
    expected: dict[str, Stored] = {}
    for case in cases:
        expected |= {f"{case.name or '(model)'}.{name}": value for name, value in _expected(case).items()}
    return {
        f"{method}.adapter.safetensors": _adapter(cases),
        f"{method}.expected.safetensors": pack(*layout(expected)),
    }


def _adapter(cases: list[Case]) -> bytes:
    tensors: dict[str, Stored] = {}
    names: dict[int, str] = {}
    updates = [_record(case, position, tensors, names) for case in cases for position in range(len(case.updates))]
    return native({"version": spec_of(cases), "updates": updates}, tensors)


def _record(case: Case, position: int, tensors: dict[str, Stored], names: dict[int, str]) -> dict[str, Any]:
    """One update's record; an array that several updates hold is stored once."""
    update = case.updates[position]
    for field, array in update.tensors.items():
        if id(array) not in names:
            names[id(array)] = f"{case.name or 'model'}.{position}.{field}"
            tensors[names[id(array)]] = stored(array, _dtype(array, case))
    target: dict[str, Any] = {"path": case.name, "layout": case.layout}
    if case.rows:
        target["rows"] = case.rows
    return {
        "target": target,
        "method": update.method,
        "version": version_of(update),
        "tensors": {field: names[id(array)] for field, array in update.tensors.items()},
        "attributes": update.attributes,
    }


def _dtype(array: Array, case: Case) -> str:
    return {"int32": "I32", "int64": "I64"}.get(str(array.dtype), case.dtype)


def _expected(case: Case) -> dict[str, Stored]:
    if any(hasattr(methods.named(update.method), "context") for update in case.updates):
        (update,) = case.updates
        arrays = methods.named(update.method).context(**update.tensors, **update.attributes)
        return {name: stored(np.ascontiguousarray(array), "F64") for name, array in arrays.items()}
    W = numbers(f"{case.name}.W", *case.weight)
    b = None if case.bias is None else numbers(f"{case.name}.b", *case.bias)
    x = np.array([1, 0, 3]) if case.x is None else numbers(f"{case.name}.x", *case.x)
    arrays = {"weight": W, "bias": b, "x": x} | _outcome(case, x, _view(W, case.layout), b)
    return {
        name: stored(np.ascontiguousarray(a), "I64" if a.dtype == np.int64 else "F64")
        for name, a in arrays.items()
        if a is not None
    }


def _view(W: Array, stored_as: str) -> Array:
    """Stored to `[out, in, *k]` or `[e, out, in, *k]`, and back."""
    if stored_as == "in out *k":
        return W.swapaxes(0, 1)
    return W.swapaxes(1, 2) if stored_as == "e in out *k" else W


def _outcome(case: Case, x: Array, W: Array, b: Array | None) -> dict[str, Array | None]:
    """What must come out: y alone where a formula is not of weights."""
    if any(hasattr(methods.named(update.method), "output") for update in case.updates):
        beside = {name: numbers(f"{case.name}.{name}", *shape) for name, shape in case.beside.items()}
        call = {f"call.{name}": array for name, array in case.call.items()}
        return {**beside, **call, "y": _output(case, x, W, b, beside | case.call)}
    new_W, new_b = _merge(case, W, b)
    y = apply(case.layer, x, new_W, new_b)
    return {"merged.weight": _view(new_W, case.layout), "merged.bias": new_b, "y": y}


def _output(case: Case, x: Array, W: Array, b: Array | None, beside: dict[str, Array]) -> Array:
    if len(case.updates) > 1 or case.rows or case.stacked:
        raise ValueError(
            f"{case.name}: a formula that is not of weights stands alone, on a whole layer without experts"
        )
    (update,) = case.updates

    def layer(x: Array) -> Array:
        return apply(case.layer, x, W, b)

    formula = methods.named(update.method).output
    held = {"W": W, "b": b}
    held = {name: held[name] for name in held.keys() & inspect.signature(formula).parameters.keys()}
    return formula(x, layer, **held, **beside, **update.tensors, **update.attributes)


def _merge(case: Case, W: Array, b: Array | None) -> Pair:
    if not case.stacked:
        return _merge_one(case, W, b, lambda array: array)
    parts = [
        _merge_one(case, W[e], None if b is None else b[e], lambda array, e=e: array[e]) for e in range(W.shape[0])
    ]
    return np.stack([W for W, _ in parts]), None if b is None else np.stack([b for _, b in parts])


def _merge_one(case: Case, W: Array, b: Array | None, pick: Callable[[Array], Array]) -> Pair:
    start, stop = case.rows or (0, len(W))
    part, part_b = W[start:stop], None if b is None else b[start:stop]
    for update in case.updates:
        tensors = {field: pick(array) for field, array in update.tensors.items()}
        part, part_b = methods.named(update.method).formula(part, part_b, **tensors, **update.attributes)
    new_b = None if b is None else np.concatenate([b[:start], part_b, b[stop:]])
    return np.concatenate([W[:start], part, W[stop:]]), new_b

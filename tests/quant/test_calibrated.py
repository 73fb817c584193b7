"""Rounding by activations in every scheme: less is lost on inputs that occur, and in the directions of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.io import safetensors
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.computed import load
from adapterkit.io.lazy import from_numpy
from adapterkit.merging import keeping
from adapterkit.methods.lora import LoRA
from adapterkit.quant import dequantized

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "quant"
CASES = [
    path.parent for path in sorted(VECTORS.glob("*/*/config.json"))
    if path.parts[-3] != "hqq" and path.parent.name != "experts"
]  # fmt: skip
SIZE = 0.02
"""Size of the change, relative to the weight: less than a step of four bits."""

Array = np.ndarray[Any, Any]


def weight(case: Path) -> tuple[str, Array]:
    """The path of the packed layer, and the numbers that its own library computes with."""
    name, held = next(iter(safetensors.read(case / "expected.safetensors").items()))
    return name.removesuffix(".weight"), np.asarray(load(held), np.float64)


def inputs(width: int) -> Array:
    """Activations as those of language models: a few directions hold most of them."""
    random = np.random.default_rng(1)
    return random.normal(size=(256, 6)) @ random.normal(size=(6, width)) + 0.1 * random.normal(size=(256, width))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.relative_to(VECTORS).as_posix())
def test_less_is_lost_where_it_shows_and_verify_finds_the_same(case: Path, tmp_path: Path) -> None:
    path, W = weight(case)
    if W.ndim != 2:
        pytest.fail(f"{case} holds stacked weights: leave it out of CASES")
    random = np.random.default_rng(0)
    A, B = random.normal(size=(2, W.shape[1])), random.normal(size=(W.shape[0], 2))
    B *= SIZE * np.linalg.norm(W) / np.linalg.norm(B @ A)
    lora = LoRA(A=from_numpy(A.astype("f4")), B=from_numpy(B.astype("f4")), scaling=1.0)
    adapter, X = ak.Adapter({ak.Target(path): (lora,)}), inputs(W.shape[1])
    record = {"version": 1, "shared": {path: path}, "made_from": {}}
    file = tmp_path / "acts.safetensors"
    save_file({path: X.astype("f4")}, file, {"adapterkit_calibration": json.dumps(record)})
    exact, left = W + B @ A, {}
    options: dict[str, dict[str, Any]] = {"nearest": {}, "calibrated": {"keep": "adapter", "calibration": file}}
    # The rows that A spans, or fewer where a row of a few numbers cannot hold as many.
    V = np.linalg.svd(B @ A, full_matrices=False)[2][: max(1, min(2, W.shape[1] // 8))]
    for name, chosen in options.items():
        ak.merge(case, adapter, tmp_path / name, quantized="requantize", device="cpu", **chosen)
        (packed,) = dequantized(open_checkpoint(tmp_path / name)).packed.values()
        error = np.asarray(load(packed.lazy()), np.float64) - exact
        mean = (X**2).sum() / X.size
        left[name] = (np.linalg.norm(X @ error.T) ** 2 / len(X), 10 * mean * np.linalg.norm(V @ error.T) ** 2)
    ratio = sum(left["calibrated"]) / sum(left["nearest"])
    # A row of ten numbers has hardly a choice, and one scale for all numbers moves with each of them.
    assert ratio < (1.02 if W.shape[1] < 16 or case.name == "nvfp4" else 0.9), left
    assert ak.verify(tmp_path / "calibrated", case, adapter, calibration=file).ok


def test_the_second_pass_is_the_one_that_computes_every_error_anew() -> None:
    """The second pass updates the errors of the columns that changed; here E H E^T is computed for each block."""
    random = np.random.default_rng(2)
    M = random.normal(size=(12, 96)).astype("f4")
    H = inputs(96).T @ inputs(96) / 256 + 0.01 * np.eye(96)

    def trip(W: Array) -> Array:
        """Round to fifteen levels with a scale for each 32 columns of a row."""
        groups = W.reshape(len(W), -1, 32)
        scale = np.abs(groups).max(2, keepdims=True) / 7
        return np.asarray((np.rint(groups / scale) * scale).reshape(W.shape), np.float32)

    def lost(W: Array) -> Array:
        E = W.astype(np.float64) - M
        return np.asarray(np.diag(E @ H @ E.T))

    first = keeping._once(trip, M, H, 16)
    given = np.where((lost(trip(M)) < lost(trip(first)))[:, None], M, first)
    packed = trip(given)
    for start in range(0, 96, 16):
        now = slice(start, start + 16)
        tried = packed.copy()
        tried[:, now] -= np.linalg.solve(H[now, now], ((packed.astype(np.float64) - M) @ H[:, now]).T).T
        better = lost(trip(tried)) < lost(packed)
        given[better], packed[better] = tried[better], trip(tried)[better]
    assert lost(packed).sum() < 0.9 * lost(trip(first)).sum(), "the second pass does nothing here"
    np.testing.assert_allclose(trip(keeping.swept(trip, M, H)), packed, atol=1e-5)

"""Rounding that keeps the adapter, in every scheme: along the inputs that its change reads, by numpy's vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from quantized_vectors import CASES, VECTORS, adapter_for, name, stored
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.errors import UsageError

FOUR = VECTORS / "gptq" / "four"
SMALL = 0.02
"""Size of the change, relative to the weight: less than a step of four bits."""


def along(case: Path, error: np.ndarray, delta: np.ndarray) -> float:
    """The error for the inputs that a change of rank 2 reads, relative to the change."""
    if case.parent.name == "mxfp4":  # Its weights are stored [in, out].
        error, delta = error.swapaxes(-1, -2), delta.swapaxes(-1, -2)
    # A row of a few numbers holds one direction at most.
    count = 2 if delta.shape[-1] >= 16 else 1
    V = np.linalg.svd(delta, full_matrices=False)[2][..., :count, :].swapaxes(-1, -2)
    return float(np.linalg.norm(error @ V) / np.linalg.norm(delta @ V))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_more_of_the_change_is_there_than_to_the_nearest_and_verify_finds_the_same(case: Path, tmp_path: Path) -> None:
    adapter, W, delta = adapter_for(case, SMALL)
    left = {}
    for keep in (None, "adapter"):
        out = tmp_path / str(keep)
        ak.merge(case, adapter, out, quantized="requantize", keep=keep)
        left[keep] = along(case, stored(out) - (W.double().numpy() + delta), delta)
    wide = W.shape[-1 if case.parent.name != "mxfp4" else -2] >= 48
    assert left["adapter"] < (0.8 if wide else 1.0001) * left[None], left
    assert ak.verify(tmp_path / "adapter", case, adapter).ok


@pytest.mark.parametrize("size", [0.002, 1.0])
def test_a_tiny_change_and_a_large_one(size: float, tmp_path: Path) -> None:
    adapter, W, delta = adapter_for(FOUR, size)
    left = {}
    for keep in (None, "adapter"):
        ak.merge(FOUR, adapter, tmp_path / str(keep), quantized="requantize", keep=keep)
        left[keep] = along(FOUR, stored(tmp_path / str(keep)) - (W.double().numpy() + delta), delta)
    assert left["adapter"] < left[None], left


def test_no_change_keeps_every_byte(tmp_path: Path) -> None:
    adapter, _, _ = adapter_for(FOUR, 0.0)
    ak.merge(FOUR, adapter, tmp_path / "out", quantized="requantize", keep="adapter")
    ak.merge(FOUR, adapter, tmp_path / "plain", quantized="requantize")
    names = [file.name for file in FOUR.glob("*.safetensors") if file.name != "expected.safetensors"]
    for each in names:
        assert (tmp_path / "out" / each).read_bytes() == (tmp_path / "plain" / each).read_bytes()


def test_the_command_records_it_and_a_damaged_weight_is_found(tmp_path: Path) -> None:
    adapter, _, _ = adapter_for(FOUR, SMALL)
    ak.write(adapter, tmp_path / "lora", format="peft")
    words = ("merge", FOUR, tmp_path / "lora", "-o", tmp_path / "out", "--quantized", "requantize")
    said = run(*words, "--keep", "adapter", "--verify", "--json")
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    assert told["quantized"]["keep"] == "adapter"
    assert told["verification"]["ok"]
    both = run(*words, "--keep", "adapter", "--remainder", "4", "--overwrite")
    assert (both.exit_code, "Omit one of them" in both.output) == (2, True)
    # To the nearest is another merge: what is there is not taken for it.
    assert run(*words).exit_code != 0
    record = tmp_path / "out" / "adapterkit_merge.json"
    kept = json.loads(record.read_text())
    del kept["quantized"]["keep"]
    record.write_text(json.dumps(kept))
    assert not ak.verify(tmp_path / "out", FOUR, tmp_path / "lora").ok


def test_what_rounds_nothing_has_nothing_to_keep(tmp_path: Path) -> None:
    adapter, _, _ = adapter_for(FOUR, SMALL)
    with pytest.raises(UsageError, match="quantized again") as refused:
        ak.merge(FOUR, adapter, tmp_path / "out", quantized="dequantize", keep="adapter")
    assert "--quantized requantize --keep adapter" in str(refused.value.cure)
    with pytest.raises(UsageError, match="Known: adapter"):
        ak.plan(FOUR, adapter, quantized="requantize", keep="all")
    save_file({"m.weight": np.zeros((16, 64), np.float32)}, tmp_path / "plain.safetensors")
    with pytest.raises(UsageError, match="quantized again"):
        ak.merge(tmp_path / "plain.safetensors", adapter, tmp_path / "out.safetensors", keep="adapter")
    assert not (tmp_path / "out").exists()

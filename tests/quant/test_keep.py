"""Rounding that keeps the adapter, in every scheme: along the inputs that its change reads, by numpy's vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import run
from quantized_vectors import CASES, VECTORS, adapter_for, name, stored
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import UsageError

FOUR = VECTORS / "gptq" / "four"
SMALL = 0.02
"""Size of the change, relative to the weight: less than a step of four bits."""


def lost(case: Path, error: np.ndarray, delta: np.ndarray) -> tuple[float, float]:
    """The squared error for the inputs that a change of rank 2 reads, and the squared error weighed by them.

    The second number is for random inputs that hold these directions eight times as often as others.
    """
    if case.parent.name == "mxfp4":  # Its weights are stored [in, out].
        error, delta = error.swapaxes(-1, -2), delta.swapaxes(-1, -2)
    # A row of a few numbers holds one direction at most.
    count = 2 if delta.shape[-1] >= 16 else 1
    V = np.linalg.svd(delta, full_matrices=False)[2][..., :count, :].swapaxes(-1, -2)
    along = float(np.linalg.norm(error @ V) ** 2)
    return along, float(np.linalg.norm(error) ** 2) + 7 * along


def merged(case: Path, out: Path, size: float) -> dict[str | None, tuple[float, float]]:
    """Merge with and without keeping the adapter; return what each of the two lost."""
    adapter, W, delta = adapter_for(case, size)
    left = {}
    for keep in (None, "adapter"):
        ak.merge(case, adapter, out / str(keep), quantized="requantize", keep=keep)
        left[keep] = lost(case, stored(out / str(keep)) - (W.double().numpy() + delta), delta)
    assert ak.verify(out / "adapter", case, adapter).ok
    return left


@pytest.mark.parametrize("case", CASES, ids=name)
def test_more_of_the_change_is_there_than_to_the_nearest_and_verify_finds_the_same(case: Path, tmp_path: Path) -> None:
    left = merged(case, tmp_path, SMALL)
    wide = adapter_for(case)[1].shape[-1 if case.parent.name != "mxfp4" else -2] >= 48
    for kept, nearest, part in zip(left["adapter"], left[None], (0.9, 0.99), strict=True):
        assert kept < (part if wide else 1.0001) * nearest, left


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_tiny_change_is_not_kept_at_the_cost_of_all_other_inputs(case: Path, tmp_path: Path) -> None:
    """Moving numbers by whole steps to hold a change that is far smaller than a step would add more than it keeps."""
    left = merged(case, tmp_path, 0.001)
    assert left["adapter"][1] <= 1.0001 * left[None][1], left


def test_a_large_change(tmp_path: Path) -> None:
    left = merged(FOUR, tmp_path, 1.0)
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
    assert (both.exit_code, "Omit one of the two options" in both.output) == (2, True)
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


def test_an_interrupted_merge_is_not_resumed_with_another_rounding(tmp_path: Path) -> None:
    """Two files: the first is finished with one rounding, then the merge is run again with the other."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_bytes((FOUR / "config.json").read_bytes())
    adapters, tensors = {}, {}
    adapter, _, _ = adapter_for(FOUR, SMALL)
    ((target, updates),) = adapter.updates.items()
    held = load_file(FOUR / "model.safetensors")
    for at in range(2):
        path = f"layers.{at}.{target.path}"
        adapters[ak.Target(path)] = updates
        parts = {f"layers.{at}.{name}": each for name, each in held.items()}
        save_file(parts, base / f"model-{at}.safetensors")
        tensors |= dict.fromkeys(parts, f"model-{at}.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": tensors}))
    both = ak.Adapter(adapters)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ak.merge(base, both, tmp_path / "out", quantized="requantize", keep="adapter", progress=stop)
    again = ak.merge(base, both, tmp_path / "out", quantized="requantize")
    assert not again.resumed
    ak.merge(base, both, tmp_path / "fresh", quantized="requantize")
    for file in set(tensors.values()):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()

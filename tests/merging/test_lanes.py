"""The way of blocks through a device, as torch's CPU device takes it, against numpy's bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from merges import CASES, big_base, rand, save_base

import adapterkit as ak
from adapterkit.errors import UsageError
from adapterkit.io.lazy import DTYPES
from adapterkit.merging.arrays import NumpyArrays, TorchArrays
from adapterkit.merging.blocks import Block
from adapterkit.merging.workers import DEPTH, pipeline_for

WEIGHTS = "model*.safetensors"


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(WEIGHTS)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", ["lora", "dora", "rows", "replacement_then_lora"])
def test_a_device_gives_numpys_bytes(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    shape, target, updates, _ = CASES[case]
    base = save_base(tmp_path / "base", {"m.weight": (rand(*shape, seed=3) * 0.1).to(dtype), "n.weight": rand(9, 5)})
    adapter = ak.Adapter({target: tuple(updates)})
    for device in ("cpu", "cpu:0"):
        ak.merge(base, adapter, tmp_path / device, device=device)
    assert weights(tmp_path / "cpu") == weights(tmp_path / "cpu:0")


def test_many_blocks_and_several_devices_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = big_base(tmp_path / "base", 7)
    ak.merge(base, adapter, tmp_path / "one", device="cpu")
    monkeypatch.setattr("adapterkit.merging.blocks.BLOCK_ELEMENTS", 5000)
    for device in ("cpu:0", "cpu:0,cpu:0", "cpu:0,cpu:0,cpu:0", "cpu,cpu:0"):
        ak.merge(base, adapter, tmp_path / device, device=device)
        assert weights(tmp_path / device) == weights(tmp_path / "one")
    with pytest.raises(UsageError, match="nowhere"):
        ak.merge(base, adapter, tmp_path / "out", device="cpu:0,nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arrays", "ahead"), [(NumpyArrays(), 1), (TorchArrays("cpu:0"), DEPTH)])
def test_blocks_are_read_ahead_and_written_in_order(arrays: object, ahead: int) -> None:
    seen: list[tuple[str, int]] = []
    values = np.arange(80, dtype="<f4").reshape(8, 10)
    written = np.zeros_like(values)

    def read(block: Block, data: memoryview) -> None:
        seen.append(("read", block.start))
        data[:] = values[block.start : block.stop].tobytes()

    def compute(_block: Block, raw: object, out: object) -> None:
        arrays.assign(out, raw * 2)  # type: ignore[attr-defined, operator]

    class Written:
        at = 0

        def room(self, nbytes: int) -> memoryview:
            return memoryview(written).cast("B")[self.at : self.at + nbytes]

        def filled(self, nbytes: int) -> None:
            seen.append(("write", self.at // 40))
            self.at += nbytes

    blocks = [Block(None, row, row + 1, 8, 10) for row in range(8)]
    lane = pipeline_for(arrays)  # type: ignore[arg-type]
    lane.through(blocks, DTYPES["F32"], DTYPES["F32"], read, compute, Written())
    assert np.array_equal(written, values * 2)
    order = {kind: [row for what, row in seen if what == kind] for kind in ("read", "write")}
    assert order["read"] == order["write"] == list(range(8))
    assert seen.index(("write", 0)) == ahead

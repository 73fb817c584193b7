"""Options of the merge: memory, links, stochastic rounding."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from merges import big_base, f64, lora, lora_delta, rand, save_base, tree
from safetensors.torch import load_file

import adapterkit as ak
from adapterkit.merging import plan

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
"""The integers that have as many bytes as a number."""

WIDE = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn]


def neighbours(exact: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `dtype` next below and next above each exact one, by its bits."""
    near = torch.from_numpy(exact).to(dtype)
    bits = near.view(INTEGERS[near.itemsize])
    away, toward = (bits + 1).view(dtype), (bits - 1).view(dtype)
    near, away, toward = (f64(t) for t in (near, away, toward))
    low = np.where(near <= exact, near, np.where(exact > 0, toward, away))
    high = np.where(near >= exact, near, np.where(exact > 0, away, toward))
    return low, high


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cpu:0"], ids=["numpy", "torch"])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(
    tmp_path: Path, dtype: torch.dtype, device: str
) -> None:
    W, u = rand(700, 600).to(dtype), lora(700, 600)
    base = save_base(tmp_path / "base", {"m.weight": W})
    adapter = ak.Adapter({ak.Target("m"): (u,)})
    report = ak.merge(base, adapter, tmp_path / "out", seed=7, device=device)
    got = f64(load_file(tmp_path / "out" / "model.safetensors")["m.weight"])
    exact = f64(W) + lora_delta(u)
    low, high = neighbours(exact, dtype)
    assert ((got == low) | (got == high)).all()
    inexact = low < high
    share = (exact - low)[inexact] / (high - low)[inexact]
    up = (got == high)[inexact]
    # On each side of the middle, and below numbers of either last bit: rounding to half a unit first, and from there to
    # the nearest, would be right on average over all elements, because ties go to an even number.
    even = (torch.from_numpy(low).to(dtype).view(INTEGERS[dtype.itemsize]) & 1 == 0).numpy()[inexact]
    for here in (last & side for last in (even, ~even) for side in (share < 0.5, share >= 0.5)):
        tolerance = 5 * math.sqrt(float((share * (1 - share))[here].sum()))
        assert abs(up[here].sum() - share[here].sum()) < tolerance
    assert report.record()["seed"] == 7
    assert ak.verify(tmp_path / "out", base, adapter, seed=7).ok
    assert not ak.verify(tmp_path / "out", base, adapter, seed=8).ok


def test_stochastic_rounding_is_the_same_on_any_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", {"m.weight": rand(701, 333).bfloat16(), "n.weight": rand(701, 333)})
    adapter = ak.Adapter({ak.Target("m"): (lora(701, 333),)})
    ak.merge(base, adapter, tmp_path / "out", seed=3, dtype="F16")
    monkeypatch.setattr("adapterkit.merging.blocks.BLOCK_ELEMENTS", 3 * 333)
    ak.merge(base, adapter, tmp_path / "cut", seed=3, dtype="F16", device="cpu:0")
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "cut")]
    assert weights[0] == weights[1]
    ak.merge(base, adapter, tmp_path / "other", seed=4, dtype="F16")
    assert tree(tmp_path / "out") != tree(tmp_path / "other")


def test_the_cure_for_a_dtype_lists_only_dtypes_that_a_merge_accepts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"m.weight": rand(8, 8)})
    adapter = ak.Adapter({ak.Target("m"): (lora(8, 8),)})
    with pytest.raises(ak.AdapterkitError, match="cannot be cast to 'I8'") as caught:
        plan(base, adapter, dtype="I8")
    known = caught.value.cure.partition("Known: ")[2].split(", ")
    assert {"F32", "F16", "BF16"} <= set(known)
    assert not {"C64", "F8_E8M0"} & set(known)
    for dtype in known:
        plan(base, adapter, dtype=dtype)


def test_linked_files_are_those_of_the_base(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base", 6)
    only = adapter.replace(updates=dict(list(adapter.updates.items())[:1]))
    ak.merge(base, only, tmp_path / "copied")
    ak.merge(base, only, tmp_path / "linked", link=True)
    assert tree(tmp_path / "copied") == tree(tmp_path / "linked")
    same = [f.name for f in base.glob("*.safetensors") if f.samefile(tmp_path / "linked" / f.name)]
    assert len(same) == 5
    assert not any(f.samefile(tmp_path / "copied" / f.name) for f in base.glob("*.safetensors"))
    touched = next(iter(only.updates)).path
    assert ak.verify(tmp_path / "linked", base, only).ok
    assert not [name for name in same if f"{touched}.weight" in load_file(base / name)]


def test_memory_bounds_the_workers_and_a_plan_says_so(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    free = plan(base, adapter).record()
    assert free["peak_memory"] <= free["memory"]
    one = free["peak_memory"] // free["workers"]
    tight = plan(base, adapter, memory=one)
    assert (tight.workers, tight.peak_memory) == (1, one)
    assert tight.digest == free["digest"]
    ak.merge(base, adapter, tmp_path / "free")
    ak.merge(base, adapter, tmp_path / "tight", memory=one)
    assert tree(tmp_path / "free") == tree(tmp_path / "tight")
    with pytest.raises(ak.AdapterkitError, match=r"layers.*needs .* bytes of memory or more") as caught:
        ak.merge(base, adapter, tmp_path / "none", memory=one - 1)
    assert caught.value.exit_code == 6
    with pytest.raises(ak.AdapterkitError, match="the memory limit is 0"):
        plan(base, adapter, memory=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "free", "tight"]


def test_adapters_may_come_from_an_iterator(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    plan(base, iter([adapter, adapter]))
    ak.merge(base, iter([adapter, adapter]), tmp_path / "iterated")
    ak.merge(base, [adapter, adapter], tmp_path / "listed")
    assert tree(tmp_path / "iterated") == tree(tmp_path / "listed")
    ak.write(adapter, tmp_path / "adapter", format="peft")
    with pytest.raises(ak.AdapterkitError, match="the output overlaps the input"):
        ak.merge(base, iter([tmp_path / "adapter"]), tmp_path / "adapter", overwrite=True)


def test_an_output_never_replaces_the_file_of_an_adapter_that_is_still_to_be_read(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.write(adapter, tmp_path / "adapter", format="peft")
    before = tree(tmp_path / "adapter")
    with pytest.raises(ak.AdapterkitError, match="the output overlaps the input"):
        ak.merge(base, ak.read(tmp_path / "adapter"), tmp_path / "adapter", overwrite=True)
    assert tree(tmp_path / "adapter") == before


def test_torch_objects_name_a_dtype_and_devices(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.merge(base, adapter, tmp_path / "objects", dtype=torch.float16, device=torch.device("cpu"))
    ak.merge(base, adapter, tmp_path / "texts", dtype="float16", device="cpu, cpu")
    assert tree(tmp_path / "objects") == tree(tmp_path / "texts")
    assert load_file(tmp_path / "objects" / "model-00001-of-00003.safetensors")["layers.0.q.weight"].dtype is torch.half


@pytest.mark.parametrize(
    "option", [{"weights": 0.5}, {"weights": ["half"]}, {"memory": "2GB"}, {"shard_size": "5GB"}], ids=str
)
def test_options_of_other_types_are_refused(tmp_path: Path, option: dict[str, object]) -> None:
    base, adapter = big_base(tmp_path / "base")
    with pytest.raises(ak.AdapterkitError, match=r"is not a whole number|are not a list of numbers"):
        plan(base, adapter, **option)

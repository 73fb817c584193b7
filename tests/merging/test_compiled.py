"""Merges by the compiled loop write the bytes of merges by numpy, for every way that a change lies in a tensor."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_loops import needs_loops
from merges import Target, load_all, lora, rand, save_base, worst_ulp

import adapterkit as ak
from adapterkit import native
from adapterkit.merging import compiled as compiled_blocks
from adapterkit.merging.report import Report
from adapterkit.methods.dora import DoRA
from adapterkit.methods.loha import LoHa
from adapterkit.methods.lora import LoRA

pytestmark = needs_loops

OUT, IN = 208, 160


def experts(out: int, in_: int, count: int = 3, seed: int = 0) -> LoRA:
    return LoRA(A=rand(count, 4, in_, seed=seed), B=0.02 * rand(count, out, 4, seed=seed + 1), scaling=0.5)


def small(out: int, in_: int, seed: int = 0, r: int = 4) -> LoRA:
    return LoRA(A=rand(r, in_, seed=seed), B=0.02 * rand(out, r, seed=seed + 1), scaling=2.0)


def convolution() -> LoRA:
    return LoRA(A=rand(4, 16, 3, 3, seed=1), B=0.02 * rand(OUT, 4, 1, 1, seed=2).reshape(OUT, 4), scaling=1.0)


def product_of(r: int) -> LoHa:
    return LoHa(w1_a=rand(OUT, r), w1_b=rand(r, IN), w2_a=rand(OUT, r), w2_b=rand(r, IN), scaling=0.1)


def dora(out: int, *rest: int, seed: int = 0, r: int = 4) -> DoRA:
    return DoRA(
        A=rand(r, *rest, seed=seed), B=0.02 * rand(out, r, seed=seed + 1), magnitude=1 + rand(out, seed=seed + 2).abs(),
        scaling=2.0,
    )  # fmt: skip


def dora_of_experts(count: int = 3) -> DoRA:
    each = [dora(OUT, IN, seed=10 * index) for index in range(count)]
    return DoRA(
        A=torch.stack([one.A for one in each]), B=torch.stack([one.B for one in each]),
        magnitude=torch.stack([one.magnitude for one in each]), scaling=2.0,
    )  # fmt: skip


CASES = {
    "out in": ((OUT, IN), [{Target("m"): (small(OUT, IN),)}], True),
    "in out": ((IN, OUT), [{Target("m", "in out *k"): (small(OUT, IN),)}], True),
    "experts": ((3, OUT, IN), [{Target("m.weight", "e out *in"): (experts(OUT, IN),)}], True),
    "experts, turned": ((3, IN, OUT), [{Target("m.weight", "e in out *k"): (experts(OUT, IN),)}], True),
    "q and v of one weight": (
        (3 * OUT, IN),
        [{Target("m", rows=(0, OUT)): (small(OUT, IN),), Target("m", rows=(2 * OUT, 3 * OUT)): (small(OUT, IN, 5),)}],
        True,
    ),
    "rows that overlap": (
        (3 * OUT, IN),
        [
            {Target("m", rows=(0, 2 * OUT)): (small(2 * OUT, IN),)},
            {Target("m", rows=(OUT, 3 * OUT)): (small(2 * OUT, IN, 7),)},
        ],
        True,
    ),
    "three adapters": (
        (OUT, IN),
        [{Target("m"): (small(OUT, IN, seed, r),)} for seed, r in ((0, 3), (4, 40), (8, 1))],
        True,
    ),
    "two updates": ((OUT, IN), [{Target("m"): (small(OUT, IN), small(OUT, IN, 6))}], True),
    "a kernel": ((OUT, 16, 3, 3), [{Target("m"): (convolution(),)}], True),
    "a rank of 400": (
        (OUT, IN),
        [{Target("m"): (product_of(20),)}],
        False,
    ),
    "DoRA": ((OUT, IN), [{Target("m"): (dora(OUT, IN),)}], True),
    "DoRA of q and v": (
        (3 * OUT, IN),
        [{Target("m", rows=rows): (dora(OUT, IN, seed=rows[0]),) for rows in ((0, OUT), (2 * OUT, 3 * OUT))}],
        True,
    ),
    "DoRA of q, LoRA of v": (
        (3 * OUT, IN),
        [{Target("m", rows=(0, OUT)): (dora(OUT, IN),), Target("m", rows=(2 * OUT, 3 * OUT)): (small(OUT, IN, 5),)}],
        True,
    ),
    "DoRA of a kernel": ((OUT, 16, 3, 3), [{Target("m"): (dora(OUT, 16, 3, 3),)}], True),
    "DoRA of experts": ((3, OUT, IN), [{Target("m.weight", "e out *in"): (dora_of_experts(),)}], True),
}  # fmt: skip


def norms_of(report: Report) -> list[float]:
    """The norm of each change, as the report gives it."""
    return [norm for norms in report.norms.values() for norm in norms]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_numpy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype
) -> None:
    shape, groups, joins = CASES[case]
    W = (0.05 * rand(*shape, seed=99)).to(dtype)
    base = save_base(tmp_path / "base", {"m.weight": W})
    adapters = [ak.Adapter(group) for group in groups]
    # At another weight, a DoRA's result is a mixture with the base, which numpy computes.
    weights = [1.0 if "DoRA" in case else 0.5 + i for i in range(len(adapters))]
    settled: list[bool] = []
    real = compiled_blocks.LowRankBlocks.write

    def counted(self: compiled_blocks.LowRankBlocks, *arguments: object) -> dict[int, float] | None:
        norms = real(self, *arguments)  # type: ignore[arg-type]
        settled.append(norms is not None)
        return norms

    monkeypatch.setattr(compiled_blocks.LowRankBlocks, "write", counted)
    compiled = ak.merge(base, adapters, tmp_path / "compiled", weights=weights)
    monkeypatch.setattr(native, "loops", lambda: None)
    blocks = len(settled)
    by_numpy = ak.merge(base, adapters, tmp_path / "numpy", weights=weights)
    assert blocks, "the compiled loop was not asked"
    assert all(settled[:blocks]) is joins
    assert len(settled) == blocks, "without the library it is asked all the same"
    made, expected = (tmp_path / name / "model.safetensors" for name in ("compiled", "numpy"))
    assert hashlib.sha256(made.read_bytes()).digest() == hashlib.sha256(expected.read_bytes()).digest()
    assert not torch.equal(load_all(tmp_path / "compiled")["m.weight"], W)
    assert norms_of(compiled) == pytest.approx(norms_of(by_numpy), rel=1e-9)


def test_a_sum_that_cancels_is_the_nearest_to_float64(tmp_path: Path) -> None:
    """Weight and change cancel: nearly every element needs float64, and some are zero."""
    u = lora(256, 128, r=16, scale=1.0, scaling=1.0)
    exact = u.B.double() @ u.A.double()
    W = -exact.bfloat16()
    base = save_base(tmp_path / "base", {"m.weight": W})
    ak.merge(base, ak.Adapter({Target("m"): (u,)}), tmp_path / "out")
    merged = load_all(tmp_path / "out")["m.weight"]
    assert worst_ulp(merged, (W.double() + exact).numpy()) <= 0.501


def test_a_base_with_a_nan_is_merged_by_numpy(tmp_path: Path) -> None:
    W = rand(OUT, IN).bfloat16()
    W[5, 7] = float("nan")
    base = save_base(tmp_path / "base", {"m.weight": W})
    u = small(OUT, IN)
    ak.merge(base, ak.Adapter({Target("m"): (u,)}), tmp_path / "out")
    merged = load_all(tmp_path / "out")["m.weight"]
    assert merged[5, 7].isnan()
    kept = np.ones((OUT, IN), bool)
    kept[5, 7] = False
    exact = W.double().numpy() + 2.0 * (u.B.double() @ u.A.double()).numpy()
    assert worst_ulp(merged[torch.from_numpy(kept)], exact[kept]) <= 0.501

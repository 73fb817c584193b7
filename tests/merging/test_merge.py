"""The merge against float64 numpy, against its own promises, and against interruptions."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from merges import (
    CASES,
    Target,
    big_base,
    dora_weight,
    f64,
    load_all,
    lora,
    lora_delta,
    rand,
    save_base,
    tree,
    worst_ulp,
)
from method_vectors import vectors_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.methods.dense import Dense
from adapterkit.methods.dora import DoRA
from adapterkit.methods.ia3 import IA3
from adapterkit.methods.lora import LoRA
from adapterkit.methods.replacement import Replacement
from adapterkit.methods.rows import Rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("device", ["cpu", "cpu:0"], ids=["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_every_element_is_the_nearest_to_float64(tmp_path: Path, case: str, dtype: torch.dtype, device: str) -> None:
    """`cpu` computes with numpy, `cpu:0` as any device of torch does."""
    shape, target, updates, formula = CASES[case]
    W = rand(*shape, seed=99).to(dtype)
    base = save_base(tmp_path / "base", {"m.weight": W, "other.weight": rand(7).to(dtype)})
    adapter = ak.Adapter({target: tuple(updates)})
    ak.merge(base, adapter, tmp_path / "out", device=device)
    merged = load_all(tmp_path / "out")["m.weight"]
    view = f64(W).swapaxes(0, 1) if target.layout == "in out *k" else f64(W)
    exact = formula(view, updates)
    assert worst_ulp(merged, exact.swapaxes(0, 1) if target.layout == "in out *k" else exact) <= 0.501
    assert not np.array_equal(f64(merged), f64(W))


@pytest.mark.parametrize("layout", ["e out *in", "e in out *k"])
def test_stacked_experts(tmp_path: Path, layout: str) -> None:
    experts, out, in_ = 3, 24, 10
    stored = (experts, out, in_) if layout == "e out *in" else (experts, in_, out)
    W = rand(*stored).bfloat16()
    u = LoRA(A=rand(experts, 2, in_), B=rand(experts, out, 2), scaling=0.5)
    base = save_base(tmp_path / "base", {"experts.up": W})
    report = ak.merge(base, ak.Adapter({Target("experts.up", layout): (u,)}), tmp_path / "out")
    D = 0.5 * np.einsum("eor,eri->eoi", f64(u.B), f64(u.A))
    exact = f64(W) + (D if layout == "e out *in" else D.swapaxes(1, 2))
    assert worst_ulp(load_all(tmp_path / "out")["experts.up"], exact) <= 0.501
    assert report.norms["experts.up"][0] == pytest.approx(np.linalg.norm(D), rel=1e-9)


def test_cancelling_change_is_still_rounded_once(tmp_path: Path) -> None:
    """W and D cancel to many orders of magnitude below either: where float32 accumulation is off by whole units."""
    u = lora(256, 128, r=16, scale=1.0, scaling=1.0)
    W = -torch.from_numpy(lora_delta(u)).bfloat16()
    base = save_base(tmp_path / "base", {"m.weight": W})
    ak.merge(base, ak.Adapter({Target("m"): (u,)}), tmp_path / "out")
    merged = load_all(tmp_path / "out")["m.weight"]
    exact = f64(W) + lora_delta(u)
    assert worst_ulp(merged, exact) <= 0.501
    single = (W.float() + u.B @ u.A).bfloat16()
    assert worst_ulp(single, exact) > 0.501


@pytest.mark.parametrize("bias", ["lora", "dense", "ia3", "replacement"])
def test_biases(tmp_path: Path, bias: str) -> None:
    W, b, d = rand(9, 5), rand(9, seed=3), rand(9, seed=4)
    update, exact = {
        "lora": (LoRA(A=rand(2, 5), B=rand(9, 2), bias=d, scaling=0.5), f64(b) + 0.5 * f64(d)),
        "dense": (Dense(d=d, scaling=2.0), f64(b) + 2 * f64(d)),
        "ia3": (IA3(l=d), f64(b) * f64(d)),
        "replacement": (Replacement(bias=d), f64(d)),
    }[bias]
    base = save_base(tmp_path / "base", {"m.weight": W, "m.bias": b})
    ak.merge(base, ak.Adapter({Target("m"): (update,)}), tmp_path / "out")
    merged = load_all(tmp_path / "out")
    assert worst_ulp(merged["m.bias"], exact) <= 0.501
    assert torch.equal(merged["m.weight"], W) == (bias in ("dense", "replacement"))


def test_several_adapters_add_up_against_the_base_in_any_order(tmp_path: Path) -> None:
    W = rand(96, 40).bfloat16()
    a, b = lora(96, 40, seed=1), lora(96, 40, seed=2)
    d = DoRA(A=rand(4, 40), B=rand(96, 4), magnitude=rand(96).abs() + 1)
    base = save_base(tmp_path / "base", {"m.weight": W})
    adapters = [ak.Adapter({Target("m"): (u,)}) for u in (a, b, d)]
    ak.merge(base, adapters, tmp_path / "out", weights=[0.25, -2.0, 0.5])
    exact = f64(W) + 0.25 * lora_delta(a) - 2 * lora_delta(b) + 0.5 * (dora_weight(d, f64(W)) - f64(W))
    assert worst_ulp(load_all(tmp_path / "out")["m.weight"], exact) <= 0.501
    ak.merge(base, adapters[::-1], tmp_path / "reversed", weights=[0.5, -2.0, 0.25])
    assert torch.equal(load_all(tmp_path / "out")["m.weight"], load_all(tmp_path / "reversed")["m.weight"])


def test_everything_else_is_carried_over_byte_for_byte(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("kept")
    (base / "pytorch_model-00001-of-00001.bin").write_bytes(b"stale")
    report = ak.merge(base, adapter, tmp_path / "out")
    before, after = tree(base), tree(tmp_path / "out")
    assert set(after) == set(before) - {"pytorch_model-00001-of-00001.bin"} | {"adapterkit_merge.json"}
    assert report.left_out == ("pytorch_model-00001-of-00001.bin",)
    same = {name for name in after if name in before and after[name] == before[name]}
    assert {"config.json", "tokenizer.json", "sub/notes.txt", "model.safetensors.index.json"} <= same
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as old, safe_open(tmp_path / "out" / file.name, "pt") as new:
            assert old.metadata() == new.metadata()
            assert list(old.keys()) == list(new.keys())
            for name in old.keys():  # noqa: SIM118 - not a mapping
                touched = name in {f"layers.{i}.q.weight" for i in range(4)}
                assert torch.equal(old.get_tensor(name), new.get_tensor(name)) != touched


def test_sharding_dtype_and_a_torch_base(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.merge(base, adapter, tmp_path / "resharded", shard_size=300_000)
    index = json.loads((tmp_path / "resharded" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "resharded").glob("*.safetensors"))
    assert len(files) > 2
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert all(f.stat().st_size < 301_000 for f in files)
    ak.merge(base, adapter, tmp_path / "plain")
    one, other = load_all(tmp_path / "plain"), load_all(tmp_path / "resharded")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)

    ak.merge(base, adapter, tmp_path / "wide", dtype="float32")
    wide = load_all(tmp_path / "wide")
    assert wide["layers.5.q.weight"].dtype == torch.float32
    assert wide["count"].dtype == torch.int64
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    u = adapter.updates[Target("layers.0.q")][0]
    exact = f64(load_all(base)["layers.0.q.weight"]) + lora_delta(u)
    assert worst_ulp(wide["layers.0.q.weight"], exact) <= 0.501

    torch_base = tmp_path / "torch"
    torch_base.mkdir()
    torch.save(load_all(base), torch_base / "pytorch_model.bin")
    ak.merge(torch_base, adapter, tmp_path / "from_torch")
    converted = load_file(tmp_path / "from_torch" / "model.safetensors")
    assert all(torch.equal(one[k], converted[k]) for k in one)


def test_a_single_file(tmp_path: Path) -> None:
    W = rand(9, 5)
    save_file({"m.weight": W}, tmp_path / "base.safetensors")
    u = lora(9, 5)
    ak.merge(tmp_path / "base.safetensors", ak.Adapter({Target("m"): (u,)}), tmp_path / "out.safetensors")
    assert worst_ulp(load_file(tmp_path / "out.safetensors")["m.weight"], f64(W) + lora_delta(u)) <= 0.501
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors"]


def tied_base(folder: Path) -> Path:
    tensors = {"model.embed_tokens.weight": rand(20, 8), "model.norm.weight": rand(8)}
    return save_base(folder, tensors, tie_word_embeddings=True, model_type="llama")


def test_tied_weights_ask_for_a_choice(tmp_path: Path) -> None:
    base = tied_base(tmp_path / "base")
    head, embedding = lora(20, 8, seed=1), lora(8, 20, seed=2)
    adapter = ak.Adapter(
        {Target("lm_head"): (head,), Target("model.embed_tokens", "in out *k"): (embedding,)},
    )
    with pytest.raises(ak.AdapterkitError, match=r"ties lm_head.weight to model.embed_tokens.weight.*untie.*merge"):
        ak.merge(base, adapter, tmp_path / "out")
    W = f64(load_all(base)["model.embed_tokens.weight"])

    ak.merge(base, adapter, tmp_path / "untied", tied="untie")
    untied = load_all(tmp_path / "untied")
    assert worst_ulp(untied["lm_head.weight"], W + lora_delta(head)) <= 0.501
    assert worst_ulp(untied["model.embed_tokens.weight"], W + lora_delta(embedding).T) <= 0.501
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False

    ak.merge(base, adapter, tmp_path / "shared", tied="merge")
    shared = load_all(tmp_path / "shared")
    assert set(shared) == {"model.embed_tokens.weight", "model.norm.weight"}
    assert worst_ulp(shared["model.embed_tokens.weight"], W + lora_delta(head) + lora_delta(embedding).T) <= 0.501
    for name in ("untied", "shared"):
        assert ak.verify(tmp_path / name, base, adapter).ok

    saved = rand(20, 8, seed=9)
    twice = ak.Adapter(
        {Target(name): (Replacement(weight=saved.clone()),) for name in ("lm_head", "model.embed_tokens")}
    )
    ak.merge(base, twice, tmp_path / "twice", tied="merge")
    assert torch.equal(load_all(tmp_path / "twice")["model.embed_tokens.weight"], saved)
    apart = twice.replace(updates={**twice.updates, Target("lm_head"): (Replacement(weight=saved + 1),)})
    with pytest.raises(ak.AdapterkitError, match="cannot share one tensor"):
        ak.merge(base, apart, tmp_path / "apart", tied="merge")

    norm = ak.Adapter({Target("model.norm"): (Replacement(weight=rand(8, seed=5)),)})
    ak.merge(base, norm, tmp_path / "untouched")


def test_norms_are_those_of_the_changes(tmp_path: Path) -> None:
    W = rand(96, 40)
    u, d = lora(96, 40), DoRA(A=rand(4, 40), B=rand(96, 4), magnitude=rand(96).abs() + 1)
    base = save_base(tmp_path / "base", {"m.weight": W})
    adapters = [ak.Adapter({Target("m"): (x,)}) for x in (u, d)]
    report = ak.merge(base, adapters, tmp_path / "out", weights=[2.0, 1.0])
    expected = [2 * np.linalg.norm(lora_delta(u)), np.linalg.norm(dora_weight(d, f64(W)) - f64(W))]
    assert report.norms["m.weight"] == pytest.approx(expected, rel=1e-9)
    assert json.loads((tmp_path / "out" / "adapterkit_merge.json").read_text())["norms"] == dict(report.norms)


def nan(u: LoRA) -> LoRA:
    u.A[0, 0] = math.nan
    return u


def one(*updates: object, path: str = "layers.0.q", layout: str = "out *in") -> ak.Adapter:
    return ak.Adapter({Target(path, layout): updates})  # type: ignore[dict-item]


PLAIN = lora(300, 200)
FAR = Rows(index=torch.tensor([300]), values=rand(1, 200))
HUGE = Dense(D=torch.full((300, 200), 1e5))
ZERO = (
    Replacement(weight=torch.zeros(300, 200)),
    DoRA(A=torch.zeros(4, 200), B=torch.zeros(300, 4), magnitude=rand(300)),
)
PARTIAL = ak.Adapter({Target("layers.0.q"): (PLAIN,), Target("layers.9.q"): (PLAIN,)})

# name -> (adapter, options, words of the message, exit code)
REFUSED = {
    "NaN factor": (one(nan(lora(300, 200))), {}, "NaN", 2),
    "infinite factor": (one(IA3(l=torch.full((300,), math.inf))), {}, "NaN or an infinity", 2),
    "nothing matches": (one(PLAIN, path="layer.0.q"), {}, "Nearest: layers.0.q", 2),
    "partial match": (PARTIAL, {}, "1 of 2 targets", 2),
    "wrong base": (one(lora(300, 201)), {}, r"the update has .*in=201", 2),
    "a bias that is not there": (one(Dense(d=rand(300))), {}, "does not have", 3),
    "integer weight": (one(Dense(D=rand(1)), path="count"), {}, "dtype I64", 3),
    "token out of range": (one(FAR, layout="in out *k"), {}, "token 300; the base has 300", 2),
    "no adapters": ([], {}, "no adapter", 2),
    "weights do not match": (one(PLAIN), {"weights": [1, 2]}, "2 weights", 2),
    "weight that is no number": (one(PLAIN), {"weights": [math.nan]}, "not all finite", 2),
    "unknown dtype": (one(PLAIN), {"dtype": "int8"}, "cannot be cast", 2),
    "unknown tied": (one(PLAIN), {"tied": "x"}, "is unknown", 2),
    "unknown engine": (one(PLAIN), {"engine": "x"}, "unknown engine", 3),
    "unknown device": (one(PLAIN), {"device": "cuda:77"}, "the device .cuda:77. does not exist", 2),
    "shard size": (one(PLAIN), {"shard_size": 0}, "shard size", 2),
    "fp16 overflow": (one(HUGE), {"dtype": "float16"}, "a NaN or an infinity in", 2),
    "DoRA of a zero row": (one(*ZERO), {}, "a NaN or an infinity in", 2),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_cure_and_nothing_left(tmp_path: Path, case: str) -> None:
    adapter, options, words, exit_code = REFUSED[case]
    base, _ = big_base(tmp_path / "base")
    with pytest.raises(ak.AdapterkitError, match=f"(?s){words}") as caught:
        ak.merge(base, adapter, tmp_path / "out", **options)
    assert caught.value.cure
    assert caught.value.exit_code == exit_code
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_partial_match_may_be_allowed(tmp_path: Path) -> None:
    base, _ = big_base(tmp_path / "base")
    adapter = ak.Adapter({Target("layers.0.q"): (lora(300, 200),), Target("layers.9.q"): (lora(300, 200),)})
    report = ak.merge(base, adapter, tmp_path / "out", allow_partial=True)
    assert report.record()["adapters"][0]["missing"] == ["layers.9.q"]
    with pytest.raises(ak.AdapterkitError):
        ak.merge(base, ak.Adapter({Target("zzz"): (lora(300, 200),)}), tmp_path / "none", allow_partial=True)


def test_a_quantized_base_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"m.weight": rand(9, 5)}, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ak.AdapterkitError, match="quantized"):
        ak.merge(base, ak.Adapter({Target("m"): (lora(9, 5),)}), tmp_path / "out")


def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = big_base(tmp_path / "base")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out, words in (
        ("file", "already there"),
        ("full", "already there"),
        ("file/out", "file exists|not a directory"),
    ):
        with pytest.raises(ak.AdapterkitError, match=f"(?i){words}") as caught:
            ak.merge(base, adapter, tmp_path / out)
        assert caught.value.exit_code == 6
    for out in (base, base / "inside", tmp_path):
        with pytest.raises(ak.AdapterkitError, match="overlaps"):
            ak.merge(base, adapter, out)
    assert (tmp_path / "full" / "x").read_text() == "mine"
    ak.merge(base, adapter, tmp_path / "full", overwrite=True)
    assert not (tmp_path / "full" / "x").exists()

    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    with pytest.raises(ak.AdapterkitError, match="10 are free") as caught:
        ak.merge(base, adapter, tmp_path / "nospace")
    assert caught.value.exit_code == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "file", "full"]


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", [0, 3])
def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int, call: int
) -> None:
    from adapterkit.io import direct

    base, adapter = big_base(tmp_path / "base")
    calls, real = [0], direct.write_all

    def failing(file: object, data: memoryview) -> None:
        calls[0] += 1
        if calls[0] > call:
            raise OSError(fault, os.strerror(fault))
        real(file, data)  # type: ignore[arg-type]

    monkeypatch.setattr(direct, "write_all", failing)
    with pytest.raises(ak.AdapterkitError) as caught:
        ak.merge(base, adapter, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert caught.value.path
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_two_merges_to_one_place(tmp_path: Path) -> None:
    from adapterkit.merging.staging_dir import StagingDir

    base, adapter = big_base(tmp_path / "base")
    with StagingDir(tmp_path / "out", "other", []).locked(), pytest.raises(ak.AdapterkitError, match="another merge"):
        ak.merge(base, adapter, tmp_path / "out")
    ak.merge(base, adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "out"]


def test_a_stage_of_another_merge_is_not_taken_over(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.merge(base, adapter, tmp_path / "whole", weights=[2.0])
    stage = tmp_path / ".out.merging"
    (stage / "out").mkdir(parents=True)
    (stage / "plan").write_text("another")
    (stage / "out" / "model-00001-of-00003.safetensors").write_bytes(b"wrong")
    report = ak.merge(base, adapter, tmp_path / "out", weights=[2.0])
    assert report.resumed == ()
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_the_plan_says_what_the_merge_does(tmp_path: Path) -> None:
    from adapterkit.merging import plan

    base, adapter = big_base(tmp_path / "base")
    planned = plan(base, adapter).record()
    ak.merge(base, adapter, tmp_path / "out")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert {f["name"]: f["bytes"] for f in planned["files"]} == sizes
    assert planned["bytes"] == sum(sizes.values())
    assert sum(f["computed_bytes"] for f in planned["files"]) == 4 * 300 * 200 * 2
    assert planned["targets"] == 4
    assert plan(base, adapter).digest == planned["digest"] != plan(base, adapter, weights=[2]).digest


def edit(folder: Path, name: str, change: object) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name])  # type: ignore[operator]
            save_file(tensors, file, {"format": "pt"})


def flip(t: torch.Tensor) -> torch.Tensor:
    bits = t.view(torch.int16).clone()
    bits.view(-1)[17] ^= 1
    return bits.view(t.dtype)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("layers.0.q.weight", flip),
        ("layers.5.q.weight", flip),
        ("layers.2.norm.weight", flip),
        ("layers.1.q.weight", lambda t: (t.float() * 1.01).bfloat16()),
        ("layers.1.q.weight", lambda t: t.t().contiguous()),
        ("layers.1.q.weight", lambda t: t[:-1].contiguous()),
        ("count", lambda t: t + 1),
    ],
)
def test_verify_finds_planted_faults(tmp_path: Path, tensor: str, change: object) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.merge(base, adapter, tmp_path / "out")
    assert ak.verify(tmp_path / "out", base, adapter).record() == {
        "ok": True, "tensors": 14, "targets": 4, "differences": [],
    }  # fmt: skip
    edit(tmp_path / "out", tensor, change)
    found = ak.verify(tmp_path / "out", base, adapter)
    assert [d.tensor for d in found.differences] == [tensor]


def test_verify_finds_a_wrong_recipe(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.merge(base, adapter, tmp_path / "out")
    for other, weights in ((adapter, [0.5]), (adapter.replace(updates=dict(list(adapter.updates.items())[:3])), None)):
        assert not ak.verify(tmp_path / "out", base, other, weights=weights).ok


VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "methods"


@pytest.mark.parametrize("method", vectors_of("additive", "weight"))
def test_the_vectors_of_the_spec_merge_to_what_they_expect(tmp_path: Path, method: str) -> None:
    expected = load_file(VECTORS / f"{method}.expected.safetensors")
    base = {n: t for n, t in expected.items() if n.endswith((".weight", ".bias")) and ".merged." not in n}
    save_file(base, tmp_path / "base.safetensors")
    adapter = VECTORS / f"{method}.adapter.safetensors"
    ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", dtype="F64")
    merged = load_file(tmp_path / "out.safetensors")
    for name in base:
        path, _, leaf = name.rpartition(".")
        want = expected.get(f"{path}.merged.{leaf}", base[name])
        np.testing.assert_allclose(f64(merged[name]), f64(want), rtol=0, atol=1e-12, err_msg=name)


def test_progress_is_told_from_the_calling_thread_and_ends_at_all(tmp_path: Path) -> None:
    import threading

    base, adapter = big_base(tmp_path / "base")
    seen: list[tuple[int, int, int]] = []
    report = ak.merge(
        base, adapter, tmp_path / "out", progress=lambda done, total: seen.append((done, total, threading.get_ident())),
    )  # fmt: skip
    assert seen[-1][:2] == (report.plan.bytes, report.plan.bytes)
    assert {ident for *_, ident in seen} == {threading.get_ident()}
    assert [d for d, *_ in seen] == sorted(d for d, *_ in seen)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_threads_of_the_caller_are_left_as_they_were(tmp_path: Path, device: str) -> None:
    from threadpoolctl import threadpool_info

    base, adapter = big_base(tmp_path / "base")
    before = torch.get_num_threads(), threadpool_info()
    ak.merge(base, adapter, tmp_path / "out", device=device)
    assert (torch.get_num_threads(), threadpool_info()) == before


def test_a_merge_on_the_cpu_imports_no_torch(tmp_path: Path) -> None:
    base, adapter = big_base(tmp_path / "base")
    ak.write(adapter, tmp_path / "adapter.safetensors")
    script = "import sys, adapterkit as ak; ak.merge(*sys.argv[1:4], device='cpu'); assert 'torch' not in sys.modules"
    paths = [base, tmp_path / "adapter.safetensors", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", script, *map(str, paths)], check=True)


def test_a_base_of_many_shards_under_a_low_limit_of_open_files(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    tensors = {f"layers.{i}.q.weight": rand(8, 4, seed=i) for i in range(120)}
    base = save_base(tmp_path / "base", tensors, shards=120)
    adapter = ak.Adapter({Target(f"layers.{i}.q"): (lora(8, 4),) for i in range(120)})
    ak.write(adapter, tmp_path / "adapter.safetensors")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
    script = f"{limit}; import sys, adapterkit as ak; ak.merge(*sys.argv[1:4])"
    paths = [base, tmp_path / "adapter.safetensors", tmp_path / "out"]
    subprocess.run([sys.executable, "-c", script, *map(str, paths)], check=True)
    assert ak.verify(tmp_path / "out", base, adapter).ok


def test_fp8_weights(tmp_path: Path) -> None:
    W = rand(64, 32).to(torch.float8_e4m3fn)
    u = lora(64, 32)
    base = save_base(tmp_path / "base", {"m.weight": W})
    ak.merge(base, ak.Adapter({Target("m"): (u,)}), tmp_path / "out")
    merged = load_all(tmp_path / "out")["m.weight"]
    assert torch.equal(merged.view(torch.uint8), torch.from_numpy(f64(W) + lora_delta(u)).to(W.dtype).view(torch.uint8))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float8_e4m3fn, 3), (torch.float8_e5m2, 2)])
def test_what_8_bits_lose_is_said(dtype: torch.dtype, bits: int, tmp_path: Path) -> None:
    """A change below 2**-(bits + 2) of each weight leaves the bytes as they were, and a plan says so before."""
    W = rand(64, 32).abs().add(0.5).to(dtype)
    same = (f64(W) * (2.0 ** -(bits + 2) - 2.0**-20)).astype("f4")
    base = save_base(tmp_path / "base", {"m.weight": W})
    adapter = ak.Adapter({Target("m"): (Dense(D=torch.from_numpy(same)),)})
    (warning,) = ak.plan(base, adapter).warnings
    assert f"below 1/{2 ** (bits + 2)} of a weight are lost" in warning
    assert "--dtype bfloat16" in warning
    ak.merge(base, adapter, tmp_path / "out")
    assert torch.equal(load_all(tmp_path / "out")["m.weight"].view(torch.uint8), W.view(torch.uint8))
    assert not ak.plan(base, adapter, dtype="bfloat16").warnings


def ordered(r: np.random.Generator) -> tuple[ak.Adapter, ak.Adapter]:
    """A LoRA and an IA3 whose rows overlap, in this order, and another adapter of an IA3."""
    A, B, first, second = (torch.tensor(r.normal(size=shape)) for shape in ((2, 5), (4, 2), 4, 6))
    both = {Target("q", rows=(2, 6)): (LoRA(A=A, B=B),), Target("q", rows=(0, 4)): (IA3(l=first),)}
    return ak.Adapter(both), ak.Adapter({Target("q"): (IA3(l=second),)})


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_targets_of_one_adapter_apply_in_order_and_adapters_add_up(
    tmp_path: Path, weights: tuple[float, float]
) -> None:
    """What the first target gave is what the second changes; it was the base, and the order was lost."""
    W, b = torch.tensor(np.random.default_rng(1).normal(size=(6, 5))), torch.arange(6.0).double()
    one, other = ordered(np.random.default_rng(2))
    save_file({"q.weight": W, "q.bias": b}, tmp_path / "base.safetensors")
    ak.merge(tmp_path / "base.safetensors", [one, other], tmp_path / "out.safetensors", weights=weights)
    (lora,), (scale,) = one.updates.values()
    (whole,) = next(iter(other.updates.values()))
    changed, vector = f64(W).copy(), f64(b).copy()
    changed[2:] += f64(lora.B) @ f64(lora.A)
    changed[:4] *= f64(scale.l)[:, None]
    vector[:4] *= f64(scale.l)
    exact = f64(W) + weights[0] * (changed - f64(W)) + weights[1] * (f64(W) * f64(whole.l)[:, None] - f64(W))
    exact_b = f64(b) + weights[0] * (vector - f64(b)) + weights[1] * (f64(b) * f64(whole.l) - f64(b))
    merged = load_file(tmp_path / "out.safetensors")
    np.testing.assert_allclose(f64(merged["q.weight"]), exact, rtol=0, atol=1e-13)
    np.testing.assert_allclose(f64(merged["q.bias"]), exact_b, rtol=0, atol=1e-13)

    model = torch.nn.Module()
    model.q = torch.nn.Linear(5, 6).double()
    model.q.load_state_dict({"weight": W, "bias": b})
    handles = [ak.torch.inject(model, a, name=n, weight=w) for a, n, w in zip((one, other), "ab", weights, strict=True)]
    x = torch.tensor(np.random.default_rng(3).normal(size=(3, 5)))
    with torch.no_grad():
        np.testing.assert_allclose(f64(model.q(x)), f64(x) @ exact.T + exact_b, rtol=0, atol=1e-12)
    handles[1].remove()
    handles[0].merge_()
    alone = f64(W) + weights[0] * (changed - f64(W))
    np.testing.assert_allclose(f64(model.q.weight.detach()), alone, rtol=0, atol=1e-13)

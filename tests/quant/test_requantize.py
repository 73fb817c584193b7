"""Quantizing a merged weight again, and merging onto the 16-bit weights, against float64 formulas."""

import json
import shutil

import numpy as np
import pytest
import torch
from quantized_vectors import CASES, VECTORS, adapter_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.merging import blocks, plan, requantize
from adapterkit.quant import dequantized

COARSE = {
    "bnb_4bit": 0.16,
    "gptq": 0.16,
    "awq": 0.16,
    "mxfp4": 0.3,
    "nvfp4": 0.3,
    "compressed_tensors": 0.3,
    "torchao": 0.16,
}
"""Relative error that a step of so few bits allows; of eight bits it is 4 %."""


def name(case):
    return case.relative_to(VECTORS).as_posix()


def requantized(case, tmp_path, size=1.0):
    adapter, W, delta = adapter_for(case, size)
    out = tmp_path / "out"
    report = ak.merge(case, adapter, out, quantized="requantize")
    return adapter, W, delta, out, report


def unpacked(folder):
    found = dequantized(open_checkpoint(folder)).packed
    return next(iter(found.values())).lazy().torch()


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_output_is_of_the_same_scheme_and_near_the_exact_merge(case, tmp_path):
    adapter, W, delta, out, report = requantized(case, tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (case, out))
    assert {key: (t.shape, t.dtype) for key, t in after.items()} == {
        key: (t.shape, t.dtype) for key, t in before.items()
    }
    assert json.loads((out / "config.json").read_text()) == json.loads((case / "config.json").read_text())
    exact = W.double().numpy() + delta
    error = np.linalg.norm(unpacked(out).double().numpy() - exact) / np.linalg.norm(exact)
    assert error < COARSE.get(case.parent.name, 0.04)
    (measured,) = report.damage.values()
    assert measured["error"] == pytest.approx(error, rel=0.05)
    left = unpacked(out).double().numpy() - W.double().numpy()
    assert measured["kept"] == pytest.approx((left * delta).sum() / (delta * delta).sum(), abs=0.02)
    assert ak.verify(out, case, adapter).ok


@pytest.mark.parametrize("case", CASES, ids=name)
def test_runs_of_rows_give_the_bytes_of_the_whole(case, tmp_path, monkeypatch):
    adapter, _, _ = adapter_for(case)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(requantize, "RUN", 1)
    (part,) = {id(o.part): o.part for o in ak.plan(case, adapter, quantized="requantize").outputs() if o.part}.values()
    by_rows = ak.merge(case, adapter, tmp_path / "rows", quantized="requantize")
    monkeypatch.setattr(requantize.Repacked, "apart", False)
    whole = ak.merge(case, adapter, tmp_path / "whole", quantized="requantize")
    one, other = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("rows", "whole"))
    assert one == other
    (ours,), (wanted,) = by_rows.damage.values(), whole.damage.values()
    assert ours == pytest.approx(wanted, rel=1e-6)
    if part.apart:
        packed = [run for run in part.runs() if run.source is None]
        assert len(packed) > 1 or not any(part.packed.closed(row) for row in range(1, part.packed.shape[0]))


def bits(folder):
    parts = {key: t for file in sorted(folder.glob("*.safetensors")) for key, t in load_file(file).items()}
    return {key: t.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes() for key, t in parts.items()}


@pytest.mark.parametrize("shard_size", [None, 1, 1 << 30])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_stored_tensors_of_a_weight_may_lie_in_several_shards(case, shard_size, tmp_path):
    adapter, *_ = adapter_for(case)
    base, packed = tmp_path / "base", load_file(case / "model.safetensors")
    base.mkdir()
    shutil.copy(case / "config.json", base)
    with safe_open(case / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    files = {key: f"model-{number:05d}-of-{len(packed):05d}.safetensors" for number, key in enumerate(packed, 1)}
    for key, file in files.items():
        save_file({key: packed[key]}, base / file, metadata=metadata)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (one,) = ak.merge(case, adapter, tmp_path / "one", quantized="requantize").damage.values()
    report = ak.merge(base, adapter, tmp_path / "out", quantized="requantize", shard_size=shard_size)
    assert bits(tmp_path / "out") == bits(tmp_path / "one")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (1 if shard_size == 1 << 30 else len(packed))
    assert list(report.damage.values()) == [pytest.approx(one)]
    assert ak.verify(tmp_path / "out", base, adapter).ok


@pytest.mark.parametrize("case", CASES, ids=name)
def test_one_wrong_bit_in_it_is_found(case, tmp_path):
    adapter, _, _, out, _ = requantized(case, tmp_path)
    tensors = load_file(out / "model.safetensors")
    packed = next(iter(dequantized(open_checkpoint(out)).packed.values())).members[0]
    tensors[packed].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, out / "model.safetensors")
    assert [difference.tensor for difference in ak.verify(out, case, adapter).differences] == [packed]


@pytest.mark.parametrize("case", [c for c in CASES if c.parent.name in ("gptq", "awq")], ids=name)
def test_a_change_far_below_a_step_is_lost_and_said_to_be(case, tmp_path):
    *_, out, report = requantized(case, tmp_path, size=1e-4)
    assert torch.equal(unpacked(out), load_file(case / "expected.safetensors")["m.weight"])
    (measured,) = report.damage.values()
    assert measured["kept"] == pytest.approx(0, abs=1e-3)
    assert json.loads((out / "adapterkit_merge.json").read_text())["damage"] == report.damage


def test_weights_that_no_adapter_touches_keep_their_bytes(tmp_path):
    case, base = VECTORS / "bnb_4bit" / "nf4_nested_bfloat16", tmp_path / "base"
    shutil.copytree(case, base)
    packed = load_file(case / "model.safetensors")
    other = {key.replace("m.", "n."): value.clone() for key, value in packed.items()}
    save_file(packed | other, base / "model.safetensors")
    ak.merge(base, adapter_for(case)[0], tmp_path / "out", quantized="requantize")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[key], value) for key, value in other.items())
    assert torch.equal(merged["m.bias"], packed["m.bias"])
    assert not torch.equal(merged["m.weight"], packed["m.weight"])


def test_the_choices_are_explained_in_the_plan():
    case = VECTORS / "bnb_4bit" / "nf4_bfloat16"
    adapter = adapter_for(case)[0]
    said = {
        choice: plan(case, adapter, quantized=choice).record()["quantized"] for choice in ("dequantize", "requantize")
    }
    assert "16-bit weights" in said["dequantize"]["why"]
    assert "how much of the change remains" in said["requantize"]["why"]


def test_a_scheme_that_nothing_here_quantizes_to_is_refused_by_name(tmp_path):
    case = VECTORS / "hqq" / "4_bits_axis_0_bfloat16"
    with pytest.raises(Unsupported, match="cannot quantize to hqq"):
        ak.merge(case, adapter_for(case)[0], tmp_path / "out", quantized="requantize")


@pytest.fixture
def original(tmp_path):
    case = VECTORS / "bnb_4bit" / "nf4_bfloat16"
    folder = tmp_path / "onto"
    folder.mkdir()
    W = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    save_file({"m.weight": W, "m.bias": torch.zeros(6)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    return case, folder, W


def test_original_merges_onto_the_weights_that_were_given(original, tmp_path):
    case, folder, W = original
    adapter, _, delta = adapter_for(case)
    out = tmp_path / "out"
    report = ak.merge(case, adapter, out, quantized="original", onto=folder)
    exact = torch.tensor(W.double().numpy() + delta).to(torch.bfloat16)
    assert torch.equal(load_file(out / "model.safetensors")["m.weight"], exact)
    assert report.record()["quantized"]["choice"] == "original"
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert ak.verify(out, folder, adapter).ok


def test_original_checks_names_and_shapes(original, tmp_path):
    case, folder, W = original
    adapter = adapter_for(case)[0]
    for tensors, error in (
        ({"m.weight": W.T.contiguous(), "m.bias": torch.zeros(6)}, ShapeMismatch),
        ({"m.weight": W}, TargetNotFound),
        ({"m.weight": W, "m.bias": torch.zeros(6), "n.weight": W.clone()}, TargetNotFound),
    ):
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(error) as caught:
            ak.merge(case, adapter, tmp_path / "out", quantized="original", onto=folder)
        assert caught.value.cure
    with pytest.raises(Unsupported, match="themselves quantized"):
        ak.merge(case, adapter, tmp_path / "out", quantized="original", onto=case)
    for choice, onto in (("original", None), ("dequantize", folder)):
        with pytest.raises(UsageError, match="onto"):
            ak.merge(case, adapter, tmp_path / "out", quantized=choice, onto=onto)
    assert not (tmp_path / "out").exists()


def test_a_small_change_of_a_power_of_two_does_not_halve_the_scale_of_mxfp4():
    """The largest number 4 * 2^n, made a little smaller, is cut to 6 * 2^(n - 1) by the formula of the scale alone."""
    from adapterkit.quant.mxfp4 import quantized

    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    rng = np.random.default_rng(0)
    codes = rng.choice(levels[:7], size=(32, 64)) * rng.choice([-1, 1], size=(32, 64))
    codes[0] = 4.0
    scales = 2.0 ** rng.integers(-6, 3, size=64)
    values = (codes * scales * (1 - 0.002 * rng.random((32, 64)))).astype("f4")
    packed, exponents = quantized(values)
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(64, 32)
    signed = np.where(halves & 8, -1, 1) * levels[halves & 7]
    found = (signed * 2.0 ** (exponents.astype(int) - 127)).T
    np.testing.assert_allclose(found, codes * scales, rtol=0, atol=1e-12)
    # Of the two scales each block has the better one, by the nearest of all sixteen numbers.
    wild = rng.standard_normal((32, 200)).astype("f4")
    packed, exponents = quantized(wild)
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(200, 32)
    signed = np.where(halves & 8, -1, 1) * levels[halves & 7]
    error = ((signed * 2.0 ** (exponents.astype(int) - 127) - wild.T) ** 2).sum(1)
    both = np.concatenate([-levels, levels])
    floor = np.floor(np.log2(np.abs(wild).max(0))) - 2
    best = np.inf
    for exponent in (floor, floor + 1):
        grid = both[None] * 2.0 ** exponent[:, None]
        best = np.minimum(best, (np.abs(wild.T[..., None] - grid[:, None]).min(-1) ** 2).sum(1))
    np.testing.assert_allclose(error, best, rtol=1e-6)

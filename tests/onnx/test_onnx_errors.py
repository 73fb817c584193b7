"""What injection into graphs refuses, and that nothing is left behind then."""

import json
import os

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import torch
from command_line import run

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import (
    Corrupt,
    Malformed,
    NotMergeable,
    ShapeMismatch,
    StorageError,
    TargetNotFound,
    Unsupported,
    UsageError,
)
from adapterkit.methods import METHODS
from adapterkit.testing import example


def lora(out=8, into=16, path="0", **more):
    A, B = torch.randn(2, into), torch.randn(out, 2)
    return Adapter({Target(path, **more): (METHODS["lora"](A=A, B=B),)})


@pytest.fixture
def plain(tmp_path):
    return graphs.saved(graphs.built("matmul")[2], tmp_path / "base.onnx")


@pytest.fixture
def apart(tmp_path):
    """The same graph with its numbers in a file beside it."""
    folder = tmp_path / "apart"
    folder.mkdir()
    proto = graphs.built("matmul")[2]
    onnx.save_model(proto, folder / "base.onnx", save_as_external_data=True, location="base.data", size_threshold=0)
    return folder / "base.onnx"


def refused(error, match, model, adapter, out, **options):
    before = sorted(os.listdir(out.parent))
    with pytest.raises(error, match=match):
        ak.onnx.inject(model, adapter, out, **options)
    assert sorted(os.listdir(out.parent)) == before


def test_no_models(tmp_path, plain):
    out = tmp_path / "out.onnx"
    refused(StorageError, "no such file", tmp_path / "nothing.onnx", lora(), out)
    for data in (b"", b"not a model", plain.read_bytes()[:-40], os.urandom(400)):
        (tmp_path / "bad.onnx").write_bytes(data)
        refused(Malformed, "not an ONNX model", tmp_path / "bad.onnx", lora(), out)


def test_data_that_is_missing_short_or_elsewhere(apart, tmp_path):
    data, out = apart.parent / "base.data", apart.parent / "out.onnx"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refused(Malformed, "are needed", apart, lora(), out)
    data.unlink()
    refused(Malformed, "cannot be read", apart, lora(), out)
    (tmp_path / "secret").write_bytes(whole)
    data.symlink_to(tmp_path / "secret")
    refused(Malformed, "link out of", apart, lora(), out)
    data.unlink()
    proto = onnx.load(apart, load_external_data=False)
    for place in ("../secret", str(tmp_path / "secret")):
        for tensor in proto.graph.initializer:
            next(entry for entry in tensor.external_data if entry.key == "location").value = place
        apart.write_bytes(proto.SerializeToString())
        refused(Malformed, "not a plain relative path", apart, lora(), out)


def test_sizes_that_make_no_sense(apart):
    proto = onnx.load(apart, load_external_data=False)
    next(entry for entry in proto.graph.initializer[0].external_data if entry.key == "length").value = "4"
    apart.write_bytes(proto.SerializeToString())
    refused(Malformed, "is invalid", apart, lora(), apart.parent / "out.onnx")


def test_targets_and_shapes(plain, tmp_path):
    out = tmp_path / "out.onnx"
    refused(TargetNotFound, "the target is not in the base", plain, lora(path="q_proj"), out)
    refused(ShapeMismatch, "the update has out=8, in=12", plain, lora(into=12), out)
    experts = METHODS["lora"](A=torch.randn(3, 2, 16), B=torch.randn(3, 8, 2))
    refused(Unsupported, "stack of experts", plain, Adapter({Target("0", "e out *in"): (experts,)}), out)
    prompt = Adapter({Target(""): (METHODS["prompt"](P=torch.randn(2, 4)),)})
    refused(TargetNotFound, "no embedding of tokens", plain, prompt, out)
    nan = Adapter({Target("0"): (METHODS["lora"](A=torch.full((2, 16), float("nan")), B=torch.zeros(8, 2)),)})
    refused(Malformed, "NaN", plain, nan, out)


def test_methods_that_a_layer_or_a_mode_cannot_take(plain, tmp_path):
    out = tmp_path / "out.onnx"
    compacter = Adapter({Target("0"): (example("compacter"),)})
    refused(Unsupported, "leave the base unchanged", plain, compacter, out, mode="slots")
    refused(UsageError, "unknown mode", plain, lora(), out, mode="other")
    bare = graphs.saved(graphs.built("unbiased")[2], tmp_path / "bare.onnx")
    replaced = Adapter({Target("0"): (METHODS["replacement"](bias=torch.ones(8)),)})
    refused(Unsupported, "bias that the layer does not have", bare, replaced, out)
    bottleneck = METHODS["bottleneck"](down=torch.randn(2, 8), up=torch.randn(8, 2))
    with pytest.raises(NotMergeable, match="not its weights"):
        ak.onnx.merge(plain, Adapter({Target("0"): (bottleneck,)}), out)
    with pytest.raises(NotMergeable, match="does not have"):
        ak.onnx.merge(bare, replaced, out)
    with pytest.raises(UsageError, match="2 weights for 1"):
        ak.onnx.merge(plain, lora(), out, weights=[1, 2])
    assert not out.exists()


def test_outputs_that_are_inputs(apart):
    refused(UsageError, "own files", apart, lora(), apart)
    refused(UsageError, "own files", apart, lora(), apart.parent / "base.data")
    refused(UsageError, "a folder", apart, lora(), apart.parent)


def test_an_adapter_comes_out_before_another_goes_in(plain, tmp_path):
    ak.onnx.inject(plain, lora(), tmp_path / "one.onnx")
    refused(Unsupported, "already", tmp_path / "one.onnx", lora(), tmp_path / "two.onnx")
    with pytest.raises(UsageError, match="no adapter"):
        ak.onnx.eject(plain, tmp_path / "two.onnx")
    proto = onnx.load(tmp_path / "one.onnx")
    note = next(entry for entry in proto.metadata_props if entry.key == "adapterkit.original")
    held = json.loads(note.value)
    for change in ({"sha256": "0"}, {"rest": "!"}, {"size": 1}, {"runs": [[0, 8, "nothing"]]}):
        note.value = json.dumps(held | change)
        (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(Corrupt):
            ak.onnx.eject(tmp_path / "bad.onnx", tmp_path / "two.onnx")
    assert not (tmp_path / "two.onnx").exists()


@pytest.mark.parametrize("mode", ["constant", "slots"])
def test_a_graph_that_was_merged_after_it_was_injected_cannot_be_ejected(plain, tmp_path, mode):
    """The original's bytes are taken from the graph's weights, which the merge changed."""
    ak.onnx.inject(plain, lora(), tmp_path / "one.onnx", mode=mode)
    ak.onnx.merge(tmp_path / "one.onnx", lora(), tmp_path / "two.onnx")
    with pytest.raises(UsageError, match="an adapter was merged into this graph after inject wrote it"):
        ak.onnx.eject(tmp_path / "two.onnx", tmp_path / "back.onnx")
    assert not (tmp_path / "back.onnx").exists()
    refused(Unsupported, "already", tmp_path / "two.onnx", lora(), tmp_path / "three.onnx")


@pytest.mark.parametrize("weights", [0.5, "1", [None], [10**400], [float("nan")]], ids=str)
def test_weights_that_are_no_list_of_numbers(plain, tmp_path, weights):
    with pytest.raises(UsageError, match="weights"):
        ak.onnx.merge(plain, lora(), tmp_path / "out.onnx", weights=weights)


def test_data_files_are_shared_and_never_written(apart, tmp_path):
    data = apart.parent / "base.data"
    before, stamp = data.read_bytes(), data.stat().st_mtime_ns
    wide = Adapter({Target("0"): (METHODS["lora"](A=torch.randn(64, 16), B=torch.randn(8, 64)),)})
    report = ak.onnx.inject(apart, wide, apart.parent / "out.onnx")
    assert (data.read_bytes(), data.stat().st_mtime_ns) == (before, stamp)
    assert [file.suffix for file in report.files] == [".data", ".onnx"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    ak.onnx.inject(apart, wide, elsewhere / "out.onnx")
    assert (elsewhere / "base.data").read_bytes() == before
    merged = ak.onnx.merge(apart, wide, apart.parent / "merged.onnx")
    x = graphs.built("matmul")[1]
    for path in (elsewhere / "out.onnx", merged.out):
        wanted = graphs.run(report.out, x)
        np.testing.assert_allclose(graphs.run(path, x), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())
    ak.onnx.eject(report.out, apart.parent / "back.onnx")
    assert (apart.parent / "back.onnx").read_bytes() == apart.read_bytes()


def test_command_line(plain, tmp_path):
    ak.write(lora(), tmp_path / "adapter", format="adapterkit")
    source = next(path for path in (tmp_path / "adapter.safetensors", tmp_path / "adapter") if path.exists())
    done = run("inject", plain, source, "-o", tmp_path / "out.onnx")
    assert done.exit_code == 0, done
    assert "path" in done.stdout
    assert "largest difference" in done.stdout
    done = run("inject", plain, source, "-o", tmp_path / "slots.onnx", "--mode", "slots", "--json")
    assert json.loads(done.stdout)["targets"][0]["confidence"] == 1
    x, merged = graphs.built("matmul")[1], tmp_path / "merged.onnx"
    planned = json.loads(run("merge", plain, source, "--plan", "--json").stdout)
    assert [(t["target"], t["method"]) for t in planned["targets"]] == [("0", "path")]
    assert run("merge", plain, source, "--plan").exit_code == 0
    assert not merged.exists()
    done = run("merge", plain, source, "-o", merged, "--weight", "2")
    assert done.exit_code == 0, done
    y, one = graphs.run(plain, x), graphs.run(tmp_path / "out.onnx", x)
    (tmp_path / "weights").mkdir()
    np.testing.assert_allclose(graphs.run(merged, x), 2 * one - y, rtol=1e-4, atol=1e-4 * abs(one).max())
    for words, code, said in (
        ((plain, source, "-o", merged), 6, "--overwrite"),
        ((plain, source), 2, "--out"),
        ((plain, source, "-o", merged, "--dtype", "BF16"), 2, "Export the model with adapterkit export --dtype"),
        ((plain, source, "-o", merged, "--verify"), 2, "always run and compared"),
        ((plain, source, "-o", merged, "--quantized", "original"), 2, "16-bit weights"),
        ((tmp_path / "weights", source, "-o", merged, "--base-weights", tmp_path), 2, "only for ONNX graphs"),
    ):
        done = run("merge", *words)
        assert done.exit_code == code, done
        assert said in done.stderr
    done = run("merge", plain, source, "-o", merged, "--overwrite", "--json")
    assert json.loads(done.stdout)["difference"] < 1e-5
    done = run("inject", source, source, "-o", tmp_path / "bad.onnx")
    assert done.exit_code == 2
    assert "not an ONNX model" in done.stderr


def test_targets_of_one_weight_whose_order_counts(tmp_path, plain):
    """A graph would add up what a LoRA and an IA3 do to the base; merged and live they apply one after the other."""
    scale = METHODS["ia3"](l=torch.rand(8))
    whole = Adapter({**lora().updates, Target("0", rows=(0, 8)): (scale,)})
    apart_ = Adapter({
        Target("0", rows=(0, 4)): (METHODS["lora"](A=torch.randn(2, 16), B=torch.randn(4, 2)),),
        Target("0", rows=(4, 8)): (METHODS["ia3"](l=torch.rand(4)),),
    })  # fmt: skip
    refused(Unsupported, "several targets of one adapter are at one weight", plain, whole, tmp_path / "out.onnx")
    with pytest.raises(Unsupported, match="several targets of one adapter are at one weight"):
        ak.onnx.merge(plain, whole, tmp_path / "out.onnx")
    ak.onnx.merge(plain, apart_, tmp_path / "out.onnx")

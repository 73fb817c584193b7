"""Exports whose weights are packed, shared with the base's files, or of 16 bits; and modules that a function makes."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import torch
from command_line import run
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, StorageError, Unsupported, UsageError
from adapterkit.onnx import exporting, model_file

IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


class Net(nn.Module):
    """A layer with a bias, one without, and a head that is tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(40, 64), nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(torch.relu(self.up(self.embed(ids)))))


class Flat(nn.Module):
    """A layer of inputs of two axes, which is exported as a Gemm."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 96)

    def forward(self, x):
        return self.up(x)


def net():
    torch.manual_seed(3)
    return Net().eval()


def flat():
    """What the command line calls."""
    torch.manual_seed(4)
    return Flat(), (torch.randn(3, 64),), {"input_names": ["x"], "output_names": ["y"]}


def told():
    """What tells an operator set, and a size that is open."""
    model, args, names = flat()
    return model, args, {**names, "opset": 19, "dynamic_shapes": ({0: torch.export.Dim("rows")},)}


def unchecked():
    """What would leave out what its caller asked for."""
    return *flat()[:2], {"check": False}


def adapter(seed=1, rank=2):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 64, generator=g) / 8, torch.randn(96, rank, generator=g) / 2
    return ak.Adapter({ak.Target("up"): (ak.METHODS["lora"](A=A, B=B),)})


def changed(model, update):
    with torch.no_grad():
        model.up.weight += (update.B @ update.A) * update.scaling
    return model


def rounded(W, scheme):
    """A weight `[out, in]` as the schemes' own definitions round it, in numpy."""
    W = W.detach().numpy().astype("f8")
    highest = {"int8": 128, "int4": 8}[scheme]
    blocks = W.reshape(len(W), -1, 32)
    most = np.take_along_axis(blocks, abs(blocks).argmax(-1, keepdims=True), -1)
    scale = most / -highest
    return (np.clip(np.round(blocks / scale), -highest, highest - 1) * scale).reshape(W.shape)


@pytest.mark.parametrize("mode", ["merged", "attached", "slots"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_exports(scheme, mode, tmp_path):
    """Within the rounding of the scheme of torch with the adapter; weights as far off as the scheme's formula says."""
    update = adapter().updates[ak.Target("up")][0]
    report = ak.onnx.export(
        net(), (IDS,), tmp_path / "out.onnx", adapter={"one": adapter()}, mode=mode, quantize=scheme, input_names=["x"]
    )
    ops = [node.op_type for node in onnx.load(report.out).graph.node]
    assert ops.count("MatMulNBits") == 3
    model = changed(net(), update) if mode == "merged" else net()
    for name, damage in report.damage.items():
        W = model.get_submodule(name).weight
        error = np.linalg.norm(rounded(W, scheme) - W.detach().numpy()) / W.norm().item()
        assert damage["error"] == pytest.approx(error, rel=0.05), name
    assert set(report.damage) == {"up", "down", "head"}
    session = ak.onnx.Session(report.out, {"one": tmp_path / "one.onnx_adapter"} if mode == "slots" else None)
    got = session.run({"x": IDS.numpy()}, "one" if mode == "slots" else None)
    wanted = changed(net(), update)(IDS).detach().numpy()
    far = abs(next(iter(got.values())) - wanted).max() / abs(wanted).max()
    assert report.difference >= 0.999 * far > 0
    assert far < (0.02 if scheme == "int8" else 0.25)
    kept = sorted(file.name for file in tmp_path.iterdir())
    assert kept == sorted(file.name for file in report.files)
    assert json.loads(onnx.load(report.out).metadata_props[0].value)["quantize"] == scheme


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_export_takes_adapters(scheme, tmp_path):
    """Its layers keep their modules' names, and the layer of two axes is one that quantizers know."""
    model, args, names = flat()
    ak.onnx.export(model.eval(), args, tmp_path / "q.onnx", quantize=scheme, **names)
    report = ak.onnx.inject(tmp_path / "q.onnx", adapter(), tmp_path / "out.onnx")
    update = adapter().updates[ak.Target("up")][0]
    x = args[0].numpy()
    wanted = graphs.run(tmp_path / "q.onnx", x) + x @ (update.B @ update.A).numpy().T
    np.testing.assert_allclose(graphs.run(report.out, x), wanted, atol=1e-5 * abs(wanted).max())


def test_what_quantized_exports_refuse(tmp_path):
    out = tmp_path / "out.onnx"
    with pytest.raises(UsageError, match="unknown scheme"):
        ak.onnx.export(net(), (IDS,), out, quantize="int3")
    with pytest.raises(UsageError, match="differ from the weights in the base's files"):
        ak.onnx.export(net(), (IDS,), out, quantize="int4", share=tmp_path)
    with pytest.raises(Unsupported, match="no layer that it can quantize"):
        ak.onnx.export(nn.Sequential(nn.Conv1d(4, 4, 1)).eval(), (torch.randn(1, 4, 3),), out, quantize="int4")
    assert not list(tmp_path.iterdir())


def test_quantized_numbers_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "APART", 0)
    report = ak.onnx.export(net(), (IDS,), tmp_path / "out.onnx", quantize="int4", input_names=["x"])
    assert [file.name for file in report.files] == ["out.onnx.data", "out.onnx"]
    assert sorted(os.listdir(tmp_path)) == ["out.onnx", "out.onnx.data"]
    onnx.load(report.out)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_weights_stay_in_the_files_of_the_base(kind, tmp_path, close):
    """Whatever they are stored in: of 16 bits they are cast; what an adapter changes is written anew."""
    model = net().to(getattr(torch, kind)).float()
    state = {name: tensor.to(getattr(torch, kind)) for name, tensor in model.state_dict().items()}
    state.pop("head.weight")
    save_file(state, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    report = ak.onnx.export(
        model, (IDS,), tmp_path / "out.onnx", adapter=adapter(), share=tmp_path / "model.safetensors", input_names=["x"]
    )
    proto = onnx.load(report.out, load_external_data=False)
    places = {i.name: {e.key: e.value for e in i.external_data} for i in proto.graph.initializer}
    assert len([name for name, place in places.items() if place]) == 2  # The embedding, which is the head, and `down`.
    assert {place["location"] for place in places.values() if place} == {"model.safetensors"}
    assert report.out.stat().st_size < 96 * 64 * 4 + 20000
    wanted = changed(model, adapter().updates[ak.Target("up")][0])(IDS).detach()
    close(torch.tensor(graphs.run(report.out, IDS)), wanted)
    close(torch.tensor(ReferenceEvaluator(onnx.load(report.out)).run(None, {"x": IDS.numpy()})[0]), wanted)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_weights_that_torch_holds_turned_are_shared(tmp_path):
    model = net()
    model.up.weight = nn.Parameter(model.up.weight.detach().T.contiguous().T)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    report = ak.onnx.export(model, (IDS,), tmp_path / "out.onnx", share=tmp_path, input_names=["x"])
    stored = {i.name: bool(i.external_data) for i in onnx.load(report.out, load_external_data=False).graph.initializer}
    assert stored["up.weight"]
    assert report.difference < 1e-5


def test_where_shared_weights_may_lie(tmp_path, monkeypatch):
    model, other = net(), tmp_path / "other"
    other.mkdir()
    save_file({"embed.weight": model.embed.weight.detach()}, other / "model.safetensors")
    inner = tmp_path / "inner"
    inner.mkdir()
    with monkeypatch.context() as before_tracing:
        before_tracing.setattr(exporting, "traced", lambda *_, **__: pytest.fail("traced in vain"))
        with pytest.raises(UsageError, match="outside of the graph's folder"):
            ak.onnx.export(model, (IDS,), inner / "x.onnx", share=other)
        (inner / "model.safetensors").symlink_to(other / "model.safetensors")
        with pytest.raises(UsageError, match="outside of the graph's folder"):
            ak.onnx.export(model, (IDS,), inner / "x.onnx", share=inner / "model.safetensors")
    with torch.no_grad():
        model.embed.weight += 1
    with pytest.raises(UsageError, match="no weight of the graph"):
        ak.onnx.export(model, (IDS,), other / "x.onnx", share=other)
    assert sorted(path.name for path in tmp_path.rglob("*onnx*")) == []


def test_in_sixteen_bits(tmp_path):
    """float16 runs; what onnxruntime has no kernels for is written all the same, and the report says so."""
    update = adapter().updates[ak.Target("up")][0]
    wanted = changed(net(), update)(IDS).detach().numpy()
    half = ak.onnx.export(net().half(), (IDS,), tmp_path / "half.onnx", adapter=adapter(), input_names=["x"])
    assert half.difference < 3e-2
    got = next(iter(ak.onnx.Session(half.out).run({"x": IDS.numpy()}).values()))
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, wanted, atol=2e-2 * abs(wanted).max())
    plain = ak.onnx.export(net().half(), (IDS,), tmp_path / "plain.onnx", input_names=["x"]).out
    beside = ak.onnx.inject(plain, adapter(), tmp_path / "beside.onnx")  # The weight's own type is behind a Transpose.
    assert beside.difference < 3e-2
    np.testing.assert_allclose(graphs.run(beside.out, IDS), wanted, atol=2e-2 * abs(wanted).max())
    brief = ak.onnx.export(net().bfloat16(), (IDS,), tmp_path / "brief.onnx", adapter=adapter())
    kinds = {i.data_type for i in onnx.load(brief.out).graph.initializer}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert (brief.difference is None) == (brief.note is not None)
    assert brief.note is None or "no kernel" in brief.note


def test_the_command_line_exports_any_module(tmp_path, monkeypatch):
    model, args, _ = flat()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    monkeypatch.chdir(os.path.dirname(__file__))
    maker = "test_onnx_weights:flat"
    done = run(
        "export", tmp_path / "weights.safetensors", "--model", maker, "-o", tmp_path / "out", "--quantize", "int8"
    )
    assert done.exit_code == 0, done
    assert "1 weight quantized" in done.stdout
    wanted = model(args[0]).detach().numpy()
    assert abs(graphs.run(tmp_path / "out" / "model.onnx", args[0]) - wanted).max() < 0.02 * abs(wanted).max()
    save_file({"up.weight": torch.zeros(2, 2)}, tmp_path / "bad.safetensors")
    for code, words, match in (
        (2, ("--model", "flat"), "does not name a function"),
        (2, ("--model", "test_onnx_weights:rounded"), "cannot be imported or called"),
        (2, ("--model", "test_onnx_weights:net"), "does not return a module and its arguments"),
        (2, ("--model", maker, "--dtype", "float16"), "--dtype is only for the folder"),
        (2, (tmp_path / "bad.safetensors", "--model", maker), "size mismatch|Missing key"),
        (6, ("--model", maker), "already there"),
        (2, (), "Missing argument"),
    ):
        out = tmp_path / ("out" if code == 6 else "none")
        done = run("export", *words, "-o", out)
        assert done.exit_code == code, done
        assert any(word in done.stderr for word in match.split("|")), done.stderr
    assert not (tmp_path / "none").exists()
    with pytest.raises(ShapeMismatch):
        ak.onnx.export_factory(maker, tmp_path / "none", weights=tmp_path / "bad.safetensors")
    with pytest.raises(StorageError):
        ak.onnx.export_factory(maker, tmp_path / "out")


def test_what_a_function_tells_of_its_module_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(__file__))
    done = run("export", "--model", "test_onnx_weights:told", "-o", tmp_path / "told")
    assert done.exit_code == 0, done
    proto = onnx.load(tmp_path / "told" / "model.onnx")
    assert [entry.version for entry in proto.opset_import if not entry.domain] == [19]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "rows"
    done = run("export", "--model", "test_onnx_weights:told", "-o", tmp_path / "asked", "--opset", "20")
    assert [e.version for e in onnx.load(tmp_path / "asked" / "model.onnx").opset_import if not e.domain] == [20]
    done = run("export", "--model", "test_onnx_weights:unchecked", "-o", tmp_path / "none")
    assert done.exit_code == 2
    assert "returns the argument check" in done.stderr
    assert not (tmp_path / "none").exists()


def test_a_folder_with_weights_that_no_export_wrote_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(__file__))
    maker, out = "test_onnx_weights:flat", tmp_path / "out"
    ak.onnx.export_factory(maker, out, adapter={"one": adapter()}, mode="slots")
    ak.onnx.export_factory(maker, out, overwrite=True)
    assert sorted(os.listdir(out)) == ["model.onnx"]
    (out / "model.safetensors").write_bytes(b"the base's own")
    with pytest.raises(StorageError, match=r"holds model\.safetensors, which no export wrote"):
        ak.onnx.export_factory(maker, out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == b"the base's own"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "key"])
def test_a_folder_that_cannot_be_replaced_stays(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(__file__))
    out = tmp_path / "out"
    ak.onnx.export_factory("test_onnx_weights:flat", out)
    before = (out / "model.onnx").read_bytes()
    replace = os.replace

    def fails(source, target):
        if Path(target) == out and "replaced" not in str(source):
            raise fault
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises((StorageError, KeyboardInterrupt), match=r"[Nn]o space|^$"):
        ak.onnx.export_factory("test_onnx_weights:flat", out, overwrite=True)
    assert (out / "model.onnx").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]

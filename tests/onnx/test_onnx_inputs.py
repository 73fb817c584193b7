"""Slots that are required inputs, for runtimes that have no optional ones; the reference is PyTorch's arithmetic."""

import asyncio

import numpy as np
import onnx
import onnx_graphs as graphs
import onnxruntime
import pytest
import torch
from command_line import run
from safetensors.numpy import load_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, TargetNotFound, UsageError
from adapterkit.methods import METHODS

X = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("f4")


def lora(rank, seed):
    g = torch.Generator().manual_seed(seed)
    return METHODS["lora"](A=torch.randn(rank, 16, generator=g), B=torch.randn(8, rank, generator=g), scaling=0.5)


def delta(update):
    return (update.scaling * update.B.double() @ update.A.double()).numpy()


@pytest.fixture
def model(tmp_path):
    _, _, proto = graphs.built("matmul")
    return graphs.saved(proto, tmp_path / "base.onnx")


def plain(path, feeds):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def with_loaded(path, file):
    """The output with an adapter file that onnxruntime reads itself."""
    tensors = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    return plain(path, {"x": X, **{name: value.numpy() for name, value in tensors.items()}})


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_required_inputs_are_exchanged_by_any_run_time(model, tmp_path, method):
    ranks = [lora(2, 1), lora(5, 2)]
    scales = [METHODS["ia3"](l=torch.linspace(start, 2, 8)) for start in (0.5, 1.5)]
    first, second = ranks if method == "lora" else scales
    out, before = tmp_path / "out.onnx", graphs.run(model, X)
    report = ak.onnx.inject(model, Adapter({Target("0"): (first,)}), out, mode="inputs")
    assert report.difference < 1e-5
    names = {value.name for value in onnx.load(out).graph.initializer}
    inputs = {value.name for value in onnx.load(out).graph.input}
    assert not names & inputs
    assert {file.name for file in report.files} == {
        "out.onnx", "out.onnx_adapter", "out.onnx_adapter.json", "out.onnx.slots.safetensors",
        "out.onnx.neutral.safetensors", "out.onnx.neutral.onnx_adapter",
    }  # fmt: skip
    wanted = [
        before + X @ delta(one).T if method == "lora" else before * one.l.numpy() for one in (first, second)
    ]  # fmt: skip
    neutral, own = (load_file(tmp_path / f"out.onnx.{word}.safetensors") for word in ("neutral", "slots"))
    assert {*neutral} == {*own} == inputs - {"x"}
    assert all(min(array.shape) > 0 for array in neutral.values())
    np.testing.assert_array_equal(plain(out, {"x": X, **neutral}), before)
    np.testing.assert_allclose(plain(out, {"x": X, **own}), wanted[0], rtol=1e-4, atol=1e-4)
    ak.onnx.write_adapter(out, Adapter({Target("0"): (second,)}), tmp_path / "other.safetensors")
    other = load_file(tmp_path / "other.safetensors")
    np.testing.assert_allclose(plain(out, {"x": X, **other}), wanted[1], rtol=1e-4, atol=1e-4)
    session = ak.onnx.Session(out, {"first": tmp_path / "out.onnx_adapter", "second": tmp_path / "other.safetensors"})
    assert session.inputs == ("x",)
    assert {*session.slots} == inputs - {"x"}
    np.testing.assert_array_equal(session.run({"x": X})["y"], before)
    for name, one in zip(("first", "second"), wanted, strict=True):
        np.testing.assert_allclose(session.run({"x": X}, name)["y"], one, rtol=1e-4, atol=1e-4)
    (told,) = [asyncio.run(session.run_async({"x": X}, "first"))["y"]]
    np.testing.assert_array_equal(told, session.run({"x": X}, "first")["y"])
    assert session.types["x"][0] == "float32"
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == model.read_bytes()


def test_the_rank_of_a_convolution_is_fixed(tmp_path):
    """OpenVINO runs no convolution with an open number of filters. Smaller adapters are filled with zeros."""
    layer, x, proto = graphs.built("conv1d")
    path = graphs.saved(proto, tmp_path / "base.onnx")

    def of_rank(rank):
        g = torch.Generator().manual_seed(rank)
        return METHODS["lora"](A=torch.randn(rank, 16, 3, generator=g), B=torch.randn(8, rank, generator=g))

    ak.onnx.inject(path, Adapter({Target("0"): (of_rank(4),)}), tmp_path / "out.onnx", mode="inputs")
    sizes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
             for value in onnx.load(tmp_path / "out.onnx").graph.input}  # fmt: skip
    assert sizes["0.lora.A"] == [4, 16, 3]
    small = of_rank(2)
    ak.onnx.write_adapter(tmp_path / "out.onnx", Adapter({Target("0"): (small,)}), tmp_path / "a.safetensors")
    got = plain(tmp_path / "out.onnx", {"x": x.astype("f4"), **load_file(tmp_path / "a.safetensors")})
    with torch.no_grad():
        layer[0].weight += torch.einsum("or,rik->oik", small.B, small.A)
        wanted = layer(torch.tensor(x)).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ShapeMismatch, match="the slots of convolutions have a fixed rank"):
        ak.onnx.write_adapter(tmp_path / "out.onnx", Adapter({Target("0"): (of_rank(5),)}), tmp_path / "b.safetensors")


def test_an_adapter_at_some_of_the_targets(tmp_path):
    """What a file for required inputs does not change, it fills with what changes nothing."""
    held = {"a.weight": np.eye(16, 8, dtype="f4"), "b.weight": np.eye(8, 16, dtype="f4")}
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "a.weight"], ["h"], "/a/MatMul"),
        onnx.helper.make_node("MatMul", ["h", "b.weight"], ["y"], "/b/MatMul"),
    ]
    floats = [onnx.helper.make_tensor_value_info(name, 1, ["n", "m", 16]) for name in "xy"]
    held_as = [onnx.numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = onnx.helper.make_graph(nodes, "two", floats[:1], floats[1:], held_as)
    opset = [onnx.helper.make_opsetid("", 18)]
    path = graphs.saved(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "base.onnx")
    back = METHODS["lora"](A=torch.ones(1, 8), B=torch.ones(16, 1))
    both = Adapter({Target("a"): (lora(2, 1),), Target("b"): (back,)})
    ak.onnx.inject(path, both, tmp_path / "out.onnx", mode="inputs")
    out, part = tmp_path / "out.onnx", Adapter({Target("a"): (lora(2, 1),)})
    ak.onnx.write_adapter(out, part, tmp_path / "a.safetensors")
    feeds = load_file(tmp_path / "a.safetensors")
    changed = held["a.weight"] + delta(lora(2, 1)).T
    wanted = X @ changed @ held["b.weight"]
    np.testing.assert_allclose(plain(out, {"x": X, **feeds}), wanted, rtol=1e-4, atol=1e-4)
    ak.onnx.write_adapter(out, part, tmp_path / "a.onnx_adapter")
    np.testing.assert_allclose(with_loaded(out, tmp_path / "a.onnx_adapter"), wanted, rtol=1e-4, atol=1e-4)
    base = X @ held["a.weight"] @ held["b.weight"]
    np.testing.assert_allclose(with_loaded(out, tmp_path / "out.onnx.neutral.onnx_adapter"), base, rtol=1e-5, atol=1e-5)
    (read,) = ak.read(tmp_path / "a.onnx_adapter").updates
    assert str(read) == "a"
    ak.onnx.write_adapter(out, Adapter({Target("b"): (back,)}), tmp_path / "b.onnx_adapter")
    session = ak.onnx.Session(out, {name: tmp_path / f"{name}.onnx_adapter" for name in "ab"})
    np.testing.assert_allclose(session.run({"x": X}, "a")["y"], wanted, rtol=1e-4, atol=1e-4)
    both_at_once = X @ changed @ (held["b.weight"] + np.ones((8, 16)))
    np.testing.assert_allclose(session.run({"x": X}, {"a": 1, "b": 1})["y"], both_at_once, rtol=1e-4, atol=1e-4)
    for adapter, one in ((None, base), ("a", wanted)):
        binding = session.binding(adapter)
        binding.bind_cpu_input("x", X)
        binding.bind_output("y")
        session.run_bound(binding)
        np.testing.assert_allclose(binding.copy_outputs_to_cpu()[0], one, rtol=1e-4, atol=1e-4)


def test_the_command_and_what_a_session_refuses(model, tmp_path):
    ak.write(Adapter({Target("0"): (lora(2, 1),)}), tmp_path / "a.safetensors")
    done = run("inject", model, tmp_path / "a.safetensors", "-o", tmp_path / "out.onnx", "--mode", "inputs")
    assert done.exit_code == 0, done.output
    with pytest.raises(UsageError, match="OpenVINOExecutionProvider does not run here"):
        ak.onnx.Session(tmp_path / "out.onnx", providers=["openvino"])
    session = ak.onnx.Session(tmp_path / "out.onnx", providers=[("cpu", {}), ("CPUExecutionProvider", {})][:1])
    assert session.providers == ("CPUExecutionProvider",)
    (tmp_path / "two").mkdir()
    for name in ("decoder.onnx", "encoder.onnx"):
        (tmp_path / "two" / name).write_bytes(model.read_bytes())
    with pytest.raises(UsageError, match=r"several graphs: decoder\.onnx, encoder\.onnx.*FolderSession"):
        ak.onnx.Session(tmp_path / "two")
    folder = ak.onnx.FolderSession(tmp_path / "two")
    assert [*folder.parts] == ["decoder.onnx", "encoder.onnx"]
    np.testing.assert_array_equal(folder.run("encoder.onnx", {"x": X})["y"], graphs.run(model, X))
    with pytest.raises(TargetNotFound, match="no graph of the folder has slots"):
        folder.load("one", tmp_path / "a.safetensors")
    with pytest.raises(TargetNotFound, match="no file of an adapter 'one'"):
        folder.load("one")
    with pytest.raises(UsageError, match=r"neither .* the folder lacks encoder_model\.onnx"):
        folder.generate([[1, 2]])
    with pytest.raises(UsageError, match="no graph 'encoder'"):
        folder.run("encoder", {"x": X})
    with pytest.raises(UsageError, match="no adapter 'one' is loaded"):
        folder.run("encoder.onnx", {"x": X}, "one")

"""Graphs of bfloat16: the adapter's change compared with torch in float32, and with ONNX's reference implementation."""

import contextlib
import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import CheckFailed
from adapterkit.io.lazy import as_array, from_numpy
from adapterkit.io.ort_adapter import read_ort_adapter
from adapterkit.methods import METHODS
from adapterkit.onnx import checking
from adapterkit.onnx.widening import widened

IDS = torch.tensor([[1, 5, 3], [2, 2, 9]])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, 8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, ids):
        return self.down(torch.relu(self.up(self.embed(ids))))


def net():
    torch.manual_seed(0)
    return Net().eval().bfloat16()


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("bfloat16") / "base.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net(), (IDS,), path, dynamo=True, external_data=False, input_names=["ids"], verbose=False,
            dynamic_shapes=({0: "batch", 1: "length"},),
        )  # fmt: skip
    return path


def adapter(method):
    rng = torch.Generator().manual_seed(1)

    def update(out, into):
        A, B = torch.randn(2, into, generator=rng), torch.randn(out, 2, generator=rng)
        scale = torch.rand(out, generator=rng) + 0.5
        if method == "ia3":
            return METHODS["ia3"](l=scale)
        if method == "dora":
            return METHODS["dora"](A=A, B=B, magnitude=scale, scaling=0.5)
        return METHODS["lora"](A=A, B=B, scaling=0.5)

    return Adapter({Target("up"): (update(12, 8),), Target("down"): (update(8, 12),)})


def expected(held):
    """Run torch in float32 with the changed weights."""
    model = net().float()
    for target, (update,) in held.updates.items():
        layer = model.get_submodule(target.path)
        wide = update.map(lambda leaf: leaf.double())
        layer.weight = nn.Parameter(wide.new_weight(layer.weight.detach().double()).float())
        if layer.bias is not None:
            layer.bias = nn.Parameter(wide.new_bias(layer.bias.detach().double()).float())
    return model(IDS).detach().numpy()


def twin(path, file=None):
    feeds = {} if file is None else {name: as_array(leaf) for name, leaf in read_ort_adapter(file).tensors.items()}
    feeds = {name: array.astype("f4") for name, array in feeds.items()}
    session = onnxruntime.InferenceSession(widened(str(path)), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": IDS.numpy(), **feeds})[0]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("mode", ["constant", "slots", "inputs", "merge"])
def test_changes_of_bfloat16(graph, tmp_path, method, mode):
    held, out = adapter(method), tmp_path / "out.onnx"
    change = ak.onnx.merge if mode == "merge" else ak.onnx.inject
    report = change(graph, held, out, **({} if mode == "merge" else {"mode": mode}))
    assert report.difference < 1e-2
    assert "compared in float32" in report.note
    proto = onnx.load(out)
    assert {one.data_type for one in proto.graph.initializer if one.data_type != TensorProto.INT64} <= {
        TensorProto.BFLOAT16
    }
    file = out.with_suffix(".onnx_adapter") if mode in ("slots", "inputs") else None
    got, wanted = twin(out, file), expected(held)
    assert abs(wanted - twin(graph)).max() > 0.3 * abs(wanted).max()
    np.testing.assert_allclose(got, wanted, atol=2e-2 * abs(wanted).max())
    if file is not None:
        tensors = read_ort_adapter(file).tensors
        assert {leaf.dtype.name for leaf in tensors.values()} == {"BF16"}
        if method != "dora":  # DoRA's file has factors for this graph, which no other graph can use.
            assert ak.read(file).updates.keys() == held.updates.keys()


def test_the_reference_runs_the_written_graph(graph, tmp_path):
    """It computes in bfloat16 itself, so the twin is no part of this comparison."""
    held = adapter("lora")
    ak.onnx.inject(graph, held, tmp_path / "out.onnx")
    (got,) = ReferenceEvaluator(onnx.load(tmp_path / "out.onnx")).run(None, {"ids": IDS.numpy()})
    wanted = expected(held)
    np.testing.assert_allclose(got.astype("f4"), wanted, atol=3e-2 * abs(wanted).max())


def test_a_wrong_change_of_bfloat16_is_seen(graph, tmp_path, monkeypatch):
    held = adapter("lora")
    attach = ak.onnx.injecting.attach
    monkeypatch.setattr("adapterkit.onnx.injecting.attach", lambda found, *more: attach(found[:1], *more))
    with pytest.raises(CheckFailed, match="by another method"):
        ak.onnx.inject(graph, held, tmp_path / "out.onnx")
    fed = checking._fed
    monkeypatch.setattr("adapterkit.onnx.injecting.attach", attach)
    monkeypatch.setattr(checking, "_fed", lambda *given: {name: 2 * array for name, array in fed(*given).items()})
    with pytest.raises(CheckFailed, match="by another method"):
        ak.onnx.inject(graph, held, tmp_path / "out.onnx", mode="slots")
    assert not (tmp_path / "out.onnx").exists()


def test_twins_of_every_place_of_a_type(tmp_path):
    """Casts, constants, branches and functions; a graph without bfloat16 has no twin."""
    ids = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    half = helper.make_tensor("half", TensorProto.BFLOAT16, [1], [0.5])
    inner = [
        helper.make_node("Constant", [], ["c"], value=half), helper.make_node("Mul", ["narrow", "c"], ["inside"]),
    ]  # fmt: skip
    branch = helper.make_graph(inner, "b", [], [helper.make_tensor_value_info("inside", TensorProto.BFLOAT16, ["n"])])
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch),
        helper.make_node("Twice", ["chosen"], ["twice"], domain="own"),
        helper.make_node("Cast", ["twice"], ["y"], to=TensorProto.FLOAT),
    ]
    body = [helper.make_node("Constant", [], ["two"], value=helper.make_tensor("t", TensorProto.BFLOAT16, [1], [2.0])),
            helper.make_node("Mul", ["a", "two"], ["b"])]  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    twice = helper.make_function("own", "Twice", ["a"], ["b"], body, opsets)
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    made = helper.make_graph(
        nodes, "g", [ids], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])], [yes]
    )  # fmt: skip
    model = helper.make_model(made, opset_imports=opsets, functions=[twice], ir_version=10)
    onnx.save(model, tmp_path / "m.onnx")
    x = np.array([1.0, -3.0, 1.00390625], "f4")  # The last one has no equal in bfloat16.
    for given in (model.SerializeToString(), str(tmp_path / "m.onnx")):
        session = onnxruntime.InferenceSession(widened(given), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"x": x})[0], x)
    assert widened(session_bytes := widened(model.SerializeToString())) is None, session_bytes


def test_arrays_of_ml_dtypes_keep_their_values():
    import ml_dtypes

    for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        array = np.array([[0.5, -2.0, 1.5], [0.0, 4.0, -0.25]]).astype(kind)[:, ::2]
        assert np.array_equal(as_array(from_numpy(array)), array)
        assert as_array(from_numpy(array)).dtype == kind

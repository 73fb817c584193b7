"""Layers in odd places: in the branches of an If, behind dequantized weights, in graphs in memory."""

import numpy as np
import onnx
import onnx_graphs as graphs
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import adapterkit as ak
from adapterkit.adapter import Adapter, Target
from adapterkit.methods import METHODS

A, B = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((2, 16), (8, 2)))
ADAPTER = Adapter({Target("q"): (METHODS["lora"](A=A, B=B, scaling=0.5),)})
X = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("f4")
W = np.random.default_rng(1).normal(size=(16, 8)).astype("f4")
DELTA = X @ (0.5 * (B @ A)).numpy().T


def model(nodes, held, more=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 8])
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    made = helper.make_graph(nodes, "g", [x, *more], [y], stored)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_a_layer_in_the_branches_of_an_if(tmp_path):
    def branch(name, op):
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        nodes = [
            helper.make_node("MatMul", ["x", "w"], [f"{name}_h"], "/q/MatMul"),
            helper.make_node(op, [f"{name}_h"], [out.name]),
        ]
        return helper.make_graph(nodes, name, [], [out])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("then", "Neg"), else_branch=branch("else", "Identity")
    )
    choice = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    path = tmp_path / "base.onnx"
    path.write_bytes(model([node], {"w": W}, [choice]).SerializeToString())
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(path, ADAPTER, tmp_path / "out.onnx")
        assert len(report.found[0].spots) == 2
        for sign, chosen in ((-1, True), (1, False)):
            got = graphs.run(tmp_path / "out.onnx", X, c=np.array(chosen))
            np.testing.assert_allclose(got, sign * (X @ W + DELTA), rtol=1e-4, atol=1e-4)


def test_a_dequantized_weight_stays_as_it_is(tmp_path):
    scale = np.abs(W).max(0) / 127
    packed = np.round(W / scale).astype(np.int8)
    nodes = [
        helper.make_node("DequantizeLinear", ["q8", "scale"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"], "/q/MatMul"),
    ]
    path = tmp_path / "base.onnx"
    path.write_bytes(model(nodes, {"q8": packed, "scale": scale.astype("f4")}).SerializeToString())
    ak.onnx.inject(path, ADAPTER, tmp_path / "out.onnx")
    wanted = graphs.run(path, X) + DELTA
    np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", X), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("scale", [np.abs(W).max(0, keepdims=True) / 127, np.abs(W).max() / 127])
@pytest.mark.parametrize("turned", [False, True])
def test_a_merge_into_a_weight_that_is_cast_and_scaled(scale, turned, tmp_path):
    """As weight-only quantization in 8 bits stores it; another layer reads the same numbers."""
    packed, scale = np.round(W / scale).astype(np.int8), np.asarray(scale, "f4")
    held = {"q8": packed.T.copy() if turned else packed, "scale": scale.T.copy() if turned else scale}
    nodes = [
        helper.make_node("Cast", ["q8"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "scale"], ["m"]),
        helper.make_node("Transpose", ["m"], ["w"], perm=[1, 0] if turned else [0, 1]),
        helper.make_node("MatMul", ["x", "w"], ["h"], "/q/MatMul"),
        helper.make_node("MatMul", ["x", "w"], ["g"], "/k/MatMul"),
        helper.make_node("Sub", ["h", "g"], ["y"]),
    ]  # fmt: skip
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    path.write_bytes(model(nodes, held).SerializeToString())
    report = ak.onnx.merge(path, ADAPTER, out, quantized="dequantize")
    assert report.difference < 1e-5
    np.testing.assert_allclose(graphs.run(out, X), DELTA, rtol=1e-4, atol=1e-4)
    report = ak.onnx.merge(path, ADAPTER, out, quantized="requantize")
    assert 0 < report.damage["q"]["error"] < 0.02
    assert [i.data_type for i in onnx.load(out).graph.initializer].count(TensorProto.INT8) == 2
    assert abs(graphs.run(out, X) - DELTA).max() < 0.1 * abs(DELTA).max()
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load(out).graph.initializer[0]), held["q8"])


def test_a_model_in_memory_stays_as_it_is(tmp_path):
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"], "/q/MatMul")], {"w": W})
    held = ir.from_proto(proto)
    before = ir.to_proto(held).SerializeToString()
    ak.onnx.inject(held, ADAPTER, tmp_path / "out.onnx")
    assert ir.to_proto(held).SerializeToString() == before
    np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", X), X @ W + DELTA, rtol=1e-4, atol=1e-4)


def test_a_merged_weight_keeps_its_name_and_what_others_read_stays(tmp_path):
    """Two layers read one transposed tensor; then one alone."""
    nodes = [
        helper.make_node("Transpose", ["q.weight"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["h"], "/q/MatMul"),
        helper.make_node("MatMul", ["x", "t"], ["g"], "/k/MatMul"),
        helper.make_node("Sub", ["h", "g"], ["y"]),
    ]
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    held = {"q.weight": np.ascontiguousarray(W.T)}
    path.write_bytes(model(nodes, held).SerializeToString())
    key = Adapter({Target("k"): ADAPTER.updates[Target("q")]})
    ak.onnx.merge(path, key, out)
    np.testing.assert_allclose(graphs.run(out, X), -DELTA, rtol=1e-4, atol=1e-4)
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(out).graph.initializer}
    assert (stored["q.weight"] == held["q.weight"]).all()
    path.write_bytes(model([*nodes[:2], helper.make_node("Identity", ["h"], ["y"])], held).SerializeToString())
    once = ak.onnx.merge(path, ADAPTER, out)
    again = ak.onnx.merge(out, ADAPTER, tmp_path / "twice.onnx")
    assert [place.method for place in (*once.found, *again.found)] == ["initializer", "initializer"]
    assert [i.name for i in onnx.load(tmp_path / "twice.onnx").graph.initializer] == ["q.weight"]
    np.testing.assert_allclose(graphs.run(again.out, X), X @ W + 2 * DELTA, rtol=1e-4, atol=1e-4)

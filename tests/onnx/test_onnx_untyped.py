"""Graphs whose values have no types, as float16's converters leave them when they infer no shapes."""

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.methods import METHODS

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("f4")


@pytest.mark.parametrize("mode", ["constant", "slots", "merge"])
def test_layers_behind_values_without_types(tmp_path, mode):
    """A Where's first input is a condition, so only the layer's own weight shows the type of its input."""
    rng = np.random.default_rng(1)
    held = {"fc.weight": rng.normal(size=(8, 5)).astype("f4"), "seen": rng.random(8) < 0.7, "rest": np.zeros(1, "f4")}
    nodes = [
        helper.make_node("Where", ["seen", "x", "rest"], ["h"]),
        helper.make_node("MatMul", ["h", "fc.weight"], ["y"], "/fc/MatMul"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    plain = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    onnx.save(convert_float_to_float16(plain, keep_io_types=True, disable_shape_infer=True), path)
    A, B = (torch.from_numpy(rng.normal(size=shape).astype("f4") / 2) for shape in ((2, 8), (5, 2)))
    adapter = Adapter({Target("fc"): (METHODS["lora"](A=A, B=B),)})
    if mode == "merge":
        report, feeds = ak.onnx.merge(path, adapter, out), {}
    else:
        report = ak.onnx.inject(path, adapter, out, mode=mode)
        feeds = ak.onnx.fit(out, adapter) if mode == "slots" else {}
    assert report.difference < 4e-3
    wanted = np.where(held["seen"], X, 0) @ (held["fc.weight"] + (B @ A).numpy().T)
    np.testing.assert_allclose(graphs.run(out, X, **feeds), wanted, atol=4e-3 * abs(wanted).max())

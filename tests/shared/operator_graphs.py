"""Graphs of a few operators, given as tuples, and their outputs in onnxruntime."""

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def saved(path, x_shape, nodes, tensors):
    """Write a graph from `x` to `y`; each node is (operator, inputs, output or outputs, name, attributes)."""
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [out] if isinstance(out, str) else out, name, **words)
         for op, inputs, out, name, words in nodes], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(array, order="C"), name) for name, array in tensors.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def ran(path, x, **feeds):
    """Return the graph's output in float64."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, **feeds})[0].astype("f8")

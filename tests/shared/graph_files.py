"""Write a graph whose weight is in a data file."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def graph(folder: Path) -> Path:
    """Write `x @ q` with the weight in a data file."""
    folder.mkdir()
    weight = numpy_helper.from_array(np.ones((8, 4), "f4"), "layers.0.q.weight")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in (("x", 4), ("y", 8)))
    node = helper.make_node("Gemm", ["x", "layers.0.q.weight"], ["y"], "/layers.0/q/Gemm", transB=1)
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], [weight]), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )  # fmt: skip
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="q.data", size_threshold=0)
    return folder / "model.onnx"

"""Small graphs with every kind of layer, written with onnx's helper, and the same layers in torch."""

import contextlib
from functools import cache
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

onnxruntime.set_default_logger_severity(4)

with contextlib.suppress(ImportError, AttributeError):
    # Cache the exporter's operators: for every export, torch parses the source of its 500 operators again, which takes
    # a second of processor time, and lists the names of all operators 58 times. torch only reads the results, and no
    # test adds operators.
    from torch._export import utils
    from torch.onnx._internal.exporter import _registration

    _registration.onnxscript_apis.get_torchlib_ops = cache(_registration.onnxscript_apis.get_torchlib_ops)
    utils._materialize_cpp_cia_ops = cache(utils._materialize_cpp_cia_ops)

IDS = np.array([[0, 3], [15, 7]])
LAYERS = {
    "matmul": (lambda: nn.Linear(16, 8), (2, 3, 16)),
    "unbiased": (lambda: nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "transposed": (lambda: nn.Linear(16, 8), (2, 3, 16)),
    "gemm": (lambda: nn.Linear(16, 8), (3, 16)),
    "conv1d": (lambda: nn.Conv1d(16, 8, 3, padding=1), (2, 16, 6)),
    "conv2d": (lambda: nn.Conv2d(16, 8, 3, stride=2, dilation=2, padding=2), (2, 16, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(16, 8, 2), (1, 16, 3, 3, 3)),
    "groups": (lambda: nn.Conv1d(32, 8, 3, groups=2), (2, 32, 6)),
    "transpose": (lambda: nn.ConvTranspose1d(16, 8, 3, stride=2, padding=1), (2, 16, 6)),
    "transpose-groups": (lambda: nn.ConvTranspose2d(16, 8, 3, groups=2), (2, 16, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (2, 16, 6, 6)),
    "embedding": (lambda: nn.Embedding(16, 8), None),
}


def built(kind, seed=0):
    """Return a torch model with one layer named 0, in float64, its input as an array, and the same graph."""
    torch.manual_seed(seed)
    build, shape = LAYERS[kind]
    layer = build().double().eval()
    x = IDS if shape is None else np.random.default_rng(seed).normal(size=shape)
    return nn.Sequential(layer), x, graph(kind, layer)


def graph(kind, layer, opset=18):
    W = layer.weight.detach().numpy().astype("f4")
    b = None if getattr(layer, "bias", None) is None else layer.bias.detach().numpy().astype("f4")
    held, nodes = {"0.weight": W} | ({} if b is None else {"0.bias": b}), []
    if kind in ("matmul", "unbiased"):
        held["onnx::MatMul_1"] = held.pop("0.weight").T.copy()
        nodes.append(helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["h" if b is not None else "y"], "/0/MatMul"))
    elif kind == "transposed":
        nodes.append(helper.make_node("Transpose", ["0.weight"], ["t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", "t"], ["h"], "/0/MatMul"))
    elif kind == "gemm":
        nodes.append(helper.make_node("Gemm", ["x", "0.weight", "0.bias"], ["y"], "node", transB=1))
    elif kind == "embedding":
        nodes.append(helper.make_node("Gather", ["0.weight", "x"], ["y"], "node"))
    else:
        words = {"strides": layer.stride, "dilations": layer.dilation, "pads": [*layer.padding] * 2}
        op = "ConvTranspose" if kind.startswith("transpose") else "Conv"
        nodes.append(helper.make_node(op, ["x", *held], ["y"], "node", group=layer.groups, **words))
    if nodes[-1].output[0] == "h":
        nodes.append(helper.make_node("Add", ["0.bias", "h"], ["y"], "/0/Add"))
    kind_of_x = TensorProto.INT64 if kind == "embedding" else TensorProto.FLOAT
    axes = len(LAYERS[kind][1] or (0, 0))
    out = axes + (kind == "embedding")
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind_of_x, ["batch", *(LAYERS[kind][1] or (0, "length"))[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"y{n}" for n in range(out)])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(path, x, **more):
    """Return the first output in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    kind = np.int64 if "int64" in entry.type else np.float32
    return session.run(None, {entry.name: np.asarray(x).astype(kind), **more})[0]


def saved(model, path):
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def in_steps(session, ids, cuts, mask, positions, heads, width):
    """Return the logits of all tokens; each run continues with the past of the run before, of this size of heads."""
    empty = np.zeros((len(ids), heads, 0, width), "f4")
    past, got = {name: empty for name in session.inputs if name.startswith("past_key")}, []
    for start, stop in pairwise(cuts):
        feeds = {
            "input_ids": ids[:, start:stop], "past_input_ids": ids[:, :start], "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
        }  # fmt: skip
        told = session.run({**{name: tensor.numpy() for name, tensor in feeds.items()}, **past})
        past = {name: told[name.replace("past_key_values", "present")] for name in past}
        got.append(torch.tensor(told["logits"]))
    return torch.cat(got, 1)


def with_int32(path):
    """Change a graph's int64 inputs to int32, which some exporters write."""
    model = onnx.load(path)
    casts = []
    for entry in model.graph.input:
        if entry.type.tensor_type.elem_type == TensorProto.INT64:
            entry.type.tensor_type.elem_type = TensorProto.INT32
            for node in model.graph.node:
                node.input[:] = [f"{name}.int64" if name == entry.name else name for name in node.input]
            casts.append(helper.make_node("Cast", [entry.name], [f"{entry.name}.int64"], to=TensorProto.INT64))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)

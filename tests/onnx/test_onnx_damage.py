"""Damaged graphs: each is refused by a typed error that names the file and the place, or is used."""

import importlib
import random
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_graphs as graphs
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Malformed
from adapterkit.onnx.trial_inputs import SIZES

TOOLS = Path(__file__).parents[2] / "tools" / "fuzz"


def lora(out=8, into=16, *kernel):
    return ak.METHODS["lora"](A=torch.randn(2, into, *kernel), B=torch.randn(out, 2))


def linear():
    return onnx.ModelProto.FromString(graphs.built("transposed")[2].SerializeToString())


def short(proto):
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    return "0.weight"


def untyped(proto):
    proto.graph.initializer[0].data_type = 0
    return "0.weight"


def unknown_type(proto):
    proto.graph.initializer[1].data_type = 99
    return "0.bias"


def negative(proto):
    proto.graph.initializer[0].dims[0] = -8
    return "0.weight"


def few_numbers(proto):
    tensor = proto.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0] * 7)
    return "0.bias"


def in_a_node(proto):
    tensor = numpy_helper.from_array(np.zeros(8, "f4"))
    tensor.raw_data = tensor.raw_data[:-1]
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], "constant", value=tensor))
    return "constant: value"


def nameless(proto):
    proto.graph.initializer[0].name = ""
    return "nothing computes its input|has no name"


def in_circles(proto):
    proto.graph.node[0].input[0] = "h"
    return "depends on itself"


def from_nowhere(proto):
    proto.graph.node[1].input[1] = "nowhere"
    return "/0/MatMul: nothing computes its input 'nowhere'"


def twice(proto):
    proto.graph.node[1].output[0] = "t"
    return "'t' is defined twice"


def without_inputs(proto):
    del proto.graph.node[1].input[1]
    return "/0/MatMul: a MatMul has 1 inputs, but requires inputs"


def wrong_attribute(proto):
    proto.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("perm", 1))
    return "the attribute perm of a Transpose has the wrong type"


def wrong_order(proto):
    proto.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("perm", [0, 7]))
    return r"order \[0, 7\] for 2 axes"


DAMAGES = [
    short, untyped, unknown_type, negative, few_numbers, in_a_node, nameless, in_circles, from_nowhere, twice,
    without_inputs, wrong_attribute, wrong_order,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_with_its_file_and_place(damage, tmp_path):
    proto = linear()
    match, path = damage(proto), tmp_path / "bad.onnx"
    path.write_bytes(proto.SerializeToString())
    adapter = ak.Adapter({ak.Target("0"): (lora(),)})
    for use in (
        lambda: ak.onnx.inject(path, adapter, tmp_path / "out.onnx"),
        lambda: ak.onnx.merge(path, adapter, tmp_path / "out.onnx"),
        lambda: ak.onnx.plan(path, adapter),
        lambda: ak.onnx.layers(path),
    ):
        with pytest.raises(Malformed, match=match) as told:
            use()
        assert told.value.path == str(path)
        assert told.value.cure
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]


def test_branches_that_return_what_is_computed_from_them(tmp_path):
    """As onnxruntime's converter to float16 leaves a merged decoder: it renames the outputs of the If alone."""
    wide, half = TensorProto.FLOAT, TensorProto.FLOAT16
    branches = []
    for op in ("Neg", "Relu"):
        inside = [helper.make_node("MatMul", ["x", "w"], [f"{op}/h"]), helper.make_node(op, [f"{op}/h"], [f"{op}/y"])]
        end = helper.make_tensor_value_info("y", wide, None)
        branches.append(helper.make_graph(inside, op, [], [end]))
    nodes = [
        helper.make_node("If", ["c"], ["half"], "choice", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Cast", ["half"], ["y"], to=wide),
    ]
    sizes = {"x": (half, ["n", 16]), "y": (wide, ["n", 8]), "c": (TensorProto.BOOL, [])}
    x, y, c = (helper.make_tensor_value_info(name, *size) for name, size in sizes.items())
    made = helper.make_graph(nodes, "g", [x, c], [y], [numpy_helper.from_array(np.ones((16, 8), "f2"), "w")])
    path = tmp_path / "bad.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(Exception, match=r"Subgraph output \(y\) is an outer scope value"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(Malformed, match=r"choice: a graph inside this If does not compute its output 'y'"):
        ak.onnx.layers(path)


def half_converted(wide_name):
    """A graph as onnxconverter-common leaves a merged decoder: one tensor in a branch stays float32."""
    wide, half = TensorProto.FLOAT, TensorProto.FLOAT16
    branches = []
    for op in ("Neg", "Relu"):
        inside = [
            helper.make_node("MatMul", ["x", "w"], [f"{op}/h"], "/0/MatMul"),
            helper.make_node("Add", [f"{op}/h", "b"], [f"{op}/y"]),
        ]
        end = helper.make_tensor_value_info(f"{op}/y", half, None)
        branches.append(helper.make_graph(inside, op, [], [end]))
    nodes = [helper.make_node("If", ["c"], ["y"], "choice", then_branch=branches[0], else_branch=branches[1])]
    sizes = {"x": (half, ["n", 16]), "y": (half, ["n", 8]), "c": (TensorProto.BOOL, [])}
    x, y, c = (helper.make_tensor_value_info(name, *size) for name, size in sizes.items())
    held = {"w": np.ones((16, 8), "f2"), "b": np.ones(8, "f2")}
    held[wide_name] = held[wide_name].astype("f4")
    tensors = [numpy_helper.from_array(array, name) for name, array in held.items()]
    made = helper.make_graph(nodes, "g", [x, c], [y], tensors)
    assert wide == tensors[[*held].index(wide_name)].data_type
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def one(change, **options):
    return lambda path, out: change(path, ak.Adapter({ak.Target("0"): (lora(),)}), out, **options)


CHANGES = {
    "inject": one(ak.onnx.inject),
    "slots": one(ak.onnx.inject, mode="slots"),
    "merge": one(ak.onnx.merge),
    "merge two": lambda path, out: ak.onnx.merge(path, [ak.Adapter({ak.Target("0"): (lora(),)})] * 2, out),
}


@pytest.mark.parametrize("wide_name", ["w", "b"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_that_onnxruntime_never_loads(change, wide_name, tmp_path):
    path, out = tmp_path / "bad.onnx", tmp_path / "out.onnx"
    path.write_bytes(half_converted(wide_name).SerializeToString())
    with pytest.raises(Exception, match="bound to different types"):
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(Malformed, match=r"even without the adapter .*bound to different types.*--no-check") as told:
        CHANGES[change](path, out)
    assert told.value.path == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.onnx"]
    one(ak.onnx.merge, check=False)(path, out)
    assert out.exists()


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_with_an_operator_that_only_its_own_runtime_has(change, tmp_path):
    proto = linear()
    proto.graph.output[0].name = "z"
    proto.graph.node.append(helper.make_node("Secret", ["y"], ["z"], domain="their.own"))
    proto.opset_import.append(helper.make_opsetid("their.own", 1))
    path = tmp_path / "base.onnx"
    path.write_bytes(proto.SerializeToString())
    report = CHANGES[change](path, tmp_path / "out.onnx")
    assert report.out.exists()
    assert report.difference is None
    assert report.note


def test_a_group_of_none_does_not_reach_onnxruntime(tmp_path):
    """It divides by it, and ends the process."""
    proto = graphs.built("transpose-groups")[2]
    (group,) = (each for each in proto.graph.node[0].attribute if each.name == "group")
    group.i = 0
    (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
    for use in (ak.onnx.layers, ak.onnx.Session):
        with pytest.raises(Malformed, match=r"the attribute group of a .* must be at least 1"):
            use(tmp_path / "bad.onnx")


def test_names_that_are_no_text(tmp_path):
    data = graphs.built("gemm")[2].SerializeToString()
    (tmp_path / "bad.onnx").write_bytes(data.replace(b"node", b"n\xffde"))
    with pytest.raises(Malformed, match=r"not UTF-8|not an ONNX model"):
        ak.onnx.layers(tmp_path / "bad.onnx")


def seeds(folder):
    """Graphs of every kind of layer, quantized ones, one with graphs inside: their bytes, and adapters for them."""
    for kind in graphs.LAYERS:
        model, _, proto = graphs.built(kind)
        out, into, *kernel = model[0].weight.shape
        swapped = kind == "embedding" or isinstance(model[0], torch.nn.modules.conv._ConvTransposeNd)
        update = lora(into, out, *kernel) if swapped else lora(out, into, *kernel)
        target = ak.Target("0", "in out *k" if kind == "embedding" else "out *in")
        yield proto.SerializeToString(), ak.Adapter({target: (update,)})
    path, plain = folder / "seed.onnx", ak.Adapter({ak.Target("0"): (lora(),)})
    path.write_bytes(graphs.built("matmul")[2].SerializeToString())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_dynamic(path, folder / "dynamic.onnx")
    yield (folder / "dynamic.onnx").read_bytes(), plain
    branch = []
    for name, op in (("a", "Neg"), ("b", "Relu")):
        inside = [helper.make_node("MatMul", ["x", "w"], [f"{name}h"], "/0/MatMul")]
        inside.append(helper.make_node(op, [f"{name}h"], [name]))
        end = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branch.append(helper.make_graph(inside, name, [], [end]))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 16), ("y", 8)))
    choice = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    held = [numpy_helper.from_array(np.ones((16, 8), "f4"), "w")]
    made = helper.make_graph([node], "g", [x, choice], [y], held)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    yield model.SerializeToString(), plain


def test_mutated_graphs_raise_typed_errors_alone(tmp_path, monkeypatch):
    """Fields of protobuf messages changed, cleared, copied and moved."""
    monkeypatch.syspath_prepend(TOOLS)
    mutate, rng = importlib.import_module("graphs").onnx, random.Random(5)
    known, path, out = list(seeds(tmp_path)), tmp_path / "m.onnx", tmp_path / "out.onnx"
    used, pathless = 0, []
    for number in range(150):
        data, adapter = known[number % len(known)]
        path.write_bytes(mutate(data, rng))
        for use in (
            lambda: ak.onnx.layers(path),
            lambda: ak.onnx.inject(path, adapter, out, check=False, mode=rng.choice(("constant", "slots"))),  # noqa: B023
            lambda: ak.onnx.merge(path, adapter, out, check=False, quantized="dequantize"),  # noqa: B023
        ):
            try:
                use()
                used += 1
            except AdapterkitError as error:
                pathless += [str(error)] if error.path is None else []
    assert not pathless
    assert used > 120


def test_outputs_that_no_graph_gives_twice_are_not_judged(tmp_path, monkeypatch):
    """The outputs of the original graph are noisy, here by random numbers, so the changed graph cannot be judged."""
    measured = []
    monkeypatch.setattr("adapterkit.onnx.checking._noise", lambda *given: measured.append(given) or 0.01)
    W = np.random.default_rng(0).standard_normal((4, 8), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight"], ["a"], "/up/MatMul"),
        helper.make_node("RandomUniformLike", ["a"], ["r"], "/random", high=0.01, low=0.0),
        helper.make_node("Add", ["a", "r"], ["y"], "/Add"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name, size in (("x", 4), ("y", 8))]
    graph = helper.make_graph(nodes, "noisy", ports[:1], ports[1:], [numpy_helper.from_array(W, "up.weight")])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "noisy.onnx")
    A, B = (np.random.default_rng(1).standard_normal(shape, np.float32) for shape in ((2, 4), (8, 2)))
    adapter = ak.Adapter({ak.Target("up"): (ak.METHODS["lora"](A=torch.from_numpy(A), B=torch.from_numpy(B)),)})
    report = ak.onnx.inject(tmp_path / "noisy.onnx", adapter, tmp_path / "out.onnx")
    assert report.difference is None
    assert "rounding alone changes the original graph's outputs by" in report.note
    # A measurement starts a session and runs the whole graph, so make only one for each input that is tried.
    assert len(measured) == len(SIZES)

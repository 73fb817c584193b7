"""Quantized graphs without the rounding of their activations: they compute what torch computes with the same weights.

Torch gets the numbers that the integer weights of each graph stand for.
"""

import warnings

import ml_dtypes
import numpy as np
import onnx
import onnx_graphs as graphs
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import CheckFailed
from adapterkit.methods import METHODS
from adapterkit.onnx.checking import checked_injection, checked_merge
from adapterkit.onnx.unrounded import unround

BF16 = ml_dtypes.bfloat16
X = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype("f4")


class Mixed(nn.Module):
    """Convolutions, products, a sum, a sigmoid, a pool and a concatenation, which quantizers turn into integers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.last = nn.Linear(16, 12, bias=False)

    def forward(self, x):
        y = torch.relu(self.conv(x))
        h = torch.cat([y.mean((2, 3), keepdim=True).flatten(1), torch.amax(y, (2, 3))], 1)
        h = h + self.down(torch.sigmoid(self.up(h)))
        return torch.softmax(self.last(torch.relu(h)), -1)


class Inputs(quantization.CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": X}]

    def get_next(self):
        return self.left.pop() if self.left else None


def static(form, **options):
    form = getattr(quantization.QuantFormat, form)
    return lambda path, out: quantization.quantize_static(
        path, out, Inputs(), quant_format=form, weight_type=quantization.QuantType.QInt8, **options
    )


def dynamic(path, out):
    model = onnx.load(path)
    del model.graph.value_info[:]
    quantization.quantize_dynamic(model, out, weight_type=quantization.QuantType.QInt8)


def optimized(quantize):
    def make(path, out):
        between = out.with_name(f"between-{out.name}")
        quantize(path, between)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out)
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(between), options, providers=["CPUExecutionProvider"])

    return make


FORMS = {
    "qdq": static("QDQ"),
    "qdq-channel": static("QDQ", per_channel=True),
    "qoperator": static("QOperator"),
    "dynamic": dynamic,
    "qdq-optimized": optimized(static("QDQ")),
    "dynamic-optimized": optimized(dynamic),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model's export, and the export in each form."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("unrounded"), Mixed().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.tensor(X),), str(folder / "float.onnx"), input_names=["x"], output_names=["y"], dynamo=False,
            opset_version=17,
        )  # fmt: skip
        for name, quantize in FORMS.items():
            quantize(folder / "float.onnx", folder / f"{name}.onnx")
    return folder


def loras(factor=1.0):
    g = torch.Generator().manual_seed(2)
    A, B = torch.randn(2, 32, generator=g), torch.randn(16, 2, generator=g)
    C, D = torch.randn(2, 3, 3, 3, generator=g), torch.randn(8, 2, generator=g)
    down = METHODS["lora"](A=A, B=B, scaling=factor)
    return Adapter({Target("down"): (down,), Target("conv"): (METHODS["lora"](A=C, B=D, scaling=0.3 * factor),)})


def answered(folder, name, adapter=None):
    """Return torch's output, with a graph's weights, and the changes of a LoRA."""
    model, path = Mixed().eval(), folder / f"between-{name}.onnx"
    held = onnx.load(path if path.exists() else folder / f"{name}.onnx").graph.initializer
    arrays = {one.name: numpy_helper.to_array(one).astype("f8") for one in held}
    with torch.no_grad():
        for key, q in arrays.items():
            if key.endswith("_quantized") and q.ndim > 1:
                scale, zero = (arrays[key.replace("_quantized", part)] for part in ("_scale", "_zero_point"))
                along = [-1, 1, 1, 1] if q.ndim == 4 else [1, -1]
                W = torch.tensor((q - zero.reshape(along)) * scale.reshape(along)).float()
                W = W if q.ndim == 4 else W.T
                module = next(
                    one for one in (model.conv, model.up, model.down, model.last) if one.weight.shape == W.shape
                )
                module.weight.copy_(W)
        for target, update in adapter or ():
            module = model.get_submodule(target.path)
            change = update.B.flatten(1).double() @ update.A.flatten(1).double() * update.scaling
            module.weight += change.float().reshape(module.weight.shape)
        return model(torch.tensor(X)).double().numpy()


def without_rounding(path):
    model = ir.from_proto(onnx.load(path))
    assert unround(model)
    options = onnxruntime.SessionOptions()
    # If onnxruntime fuses the dequantized weights with a product, the product rounds its input.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, {"x": X})[0]


@pytest.mark.parametrize("name", FORMS)
def test_without_rounding_a_graph_computes_what_torch_does(name, made):
    wanted = answered(made, name)
    assert abs(graphs.run(made / f"{name}.onnx", X) - wanted).max() > 1e-4  # As it is, it rounds.
    assert abs(without_rounding(made / f"{name}.onnx") - wanted).max() < 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("mode", ["constant", "merge"])
@pytest.mark.parametrize("name", FORMS)
def test_the_check_compares_changes_without_rounding(name, mode, made, tmp_path):
    """An adapter larger than the calibrated ranges: the change is exact, and the report tells what clipping costs."""
    path, out, wanted = made / f"{name}.onnx", tmp_path / "out.onnx", answered(made, name, loras())
    change = ak.onnx.inject if mode == "constant" else ak.onnx.merge
    words = {} if mode == "constant" else {"quantized": "dequantize"}
    report = change(path, loras(), out, check={"x": X}, **words)
    assert abs(without_rounding(out) - wanted).max() < 1e-5 * abs(wanted).max()
    assert report.difference is not None
    assert report.difference < 1e-5
    if "dynamic" in name:
        assert report.saturation is None
        return
    off = abs(graphs.run(out, X) - wanted).max() / abs(wanted).max()
    assert off > 0.02
    assert report.saturation.moved[1] == pytest.approx(off, rel=0.02)
    assert report.saturation.moved[0] < off
    (warning,) = report.warnings
    moved = f"change the outputs by {report.saturation.moved[1]:.2g} times the largest output value; without"
    assert moved in warning


@pytest.mark.parametrize("name", FORMS)
def test_the_check_finds_a_wrong_change_under_the_rounding(name, made, tmp_path):
    """A factor that is off by a hundredth: 8 bits hide it, and the check without rounding does not."""
    path, out = made / f"{name}.onnx", tmp_path / "out.onnx"
    ak.onnx.inject(path, loras(0.101), out, check=False)
    with pytest.raises(CheckFailed, match="from those of a graph that was changed by another method"):
        checked_injection(path, loras(0.1), None, out, None, {"x": X})


WHY = "because two correct graphs may round differently, and Clip all cannot be computed without rounding"


@pytest.fixture
def unknown(made, tmp_path):
    """An integer graph with a Clip without bounds, whose float form is unknown."""
    model = onnx.load(made / "qoperator.onnx")
    at, quantizer = next((at, node) for at, node in enumerate(model.graph.node) if node.op_type == "QuantizeLinear")
    out = quantizer.output[0]
    quantizer.output[0] = "before"
    model.graph.node.insert(at + 1, helper.make_node("Clip", ["before"], [out], name="all"))
    onnx.save(model, tmp_path / "unknown.onnx")
    assert (graphs.run(tmp_path / "unknown.onnx", X) == graphs.run(made / "qoperator.onnx", X)).all()
    return tmp_path / "unknown.onnx"


def test_the_report_names_the_node_whose_rounding_prevents_a_comparison(unknown, made, tmp_path):
    report = ak.onnx.inject(unknown, loras(), tmp_path / "out.onnx", check={"x": X})
    written, wanted = onnx.load(tmp_path / "out.onnx"), answered(made, "qoperator", loras())
    next(node for node in written.graph.node if node.name == "all").op_type = "Identity"
    onnx.save(written, tmp_path / "known.onnx")
    assert abs(without_rounding(tmp_path / "known.onnx") - wanted).max() < 1e-5 * abs(wanted).max()
    assert report.difference is None
    assert report.note.endswith(f"the graph runs; its outputs were not compared, {WHY}")


def test_a_wrong_change_is_an_error_where_the_rounding_stays(unknown, made, tmp_path):
    """Merge another adapter than the check is told; the right one passes."""
    words = {"quantized": "dequantize", "given": {"x": X}}
    for path in (unknown, made / "qoperator.onnx"):
        out = tmp_path / f"merged-{path.name}"
        ak.onnx.merge(path, loras(), out, quantized="dequantize", check=False)
        assert checked_merge(path, [loras()], [1.0], None, out, **words).difference < 0.1
        for wrong in (loras(-1), loras(0.1)):
            with pytest.raises(CheckFailed, match="from those of a graph that was changed by another method"):
                checked_merge(path, [wrong], [1.0], None, out, **words)


@pytest.mark.parametrize("limit", [0.0, 1e3])
def test_a_difference_that_rounding_may_explain_is_not_judged(limit, unknown, tmp_path, monkeypatch):
    """If rounding explains as much as the adapter changes, the difference shows nothing, and the report says so."""
    monkeypatch.setattr("adapterkit.onnx.checking.ROUNDINGS", limit)
    ak.onnx.merge(unknown, loras(), tmp_path / "out.onnx", quantized="dequantize", check=False)
    words = {"quantized": "dequantize", "given": {"x": X}}
    if not limit:
        with pytest.raises(CheckFailed, match="from those of a graph that was changed by another method"):
            checked_merge(unknown, [loras(-1)], [1.0], None, tmp_path / "out.onnx", **words)
        return
    outcome = checked_merge(unknown, [loras(-1)], [1.0], None, tmp_path / "out.onnx", **words)
    assert outcome.difference > 0.03
    assert outcome.note == f"the difference was not judged, {WHY}"


def test_rows_of_an_integer_embedding_stay_what_they_are():
    """A QLinearAdd of two embeddings: no node rounds its inputs."""
    rng = np.random.default_rng(1)
    held = {
        "a": rng.integers(0, 255, (5, 8)).astype(np.uint8), "b": rng.integers(0, 255, (8,)).astype(np.uint8),
        "s": np.float32(0.03), "z": np.uint8(100), "t": np.float32(0.01),
    }  # fmt: skip
    scales = ["s", "z", "b", "s", "z", "t", "z"]
    nodes = [
        helper.make_node("Gather", ["a", "x"], ["g"]),
        helper.make_node("QLinearAdd", ["g", *scales], ["q"], domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["q", "t", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    assert unround(model)
    ids = np.array([0, 3, 4])
    wanted = (held["a"][ids].astype("f8") - 100) * 0.03 + (held["b"].astype("f8") - 100) * 0.03
    got = graphs.run(ir.to_proto(model).SerializeToString(), ids)
    assert abs(wanted).max() > 1.56  # Beyond the range that the operator has.
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def quantized_by_hand(nodes, held, shape, out="y", kind=TensorProto.FLOAT):
    """A graph that rounds `x` to `q`, with a scale `s` and a zero point `z`, and goes on with nodes."""
    held = {"s": np.float32(0.03), "z": np.uint8(100), "t": np.float32(0.01), **held}
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), *nodes], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, kind, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def own(op, given, out):
    return helper.make_node(op, given, [out], domain="com.microsoft")


MOVED = {
    "nearest": (
        [helper.make_node("Resize", ["q", "", "twice"], ["r"], mode="nearest")],
        lambda x: nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"),
    ),
    "linear": (
        [helper.make_node("Resize", ["q", "", "twice"], ["r"], mode="linear")],
        lambda x: nn.functional.interpolate(x, scale_factor=2, mode="bilinear"),
    ),
    "zeros around": (
        [helper.make_node("Pad", ["q", "one", "z"], ["r"])],
        lambda x: nn.functional.pad(x, (1, 1, 1, 1)),
    ),
    "a number around": (
        [helper.make_node("Pad", ["q", "one", "seven"], ["r"])],
        lambda x: nn.functional.pad(x, (1, 1, 1, 1), value=-93 * 0.03),
    ),
    "a mirror": (
        [helper.make_node("Pad", ["q", "one"], ["r"], mode="reflect")],
        lambda x: nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"),
    ),
    "a number around a product": (
        [
            own("QLinearMul", ["q", "s", "z", "five", "t", "z", "s", "w"], "m"),
            helper.make_node("Reshape", ["m", "shape"], ["n"]),
            helper.make_node("Pad", ["n", "one", "seven"], ["p"]),
            own("QLinearMul", ["p", "s", "w", "five", "t", "z", "s", "z"], "r"),
        ],
        lambda x: -0.95 * nn.functional.pad(-0.95 * x, (1, 1, 1, 1), value=-113 * 0.03),
    ),
    "a choice": (
        [own("QLinearWhere", ["mask", "q", "s", "z", "five", "t", "z", "s", "z"], "r")],
        lambda x: torch.where(torch.arange(8) % 2 == 0, x, torch.tensor(-0.95)),
    ),
}  # fmt: skip
"""Nodes that compute `r` from the rounded `q` -> the same in torch."""


@pytest.mark.parametrize("what", MOVED)
def test_what_moves_integers_moves_the_floats_that_they_stand_for(what):
    nodes, told = MOVED[what]
    held = {
        "twice": np.array([1, 1, 2, 2], "f4"), "one": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "five": np.uint8(5),
        "seven": np.uint8(7), "w": np.uint8(120), "shape": np.array([2, 3, 8, 8]), "mask": np.arange(8) % 2 == 0,
    }  # fmt: skip
    model = quantized_by_hand([*nodes, helper.make_node("DequantizeLinear", ["r", "s", "z"], ["y"])], held, X.shape)
    x = np.tanh(X)  # No larger than the range.
    wanted = told(torch.tensor(x)).numpy()
    assert 1e-3 < abs(graphs.run(model.SerializeToString(), x) - wanted).max() < 0.1  # As it is, it rounds.
    changed = ir.from_proto(model)
    assert unround(changed)
    np.testing.assert_allclose(graphs.run(ir.to_proto(changed).SerializeToString(), x), wanted, atol=1e-5)


@pytest.mark.parametrize("what", ["an unknown operator", "a rounded output"])
def test_what_cannot_be_told_without_rounding(what):
    held = {"s": np.float32(0.03), "z": np.uint8(100)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"])]
    kind, out = TensorProto.UINT8, "q"
    if what == "an unknown operator":
        nodes.append(helper.make_node("Gelu", ["q"], ["y"]))
        kind, out = TensorProto.FLOAT, "y"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(out, kind, ["n"])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    assert not unround(ir.from_proto(helper.make_model(graph)))


def test_a_quantized_graph_of_bfloat16_is_compared_in_float32(tmp_path):
    """onnxruntime has no kernel for it, so numpy tells how many values the graph clips, and what that costs."""
    rng = np.random.default_rng(3)
    held = {"s": np.array(2**-6, BF16), "z": np.int8(0), "V": rng.normal(size=(16, 8)).astype(BF16)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantizer"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "V"], ["y"], name="/fc/MatMul"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "base.onnx"
    )
    x = rng.normal(size=(4, 16)).astype(BF16).astype("f4")
    A, B = (torch.tensor(rng.normal(size=shape)).float() for shape in ((2, 16), (8, 2)))
    adapter = Adapter({Target("fc"): (METHODS["lora"](A=A, B=B),)})
    report = ak.onnx.inject(tmp_path / "base.onnx", adapter, tmp_path / "out.onnx", check={"x": x})
    steps = np.rint(x.astype("f8") * 64)
    clipped = np.count_nonzero((steps < -128) | (steps > 127))
    exact, rounded = (each @ held["V"].astype("f8") for each in (x.astype("f8"), steps.clip(-128, 127) / 64))
    assert report.saturation.nodes == {"quantizer": (clipped, clipped)}
    assert report.saturation.moved[0] == pytest.approx(abs(rounded - exact).max() / abs(exact).max(), rel=1e-3)
    assert 0 < report.difference < 1e-2
    assert report.note.startswith("compared in float32")

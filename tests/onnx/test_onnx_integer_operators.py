"""Operators that compute with integers: changes beside them, against float64 formulas and the graph's own output."""

import numpy as np
import onnx
import operator_graphs
import pytest
from operator_graphs import ran

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Unsupported
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

IN, OUT, HEADS = 16, 8, 2
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (2, 3, IN)).astype("f4")
IMAGE = RNG.uniform(-1, 1, (2, 4, 6, 5)).astype("f4")
B = RNG.normal(size=OUT).astype("f4")
X_SCALE, X_ZERO = np.float32(2 / 255), np.uint8(128)
MICROSOFT = {"domain": "com.microsoft"}


def integers(shape, axis=None):
    """Return integers, their scales and zero points; one of each, or one for each channel along an axis."""
    q, size = RNG.integers(-127, 128, shape).astype("i1"), () if axis is None else (shape[axis],)
    return q, np.asarray(RNG.uniform(0.003, 0.005, size), "f4"), np.zeros(size, "i1")


def floats(held, axis=None):
    q, scale, _ = held
    spread = [1] * q.ndim
    if axis is not None:
        spread[axis] = -1
    return q.astype("f8") * scale.astype("f8").reshape(spread)


W, BY_CHANNEL = integers((IN, OUT)), integers((IN, OUT), axis=1)
KERNEL = integers((OUT, 4, 3, 3), axis=0)
ONE_KERNEL = integers((OUT, 4, 3, 3))
PACKED = integers((IN, 3 * IN))
PACKED_BIAS = RNG.normal(size=3 * IN).astype("f4")


def quantized(held):
    return {"q.weight_quantized": held[0], "w_scale": held[1], "w_zero": held[2]}


def saved(path, nodes, tensors, x=X):
    made = {"x_scale": X_SCALE, "x_zero": X_ZERO, "y_scale": np.float32(0.05), "y_zero": np.uint8(128), **tensors}
    return operator_graphs.saved(path, ["n", *x.shape[1:]], nodes, made)


def changes(shape, scaling=0.5):
    """Return a LoRA for a weight `[out, in, *k]`, and its change of that weight."""
    out, *into = shape
    A = np.random.default_rng(1).normal(size=(2, *into)).astype("f4") / 4
    B = np.random.default_rng(2).normal(size=(out, 2)).astype("f4") / 4
    lora = METHODS["lora"](A=from_numpy(A), B=from_numpy(B), scaling=scaling)
    return Adapter({Target("q"): (lora,)}), scaling * np.tensordot(B.astype("f8"), A.astype("f8"), 1)


def convolved(x, kernel):
    """Return a convolution with padding 1, in float64."""
    padded = np.pad(x.astype("f8"), ((0, 0), (0, 0), (1, 1), (1, 1)))
    high, wide = x.shape[2:]
    parts = [
        np.einsum("nihw,oi->nohw", padded[:, :, i : i + high, j : j + wide], kernel[:, :, i, j])
        for i in range(3)
        for j in range(3)
    ]
    return sum(parts)


ROUND = ("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"], "round", {})
DYNAMIC = ("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"], "round", {})
GIVEN, WEIGHT, RESULT = ["xq", "x_scale", "x_zero"], ["q.weight_quantized", "w_scale", "w_zero"], ["y_scale", "y_zero"]
BACK = ("DequantizeLinear", ["yq", *RESULT], ["y"], "back", {})
PRODUCT = ("QLinearMatMul", [*GIVEN, *WEIGHT, *RESULT], ["yq"], "/q/MatMul_quant", {})
FLAT = X.reshape(-1, IN)
BIAS = {"q.bias_quantized": np.rint(B / (X_SCALE * W[1])).astype("i4")}
PAD = {"pads": [1, 1, 1, 1]}

CASES = {
    "QLinearMatMul": ([ROUND, PRODUCT, BACK], quantized(W), X, floats(W).T),
    "QLinearMatMul by channel": ([ROUND, PRODUCT, BACK], quantized(BY_CHANNEL), X, floats(BY_CHANNEL, 1).T),
    "QGemm": (
        [ROUND, ("QGemm", [*GIVEN, *WEIGHT, "q.bias_quantized", *RESULT], ["yq"], "/q/Gemm_quant", MICROSOFT), BACK],
        quantized(W) | BIAS, FLAT, floats(W).T,
    ),
    "QGemm of floats, turned": (
        [ROUND, ("QGemm", [*GIVEN, *WEIGHT], ["y"], "/q/Gemm_quant", {**MICROSOFT, "transB": 1})],
        quantized((W[0].T, *W[1:])), FLAT, floats(W).T,
    ),
    "QLinearConv": (
        [ROUND, ("QLinearConv", [*GIVEN, *WEIGHT, *RESULT, "q.bias_quantized"], ["yq"], "/q/Conv_quant", PAD), BACK],
        quantized(KERNEL) | {"q.bias_quantized": np.rint(B / (X_SCALE * KERNEL[1])).astype("i4")}, IMAGE,
        floats(KERNEL, 0),
    ),
    "ConvInteger": (
        [
            DYNAMIC, ("ConvInteger", ["xq", WEIGHT[0], "xz", "w_zero"], ["c"], "/q/Conv_quant", PAD),
            ("Cast", ["c"], ["f"], "cast", {"to": 1}), ("Mul", ["xs", "w_scale"], ["s"], "scales", {}),
            ("Mul", ["f", "s"], ["m"], "mul", {}), ("Reshape", ["q.bias", "spread"], ["r"], "spread", {}),
            ("Add", ["m", "r"], ["y"], "add", {}),
        ],
        quantized(ONE_KERNEL) | {"q.bias": B, "spread": np.array([1, OUT, 1, 1])}, IMAGE, floats(ONE_KERNEL),
    ),
    "DynamicQuantizeMatMul": (
        [("DynamicQuantizeMatMul", ["x", *WEIGHT, "q.bias"], ["y"], "/q/MatMul_quant", MICROSOFT)],
        quantized(W) | {"q.bias": B}, X, floats(W).T,
    ),
    "MatMulIntegerToFloat": (
        [
            DYNAMIC,
            ("MatMulIntegerToFloat", ["xq", WEIGHT[0], "xs", WEIGHT[1], "xz", WEIGHT[2], "q.bias"], ["y"],
             "/q/MatMul_quant", MICROSOFT),
        ],
        quantized(W) | {"q.bias": B}, X, floats(W).T,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_change_beside_integers(name, tmp_path):
    nodes, tensors, x, weight = CASES[name]
    path, out = saved(tmp_path / "base.onnx", nodes, tensors, x), tmp_path / "out.onnx"
    adapter, D = changes(weight.shape)
    before, delta = ran(path, x), convolved(x, D) if x is IMAGE else x.astype("f8") @ D.T
    for mode in ("constant", "slots"):
        ak.onnx.inject(path, adapter, out, mode=mode)
        feeds = ak.onnx.fit(out, adapter) if mode == "slots" else {}
        np.testing.assert_allclose(ran(out, x, **feeds), before + delta, atol=1e-5)
    np.testing.assert_array_equal(ran(out, x), before)
    assert {node.op_type for node in onnx.load(path).graph.node} <= {n.op_type for n in onnx.load(out).graph.node}


@pytest.mark.parametrize("name", CASES)
def test_merges_into_integers(name, tmp_path):
    nodes, tensors, x, weight = CASES[name]
    path, out = saved(tmp_path / "base.onnx", nodes, tensors, x), tmp_path / "out.onnx"
    adapter, D = changes(weight.shape)
    b = 0 if not {"q.bias_quantized", "q.bias"} & {*tensors} else B.reshape(-1, 1, 1) if x is IMAGE else B
    wanted = (convolved(x, weight + D) if x is IMAGE else x.astype("f8") @ (weight + D).T) + b
    ak.onnx.merge(path, adapter, out, quantized="dequantize")
    np.testing.assert_allclose(ran(out, x), wanted, atol=2e-3)  # A bias of integers is rounded in the graph.
    assert not any("Integer" in n.op_type or n.op_type.startswith("Q") for n in onnx.load(out).graph.node)
    report = ak.onnx.merge(path, adapter, out, quantized="requantize", keep_change="packed")
    assert report.damage["q"]["kept"] > 0.9
    # Inputs, weights and outputs are all rounded: by at most half a step of each.
    assert abs(ran(out, x) - wanted).max() < 0.1
    ak.onnx.merge(path, adapter, out, keep_change="float")
    delta = convolved(x, D) if x is IMAGE else x.astype("f8") @ D.T
    np.testing.assert_allclose(ran(out, x), ran(path, x) + delta, atol=1e-5)


def test_a_change_before_a_range_that_ends_at_zero(tmp_path):
    """Quantizers drop a Relu before such a range, so a change after it would come behind the Relu."""
    tensors = quantized(W) | {"y_zero": np.uint8(0), "y_scale": np.float32(0.02)}
    path, out = saved(tmp_path / "base.onnx", [ROUND, PRODUCT, BACK], tensors), tmp_path / "out.onnx"
    adapter, D = changes((OUT, IN), 2.0)
    wanted = np.maximum(X.astype("f8") @ (floats(W) + D.T), 0)
    assert ran(path, X).min() == 0
    assert abs(wanted - np.maximum(X @ floats(W), 0)).max() > 0.5
    ak.onnx.inject(path, adapter, out)
    assert abs(ran(out, X) - wanted).max() < 0.05
    ak.onnx.inject(path, adapter, out, mode="slots")
    assert abs(ran(out, X, **ak.onnx.fit(out, adapter)) - wanted).max() < 0.05
    assert abs(ran(out, X) - ran(path, X)).max() <= 0.021


def test_a_change_between_two_integer_operators(tmp_path):
    """The first one's output is read as integers by the second; the shapes of both have a name for the batch size."""
    second = ("QLinearMatMul", ["yq", *RESULT, "v", "w_scale", "w_zero", *RESULT], ["zq"], "/v/MatMul_quant", {})
    nodes = [ROUND, PRODUCT, second, ("DequantizeLinear", ["zq", *RESULT], ["y"], "back", {})]
    V = RNG.integers(-127, 128, (OUT, 5)).astype("i1")
    path, out = saved(tmp_path / "base.onnx", nodes, quantized(W) | {"v": V}), tmp_path / "out.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(path)), path)
    adapter, D = changes((OUT, IN), 3.0)
    wanted = X.astype("f8") @ (floats(W) + D.T) @ (V.astype("f8") * W[1])
    ak.onnx.inject(path, adapter, out, mode="slots")
    np.testing.assert_array_equal(ran(out, X), ran(path, X))
    assert abs(ran(out, X, **ak.onnx.fit(out, adapter)) - wanted).max() < 0.15
    assert abs(ran(path, X) - wanted).max() > 0.4


def attended(x, weight):
    """Return attention over two heads, in float64."""
    q, k, v = np.split(x.astype("f8") @ weight + PACKED_BIAS, 3, axis=-1)
    q, k, v = (part.reshape(*part.shape[:2], HEADS, -1).swapaxes(1, 2) for part in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(IN / HEADS)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out = scores / scores.sum(-1, keepdims=True) @ v
    return out.swapaxes(1, 2).reshape(x.shape)


def test_attention_of_integers(tmp_path):
    """One weight of integers has queries, keys and values; its name is that of the whole."""
    words = {**MICROSOFT, "num_heads": HEADS}
    inputs = ["xq", "q.weight_quantized", "q.bias", "xs", "w_scale", "", "xz", "w_zero"]
    nodes = [DYNAMIC, ("QAttention", inputs, ["y"], "/q/Attention_quant", words)]
    path = saved(tmp_path / "base.onnx", nodes, quantized(PACKED) | {"q.bias": PACKED_BIAS})
    adapter, D = changes((3 * IN, IN))
    assert abs(ran(path, X) - attended(X, floats(PACKED))).max() < 0.02
    wanted = attended(X, floats(PACKED) + D.T)
    assert abs(wanted - attended(X, floats(PACKED))).max() > 0.05
    for mode in ("constant", "slots"):
        ak.onnx.inject(path, adapter, tmp_path / f"{mode}.onnx", mode=mode)
        feeds = ak.onnx.fit(tmp_path / f"{mode}.onnx", adapter) if mode == "slots" else {}
        assert abs(ran(tmp_path / f"{mode}.onnx", X, **feeds) - wanted).max() < 0.02
    ak.onnx.merge(path, adapter, tmp_path / "m.onnx", quantized="dequantize")
    np.testing.assert_allclose(ran(tmp_path / "m.onnx", X), wanted, atol=1e-5)
    ak.onnx.merge(path, adapter, tmp_path / "m.onnx", quantized="requantize", keep_change="packed")
    assert abs(ran(tmp_path / "m.onnx", X) - wanted).max() < 0.02


@pytest.mark.parametrize("name", ["QGemm", "QLinearConv", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_a_bias_of_integer_operators_is_scaled_in_floats_or_refused(name, tmp_path):
    """IA3 scales outputs; quantizing only the weight again would keep the bias."""
    nodes, tensors, x, W = CASES[name]
    path, out = saved(tmp_path / "base.onnx", nodes, tensors, x), tmp_path / "out.onnx"
    scale = np.linspace(0.5, 1.5, len(W)).astype("f4")
    ia3 = Adapter({Target("q"): (METHODS["ia3"](l=from_numpy(scale)),)})
    with pytest.raises(Unsupported, match=f"the bias of a node that computes with integers .{name}") as error:
        ak.onnx.merge(path, ia3, out, quantized="requantize", keep_change="packed")
    assert "--quantized dequantize (quantized='dequantize')" in str(error.value)
    assert not out.exists()
    ak.onnx.merge(path, ia3, out, quantized="dequantize")
    y = convolved(x, W) if W.ndim > 2 else x.astype("f8") @ W.T
    y += B.reshape(-1, *[1] * (W.ndim - 2))
    np.testing.assert_allclose(ran(out, x), y * scale.reshape(-1, *[1] * (W.ndim - 2)), atol=0.03)

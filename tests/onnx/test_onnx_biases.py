"""What is the bias of a layer: IA3 and DoRA, injected and merged, against float64 formulas."""

import contextlib

import numpy as np
import operator_graphs
import pytest
from onnx import TensorProto
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from operator_graphs import ran
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Unsupported
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

IN, OUT = 16, 8
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("f4")


W, K, b, c, M = normal(OUT, IN), normal(OUT, IN), normal(OUT), normal(OUT), normal(5, OUT)
KERNEL = normal(OUT, 4, 3, 3)
X, ROWS, IMAGE = normal(2, 3, IN), normal(5, IN), normal(2, 4, 6, 6)
A, KERNEL_A, B = normal(2, IN) / 4, normal(2, 4, 3, 3) / 4, normal(OUT, 2)
MAGNITUDE, SCALES = (1 + RNG.random(OUT)).astype("f4"), (0.5 + RNG.random(OUT)).astype("f4")
BASE = {"q.weight": W, "q.bias": b}
LAYER, PRODUCT = "/q/MatMul", ("MatMul", ["x", "q.weight"], "0", "/q/MatMul", {})


def linear(x, W, b):
    return x @ W.T + (0 if b is None else b)


def convolved(x, W, b):
    seen = np.lib.stride_tricks.sliding_window_view(x.astype("f8"), (3, 3), axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", seen, W) + (0 if b is None else b.reshape(-1, 1, 1))


def added(op, inputs, name="/q/Add", **words):
    return (op, inputs, "y", name, words)


RIGHT = {
    "1,out": ([PRODUCT, added("Add", ["0", "q.bias"])], {"q.bias": b[None]}, linear, None),
    "1,1,out": ([PRODUCT, added("Add", ["q.bias", "0"])], {"q.bias": b[None, None]}, linear, None),
    "module": ([PRODUCT, added("Add", ["0", "u"])], {"u": b[None]}, linear, None),
    "1,out,base": ([PRODUCT, added("Add", ["0", "u"], "n")], {"u": b[None]}, linear, BASE),
    "minus": ([PRODUCT, added("Sub", ["0", "u"], "n")], {"u": -b}, linear, BASE),
    "sum": ([PRODUCT, added("Sum", ["0", "q.bias"], "n")], {"q.bias": b}, linear, None),
    "identity": (
        [PRODUCT, ("Identity", ["0"], "1", "i", {}), added("Add", ["1", "q.bias"])], {"q.bias": b}, linear, None,
    ),
    "dense of TensorFlow": (
        [("Reshape", ["x", "in"], "x2", "r", {}), ("MatMul", ["x2", "q.weight"], "0", LAYER, {}),
         ("Reshape", ["0", "out"], "1", "s", {}), added("Add", ["1", "q.bias"], "/q/BiasAdd")],
        {"q.bias": b, "in": np.array([-1, IN]), "out": np.array([2, 3, OUT])}, linear, None,
    ),
    "sizes of tf2onnx": (
        [PRODUCT, ("Shape", ["x"], "2", "z", {}), ("Cast", ["2"], "3", "t", {"to": TensorProto.INT32}),
         ("Slice", ["3", "from", "to"], "4", "u", {}), ("Concat", ["4", "out"], "5", "v", {"axis": 0}),
         ("Cast", ["5"], "6", "w", {"to": TensorProto.INT64}), ("Reshape", ["0", "6"], "1", "s", {}),
         added("Add", ["1", "u"], "n")],
        {"u": b, "from": np.array([0]), "to": np.array([2]), "out": np.array([OUT], "i4")}, linear, BASE,
    ),
    "heads": (
        [PRODUCT, ("Reshape", ["0", "out"], "1", "s", {}), added("Add", ["1", "q.bias"])],
        {"q.bias": b.reshape(2, 4), "out": np.array([2, 3, 2, 4])},
        lambda x, W, b: linear(x, W, b).reshape(2, 3, 2, 4), None,
    ),
    "einsum": (
        [("Einsum", ["x", "q.weight"], "0", "/q/Einsum", {"equation": "bsi,io->bso"}), added("Add", ["0", "q.bias"])],
        {"q.bias": b[None, None]}, linear, None,
    ),
    "scalar": ([PRODUCT, added("Add", ["0", "u"], "n")], {"u": np.float32(2)},
               lambda x, W, _: linear(x, W, None) + 2, None),
    "other module": ([PRODUCT, added("Add", ["0", "shift"], "/Add")], {"shift": c},
                     lambda x, W, _: linear(x, W, None) + c, None),
    "other vector of the base": (
        [PRODUCT, added("Add", ["0", "u"], "n")], {"u": c}, lambda x, W, _: linear(x, W, None) + c,
        {"q.weight": W, "shift": c},
    ),
    "scopes of TensorFlow": (
        [("MatMul", ["x", "q.weight"], "0", "m/q/einsum/Einsum", {}), added("Add", ["0", "u"], "m/q/AddV2")],
        {"u": b}, linear, None,
    ),
    "product of three axes": (
        [("Mul", ["x", "1"], "x2", "i", {}), ("MatMul", ["x2", "q.weight"], "0", "m", {}),
         added("Add", ["u", "0"], "n")],
        {"u": b[None, None], "1": np.ones((1, 1, 1), "f4")}, linear, BASE,
    ),
    "two vectors": (
        [PRODUCT, ("Add", ["0", "q.bias"], "1", "/q/Add", {}), added("Add", ["1", "c"], "/Add")],
        {"q.bias": b, "c": c}, lambda x, W, b: linear(x, W, b) + c, None,
    ),
}  # fmt: skip

GEMM = {
    "1,out": ([("Gemm", ["x", "q.weight", "q.bias"], "y", "/q/Gemm", {})], {"q.bias": b[None]}, linear, None),
    "add": (
        [("Gemm", ["x", "q.weight"], "0", "/q/Gemm", {}), added("Add", ["0", "q.bias"])], {"q.bias": b}, linear, None,
    ),
    "turned": (
        [("Transpose", ["x"], "t", "t", {"perm": [1, 0]}),
         ("Gemm", ["t", "q.weight", "q.bias"], "y", "/q/Gemm", {"transA": 1})], {"q.bias": b}, linear, None,
    ),
    "matrix": ([("Gemm", ["x", "q.weight", "m"], "y", "/q/Gemm", {})], {"m": M},
               lambda x, W, _: linear(x, W, None) + M, None),
    "residual": (
        [("MatMul", ["x", "k.weight"], "k", "/k/MatMul", {}), ("Gemm", ["x", "q.weight", "k"], "y", "/q/Gemm", {})],
        {"k.weight": K.T}, lambda x, W, _: linear(x, W, None) + linear(x, K, None), None,
    ),
    "other vector of the base": (
        [("Gemm", ["x", "q.weight", "u"], "y", "n", {})], {"u": c}, lambda x, W, _: linear(x, W, None) + c,
        {"q.weight": W, "shift": c},
    ),
}  # fmt: skip

CONV = {
    "own": ([("Conv", ["x", "q.weight", "q.bias"], "y", "/q/Conv", {})], {"q.bias": b}, convolved, None),
    "add": (
        [("Conv", ["x", "q.weight"], "0", "/q/Conv", {}), added("Add", ["0", "q.bias"])],
        {"q.bias": b.reshape(1, -1, 1, 1)}, convolved, None,
    ),
    "moved": (
        [("Conv", ["x", "q.weight"], "0", "/q/Conv", {}), ("Slice", ["0", "from", "to", "at"], "1", "/q/Slice", {}),
         ("Transpose", ["1"], "2", "/q/Transpose", {"perm": [0, 2, 3, 1]}), ("Unsqueeze", ["2", "0th"], "3", "u", {}),
         ("Squeeze", ["3", "0th"], "4", "s", {}), added("Add", ["4", "q.bias"])],
        {"q.bias": b, "from": np.array([0, 0]), "to": np.array([3, 2**62]), "at": np.array([2, 1]),
         "0th": np.array([0])},
        lambda x, W, b: convolved(x, W, b)[:, :, :3].transpose(0, 2, 3, 1), None,
    ),
    "other module": (
        [("Conv", ["x", "q.weight"], "0", "/q/Conv", {}), added("Add", ["0", "u"], "/Add")],
        {"u": c.reshape(-1, 1, 1)}, lambda x, W, _: convolved(x, W, None) + c.reshape(-1, 1, 1), None,
    ),
}  # fmt: skip

CASES = {
    **{f"linear-{name}": (X, W, *case) for name, case in RIGHT.items()},
    **{f"gemm-{name}": (ROWS, W, *case) for name, case in GEMM.items()},
    **{f"conv-{name}": (IMAGE, KERNEL, *case) for name, case in CONV.items()},
}

MEAN = ("ReduceMean", ["x"], "m", "mean", {"keepdims": 0})
COMPUTED = [MEAN, ("Mul", ["m", "none"], "z", "z", {}), ("Add", ["z", "q.bias"], "b", "b", {})]
REFUSED = {
    "unnamed": (X, W, [PRODUCT, added("Add", ["0", "u"], "n")], {"u": b[None]}, r"\(1\) its bias.*\(2\)"),
    "unnamed minus": (X, W, [PRODUCT, added("Sub", ["0", "u"], "n")], {"u": -b}, r"\(1\) its bias.*\(2\)"),
    "swapped": (X, W, [PRODUCT, ("Add", ["0", "c"], "1", "/Add", {}), added("Add", ["1", "q.bias"])],
                {"c": c, "q.bias": b}, "Add adds after Add"),
    "turned": (X, W, [PRODUCT, ("Transpose", ["0"], "1", "t", {"perm": [0, 2, 1]}), added("Add", ["1", "q.bias"])],
               {"q.bias": b[:, None]}, "Add adds after Transpose"),
    "cast": (
        X, W,
        [PRODUCT, ("Cast", ["0"], "1", "t", {"to": TensorProto.DOUBLE}), ("Add", ["1", "q.bias"], "2", "/q/Add", {}),
         ("Cast", ["2"], "y", "u", {"to": TensorProto.FLOAT})],
        {"q.bias": b.astype("f8")}, "Add adds after Cast",
    ),
    "three": (X, W, [PRODUCT, added("Sum", ["0", "q.bias", "c"])], {"q.bias": b, "c": c}, "Sum adds"),
    "parts": (X, W, [PRODUCT, ("Split", ["0", "4"], ["1", "2"], "s", {"axis": -1}),
                     ("Add", ["1", "c"], "3", "/q/Add", {}), added("Add", ["2", "d"], "/q/Add_1")],
              {"4": np.array([4, 4]), "c": b[:4], "d": b[4:]}, "Add adds after Split"),
    "reversed": (
        IMAGE, KERNEL,
        [("Conv", ["x", "q.weight"], "0", "/q/Conv", {}), ("Slice", ["0", "s", "e", "a", "d"], "1", "/q/Slice", {}),
         added("Add", ["1", "q.bias"])],
        {"q.bias": b.reshape(-1, 1, 1), "s": np.array([-1]), "e": np.array([-(2**62)]), "a": np.array([1]),
         "d": np.array([-1])}, "Add adds after Slice",
    ),
    "absolute": (X, W, [PRODUCT, ("Abs", ["q.bias"], "b", "a", {}), added("Add", ["0", "b"])], {"q.bias": b}, "Add"),
    "computed": (X, W, [PRODUCT, *COMPUTED, added("Add", ["0", "b"])],
                 {"q.bias": b, "none": np.float32(0)}, "Add adds"),
    "computed, Gemm": (ROWS, W, [*COMPUTED, ("Gemm", ["x", "q.weight", "b"], "y", "/q/Gemm", {})],
                       {"q.bias": b, "none": np.float32(0)}, "computes the bias of this Gemm"),
    "computed, Conv": (IMAGE, KERNEL, [*COMPUTED, ("Conv", ["x", "q.weight", "b"], "y", "/q/Conv", {})],
                       {"q.bias": b, "none": np.float32(0)}, "computes the bias of this Conv"),
    "attention": (
        X, W,
        [PRODUCT, ("MatMul", ["x", "k.weight"], "k", "/k/MatMul", {}),
         ("MultiHeadAttention", ["0", "k", "k", "u"], "y", "a", {"num_heads": 2, "domain": "com.microsoft"})],
        {"k.weight": K.T, "u": np.concatenate([b, c, c])}, "inside a MultiHeadAttention",
    ),
}  # fmt: skip


def saved(path, x, nodes, tensors):
    return operator_graphs.saved(path, x.shape, nodes, tensors)


def ia3():
    return METHODS["ia3"](l=from_numpy(SCALES))


def changed(method, W):
    """Return an adapter, and its weight and bias for those of the layer."""
    spread = [-1, *[1] * (W.ndim - 1)]
    if method == "ia3":
        return ia3(), W.astype("f8") * SCALES.reshape(spread), b * SCALES.astype("f8")
    down = KERNEL_A if W.ndim > 2 else A
    V = W + 0.5 * np.tensordot(B.astype("f8"), down, 1)
    norm = np.sqrt((V.reshape(OUT, -1) ** 2).sum(1))
    dora = METHODS["dora"](A=from_numpy(down), B=from_numpy(B), magnitude=from_numpy(MAGNITUDE), scaling=0.5)
    return dora, V * (MAGNITUDE / norm).reshape(spread), b.astype("f8")


@pytest.mark.parametrize("method", ["ia3", "dora"])
@pytest.mark.parametrize("name", CASES)
def test_only_the_layers_own_bias_changes(name, method, tmp_path):
    x, W, nodes, tensors, formula, base = CASES[name]
    stored = W if W.ndim > 2 else W.T
    path, out = saved(tmp_path / "base.onnx", x, nodes, {"q.weight": stored, **tensors}), tmp_path / "out.onnx"
    np.testing.assert_allclose(ran(path, x), formula(x, W.astype("f8"), b.astype("f8")), rtol=1e-4, atol=1e-4)
    weights = None
    if base is not None:
        weights = tmp_path / "base.safetensors"
        save_file(base, weights)
    update, new, bias = changed(method, W)
    adapter = Adapter({Target("q"): (update,)})
    for mode in ("constant", "slots", "merge"):
        if mode == "merge":
            ak.onnx.merge(path, adapter, out, base_weights=weights)
        else:
            ak.onnx.inject(path, adapter, out, mode=mode, base_weights=weights)
        feeds = ak.onnx.fit(out, adapter, base_weights=weights) if mode == "slots" else {}
        np.testing.assert_allclose(ran(out, x, **feeds), formula(x, new, bias), rtol=1e-4, atol=1e-4)
        if mode == "slots":
            np.testing.assert_array_equal(ran(out, x), ran(path, x))


PADDLE = [("q.w_0", "q.b_0"), ("q_weights", "q_offset"), ("q.w_0_deepcopy_4", "q.b_0_deepcopy_5")]


@pytest.mark.parametrize(("weight", "bias"), PADDLE)
def test_names_of_paddle(weight, bias, tmp_path):
    """An unnamed Add of a vector with another shape; only the names show that it is the bias."""
    nodes = [("MatMul", ["x", weight], "0", "m", {}), added("Add", ["0", bias], "n")]
    path = saved(tmp_path / "base.onnx", X, nodes, {weight: W.T, bias: b[None]})
    update, new, changed_bias = changed("ia3", W)
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(path, Adapter({Target(weight): (update,)}), tmp_path / "out.onnx")
        np.testing.assert_allclose(ran(report.out, X), linear(X, new, changed_bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("weight", "bias"), PADDLE)
@pytest.mark.parametrize("is_bias", [True, False])
def test_a_base_with_names_of_paddle(is_bias, weight, bias, tmp_path):
    """The graph lost the vector's name: paddle2onnx folds the Reshape of a convolution's bias."""
    stored = {weight.partition("_deepcopy")[0]: KERNEL, bias if is_bias else "p.b_0": b}
    nodes = [("Conv", ["x", weight], "0", "Conv.24", {}), added("Add", ["0", "p2o.pd_op.reshape.0.0"], "Add.0")]
    tensors = {weight: KERNEL, "p2o.pd_op.reshape.0.0": b.reshape(1, -1, 1, 1)}
    path = saved(tmp_path / "base.onnx", IMAGE, nodes, tensors)
    update, new, changed_bias = changed("ia3", KERNEL)
    adapter = Adapter({Target(weight): (update,)})
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match=r"1\) its bias.*contain") as error:
            change(path, adapter, tmp_path / "out.onnx")
        assert weight in (error.value.cure or "")
        save_file(stored, tmp_path / "base.safetensors")
        report = change(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors")
        wanted = convolved(IMAGE, new, changed_bias if is_bias else b)
        np.testing.assert_allclose(ran(report.out, IMAGE), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [ak.onnx.inject, ak.onnx.merge])
@pytest.mark.parametrize("name", REFUSED)
def test_a_bias_that_nothing_shows_is_refused(name, change, tmp_path):
    x, W, nodes, tensors, reason = REFUSED[name]
    path = saved(tmp_path / "base.onnx", x, nodes, {"q.weight": W if W.ndim > 2 else W.T, **tensors})
    ran(path, x)  # The graph is valid.
    with pytest.raises(Unsupported, match=reason):
        change(path, Adapter({Target("q"): (ia3(),)}), tmp_path / "out.onnx")


def test_the_base_contradicts_the_graph(tmp_path):
    path = saved(tmp_path / "base.onnx", X, [PRODUCT, added("Add", ["0", "u"])], {"q.weight": W.T, "u": b})
    for base, reason in (({"q.weight": W}, "no bias for"), (BASE | {"q.bias": c}, "output differs from")):
        save_file(base, tmp_path / "base.safetensors")
        with pytest.raises(Unsupported, match=reason):
            ak.onnx.merge(
                path, Adapter({Target("q"): (ia3(),)}), tmp_path / "out.onnx",
                base_weights=tmp_path / "base.safetensors",
            )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_node_that_computes_two_layers_is_refused(method, tmp_path):
    nodes = [PRODUCT, ("Add", ["0", "q.bias"], "q", "/q/Add", {}), ("Add", ["0", "k.bias"], "k", "/k/Add", {}),
             ("Concat", ["q", "k"], "y", "c", {"axis": -1})]  # fmt: skip
    path = saved(tmp_path / "base.onnx", X, nodes, {"q.weight": W.T, "q.bias": b, "k.bias": c})
    update = METHODS["lora"](A=from_numpy(A), B=from_numpy(B)) if method == "lora" else ia3()
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match="several layers"):
            change(path, Adapter({Target("q"): (update,)}), tmp_path / "out.onnx")


def test_layers_that_share_a_weight_or_a_bias(tmp_path):
    nodes = [PRODUCT, ("Add", ["0", "q.bias"], "q", "/q/Add", {}), ("MatMul", ["x", "q.weight"], "1", "/k/MatMul", {}),
             ("Add", ["1", "q.bias"], "k", "/k/Add", {}), ("Concat", ["q", "k"], "y", "c", {"axis": -1})]  # fmt: skip
    path, out = saved(tmp_path / "base.onnx", X, nodes, {"q.weight": W.T, "q.bias": b}), tmp_path / "out.onnx"
    wanted = np.concatenate([linear(X, W, b) * SCALES, linear(X, W, b)], -1)
    for change in (ak.onnx.inject, ak.onnx.merge):
        change(path, Adapter({Target("q"): (ia3(),)}), out)
        np.testing.assert_allclose(ran(out, X), wanted, rtol=1e-4, atol=1e-4)


class Inputs(CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": 2 * X}]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_a_bias_that_integers_hold(form, tmp_path):
    path = saved(
        tmp_path / "base.onnx", X, [PRODUCT, added("Add", ["0", "q.bias"])], {"q.weight": W.T, "q.bias": 3 * b}
    )
    packed, out, adapter = tmp_path / "packed.onnx", tmp_path / "out.onnx", Adapter({Target("q"): (ia3(),)})
    with contextlib.redirect_stderr(None):
        quantize_static(path, packed, Inputs(), quant_format=getattr(QuantFormat, form), weight_type=QuantType.QInt8)
    wanted = linear(X, W, 3 * b) * SCALES
    for mode in ("constant", "slots", "merge"):
        if mode == "merge":
            ak.onnx.merge(packed, adapter, out, quantized="dequantize")
        else:
            ak.onnx.inject(packed, adapter, out, mode=mode)
        feeds = ak.onnx.fit(out, adapter) if mode == "slots" else {}
        assert abs(ran(out, X, **feeds) - wanted).max() < 0.04 * abs(wanted).max()


def test_a_norm_whose_bias_is_computed(tmp_path):
    nodes = [("Abs", ["q.bias"], "b", "a", {}), ("LayerNormalization", ["x", "q.weight", "b"], "y", "/q/LayerNorm", {})]
    scale = normal(IN)
    path = saved(tmp_path / "base.onnx", X, nodes, {"q.weight": scale, "q.bias": normal(IN)})
    update = METHODS["ia3"](l=from_numpy(normal(IN)))
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match="computes the bias of this LayerNormalization"):
            change(path, Adapter({Target("q"): (update,)}), tmp_path / "out.onnx")

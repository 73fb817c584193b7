"""Layers in odd places: in the branches of an If, behind dequantized weights, in graphs in memory."""

import copy
import warnings
from functools import partial

import numpy as np
import onnx
import onnx_graphs as graphs
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, TargetNotFound, Unsupported
from adapterkit.methods import METHODS
from adapterkit.onnx import matching

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
        assert "the branch" not in (report.note or "")  # The check runs both branches.
        for sign, chosen in ((-1, True), (1, False)):
            got = graphs.run(tmp_path / "out.onnx", X, c=np.array(chosen))
            np.testing.assert_allclose(got, sign * (X @ W + DELTA), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["left", "ijk,kl->ijl", "...k,lk->...l", "ijk, lk -> ijl"])
def test_other_ways_to_multiply_by_a_weight(kind, tmp_path):
    """W @ x, and sums over the last axis; with a bias, which IA3 scales too."""
    bias = np.random.default_rng(2).normal(size=8).astype("f4")
    if kind == "left":
        held = {"q.weight": np.ascontiguousarray(W.T), "q.bias": bias[:, None]}
        nodes = [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
            helper.make_node("MatMul", ["q.weight", "t"], ["h"], "/q/MatMul"),
            helper.make_node("Add", ["h", "q.bias"], ["a"]),
            helper.make_node("Transpose", ["a"], ["y"], perm=[0, 2, 1]),
        ]
    else:
        held = {"q.weight": W if "kl" in kind else np.ascontiguousarray(W.T), "b": bias}
        nodes = [
            helper.make_node("Einsum", ["x", "q.weight"], ["h"], "/q/Einsum", equation=kind),
            helper.make_node("Add", ["h", "b"], ["y"]),
        ]
    path, out = graphs.saved(model(nodes, held), tmp_path / "base.onnx"), tmp_path / "out.onnx"
    scale = torch.rand(8, generator=torch.Generator().manual_seed(3)) + 0.5
    thin = ADAPTER.updates[Target("q")][0]
    dora = METHODS["dora"](A=A, B=B, magnitude=scale)
    V = W.T + (B @ A).numpy()
    for update, wanted in (
        (thin, X @ W + DELTA + bias),
        (METHODS["ia3"](l=scale), (X @ W + bias) * scale.numpy()),
        (dora, X @ (V * (scale.numpy() / np.linalg.norm(V, axis=1))[:, None]).T + bias),
    ):
        for change in (ak.onnx.inject, ak.onnx.merge):
            report = change(path, Adapter({Target("q"): (update,)}), out)
            assert report.difference < 1e-5
            np.testing.assert_allclose(graphs.run(out, X), wanted, rtol=1e-4, atol=1e-4)
    slots = ak.onnx.inject(path, ADAPTER, tmp_path / "slots.onnx", mode="slots")
    got = ak.onnx.Session(slots.out, {"one": ADAPTER}).run({"x": X}, "one")["y"]
    np.testing.assert_allclose(got, X @ W + DELTA + bias, rtol=1e-4, atol=1e-4)


def test_layers_that_have_their_activation_inside(tmp_path):
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["f"]),
        helper.make_node(
            "FusedGemm", ["f", "q.weight", "b"], ["h"], "/q/Gemm", domain="com.microsoft", activation="Relu"
        ),
        helper.make_node("Reshape", ["h", "back"], ["y"]),
    ]
    bias = np.random.default_rng(2).normal(size=8).astype("f4")
    held = {"q.weight": W, "b": bias, "flat": np.array([-1, 16]), "back": np.array([2, 3, 8])}
    proto, path = model(nodes, held), tmp_path / "base.onnx"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(proto.SerializeToString())
    wanted, out = np.maximum(X @ W + DELTA + bias, 0), tmp_path / "out.onnx"
    ak.onnx.merge(path, ADAPTER, out)
    np.testing.assert_allclose(graphs.run(out, X), wanted, rtol=1e-4, atol=1e-4)
    for mode in ("constant", "slots"):
        ak.onnx.inject(path, ADAPTER, out, mode=mode)
        feeds = ak.onnx.fit(out, ADAPTER) if mode == "slots" else {}
        np.testing.assert_allclose(graphs.run(out, X, **feeds), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(graphs.run(out, X), graphs.run(path, X))


@pytest.mark.parametrize("equation", ["ijk,klm->ijlm", "ijk,jk->ij"])
def test_an_operator_that_is_no_layer_is_named(equation, tmp_path):
    weight = np.ones((16, 8, 1) if "lm" in equation else (3, 16), "f4")
    node = helper.make_node("Einsum", ["x", "q.weight"], ["y"], "/q/Einsum", equation=equation)
    path = tmp_path / "base.onnx"
    path.write_bytes(model([node], {"q.weight": weight}).SerializeToString())
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match=r"q: the target's weight is read by a Einsum \(/q/Einsum\)"):
            change(path, ADAPTER, tmp_path / "out.onnx")


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
    both = Adapter({Target(name): ADAPTER.updates[Target("q")] for name in "qk"})
    for choice in ("dequantize", "requantize"):
        ak.onnx.merge(path, both, out, quantized=choice)
        np.testing.assert_array_equal(graphs.run(out, X), 0 * DELTA)
    assert [i.name for i in onnx.load(out).graph.initializer].count("q8") == 1
    assert [i.data_type for i in onnx.load(out).graph.initializer].count(TensorProto.INT8) == 1


@pytest.mark.parametrize("kind", ["transpose", "transpose-groups", "depthwise", "groups"])
def test_convolutions_by_torch_with_changed_weights(kind, tmp_path):
    layer, x, proto = graphs.built(kind)
    path = graphs.saved(proto, tmp_path / "base.onnx")
    D = torch.randn(layer[0].weight.shape, generator=torch.Generator().manual_seed(4))
    adapter = Adapter({Target("0"): (METHODS["dense"](D=D),)})
    with torch.no_grad():
        layer[0].weight += D
        wanted = layer(torch.tensor(x)).numpy()
    for change in (ak.onnx.inject, ak.onnx.merge):
        assert change(path, adapter, tmp_path / "out.onnx").difference < 1e-5
        np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", x), wanted, atol=1e-5 * abs(wanted).max())


def test_a_layer_in_the_body_of_a_loop(tmp_path):
    w = np.random.default_rng(2).normal(size=(16, 16)).astype("f4") / 8
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "w"], ["g"], "/q/MatMul"),
            helper.make_node("Identity", ["going"], ["goes"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", "length", 16]),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("g", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["trips", "", "x"], ["out"], body=body)
    cut = helper.make_node("Slice", ["out", "zero", "eight", "two"], ["y"])
    one = {name: np.array([n]) for name, n in (("zero", 0), ("eight", 8), ("two", 2))}
    path = tmp_path / "base.onnx"
    path.write_bytes(model([loop, cut], {"w": w, "trips": np.array(3), **one}).SerializeToString())
    B16 = torch.randn(16, 2, generator=torch.Generator().manual_seed(2)) / 8
    adapter = Adapter({Target("q"): (METHODS["lora"](A=A, B=B16),)})
    wanted = X @ np.linalg.matrix_power(w + (B16 @ A).numpy().T, 3)
    for change in (ak.onnx.inject, ak.onnx.merge):
        assert change(path, adapter, tmp_path / "out.onnx").difference < 1e-5
        got = graphs.run(tmp_path / "out.onnx", X)
        np.testing.assert_allclose(got, wanted[..., :8], atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("fused", [True, False])
def test_projections_that_are_packed_into_one(fused, narrow, tmp_path):
    """As onnxruntime's optimizer fuses attention, and as one MatMul before a MultiHeadAttention; also in 16 bits."""
    most = 4e-3 if narrow else 1e-5
    g = torch.Generator().manual_seed(6)
    Q, K, V = (torch.randn(8, 16, generator=g) / 4 for _ in range(3))
    save_file({f"attn.{n}_proj.weight": W for n, W in zip("qkv", (Q, K, V), strict=True)}, tmp_path / "b.safetensors")
    bias = torch.randn(24, generator=g).numpy()
    held = {
        "packed": torch.cat([Q, K, V]).T.contiguous().numpy(),
        "b": bias,
        "m": np.array([[1, 1, 0], [1, 1, 1]], "i4"),
    }
    words = {"num_heads": 2, "domain": "com.microsoft"}
    if fused:
        nodes = [helper.make_node("Attention", ["x", "packed", "b", "m"], ["y"], **words)]
    else:
        held["sizes"] = np.array([8, 8, 8])
        nodes = [
            helper.make_node("MatMul", ["x", "packed"], ["h"]),
            helper.make_node("Split", ["h", "sizes"], ["q", "k", "v"], axis=-1),
            helper.make_node("MultiHeadAttention", ["q", "k", "v", "b", "m"], ["y"], **words),
        ]
    if narrow:
        held = {name: array.astype("f2") if array.dtype == np.float32 else array for name, array in held.items()}
        nodes[0].input[0], nodes[-1].output[0] = "x16", "y16"
        into = helper.make_node("Cast", ["x"], ["x16"], to=onnx.TensorProto.FLOAT16)
        nodes = [into, *nodes, helper.make_node("Cast", ["y16"], ["y"], to=onnx.TensorProto.FLOAT)]
    proto, path = model(nodes, held), tmp_path / "base.onnx"
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path.write_bytes(proto.SerializeToString())
    deltas = {name: (torch.randn(2, 16, generator=g) / 4, torch.randn(8, 2, generator=g)) for name in "qv"}
    adapter = Adapter({Target(f"attn.{n}_proj"): (METHODS["lora"](A=A, B=B),) for n, (A, B) in deltas.items()})

    def attention(q, k, v, bias=bias):
        b = torch.tensor(bias).double()
        x = torch.tensor(X).double()
        parts = [x @ W.double().T + b[8 * n : 8 * n + 8] for n, W in enumerate((q, k, v))]
        q, k, v = (part.reshape(2, 3, 2, 4).transpose(1, 2) for part in parts)
        seen = torch.tensor(held["m"]).bool()[:, None, None]
        scores = (q @ k.mT / 2).masked_fill(~seen, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 3, 8).numpy()

    np.testing.assert_allclose(graphs.run(path, X), attention(Q, K, V), atol=most)
    (qA, qB), (vA, vB) = deltas.values()
    wanted = attention(Q + qB @ qA, K, V + vB @ vA)
    changes = (ak.onnx.inject, ak.onnx.merge, partial(ak.onnx.inject, mode="slots"))
    for change in changes:
        report = change(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "b.safetensors")
        assert [(place.method, place.target.rows) for place in report.found] == [
            ("packed", (0, 8)),
            ("packed", (16, 24)),
        ]
        assert report.difference < most
        base = tmp_path / "b.safetensors"
        feeds = ak.onnx.fit(report.out, adapter, base_weights=base) if change is changes[-1] else {}
        np.testing.assert_allclose(graphs.run(report.out, X, **feeds), wanted, atol=most * abs(wanted).max())
    shift = Adapter({Target("attn.q_proj"): (METHODS["replacement"](bias=torch.ones(8)),)})
    wanted = attention(Q, K, V, np.concatenate([np.ones(8, "f4"), bias[8:]]))
    for change in (ak.onnx.inject, ak.onnx.merge) if fused else ():
        change(path, shift, tmp_path / "m.onnx", base_weights=tmp_path / "b.safetensors")
        np.testing.assert_allclose(graphs.run(tmp_path / "m.onnx", X), wanted, atol=most)
    if not fused:  # The bias is in the attention, behind the cut into its parts.
        with pytest.raises(Unsupported, match="bias"):
            ak.onnx.inject(path, shift, tmp_path / "bad.onnx", base_weights=tmp_path / "b.safetensors")


def exported_recurrent(made, path, forward=None, x=X, **more):
    """Export a recurrent module by torch's legacy exporter; return a model that yields only its sequence of outputs."""
    whole = torch.nn.ModuleDict({"rnn": made, **more}).eval()
    whole.forward = forward or (lambda x: whole.rnn(x)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole, (torch.tensor(x),), str(path), dynamo=False, opset_version=17, input_names=["x"],
            dynamic_axes={"x": {0: "batch", 1: "length"}} if x is X else {},
        )  # fmt: skip
    return whole


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_changes_of_recurrent_layers(kind, tmp_path):
    """As torch's legacy exporter writes them: two directions, two layers, torch's own order of gates lost."""
    torch.manual_seed(0)
    made = getattr(torch.nn, kind)(16, 8, num_layers=2, bidirectional=True, batch_first=True)
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    whole = exported_recurrent(made, path)
    save_file(whole.state_dict(), tmp_path / "base.safetensors")
    updates, changed = {}, ("weight_ih_l0", "weight_hh_l0_reverse", "weight_ih_l1_reverse", "weight_ih_l0_reverse")
    with torch.no_grad():
        for name in changed:
            W = getattr(made, name)
            A, B = torch.randn(2, W.shape[1]), torch.randn(W.shape[0], 2) / 4
            W += B @ A
            updates[Target(f"rnn.{name}")] = (METHODS["lora"](A=A, B=B),)
        wanted = whole(torch.tensor(X)).numpy()
    before = graphs.run(path, X)
    for mode in ("constant", "slots"):
        ak.onnx.inject(path, Adapter(updates), out, mode=mode)
        feeds = ak.onnx.fit(out, Adapter(updates)) if mode == "slots" else {}
        np.testing.assert_allclose(graphs.run(out, X, **feeds), wanted, atol=1e-6)
    np.testing.assert_allclose(graphs.run(out, X), before, atol=1e-7)
    for base, method in ((None, "path"), (tmp_path / "base.safetensors", "path")):
        report = ak.onnx.merge(path, Adapter(updates), out, base_weights=base)
        assert {place.method for place in report.found} == {method}
        np.testing.assert_allclose(graphs.run(out, X), wanted, atol=1e-6)
    proto = onnx.load(path)
    for node in proto.graph.node:
        node.name = ""
    path.write_bytes(proto.SerializeToString())
    report = ak.onnx.merge(path, Adapter(updates), out, base_weights=tmp_path / "base.safetensors")
    assert {place.method for place in report.found} == {"values"}
    np.testing.assert_allclose(graphs.run(out, X), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_rounding_of_recurrent_layers_is_no_fault(kind, tmp_path):
    """For one row of one step, onnxruntime rounds stored and computed weights differently; the graph enlarges this."""
    torch.manual_seed(0)
    x = X[:1, :1]
    made = getattr(torch.nn, kind)(16, 64, batch_first=True)
    twin, path, out = copy.deepcopy(made), tmp_path / "base.onnx", tmp_path / "out.onnx"
    whole = exported_recurrent(made, path, lambda x: made(x)[0] - twin(x)[0] + x.sum() / 1000, x, twin=twin)
    A, B = torch.randn(2, 16), torch.randn(len(made.weight_ih_l0), 2) / 4
    adapter = Adapter({Target("rnn.weight_ih_l0"): (METHODS["lora"](A=A, B=B),)})
    with torch.no_grad():
        made.weight_ih_l0 += B @ A
        wanted = whole(torch.tensor(x)).numpy()
    report = ak.onnx.inject(path, adapter, out, mode="slots")
    assert report.difference is not None
    np.testing.assert_allclose(graphs.run(out, x, **ak.onnx.fit(out, adapter)), wanted, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_biases_of_recurrent_layers(kind, biased, tmp_path):
    """IA3 scales a bias, too; the graph stores the biases of both directions, inputs and states in one tensor."""
    torch.manual_seed(0)
    made = getattr(torch.nn, kind)(16, 8, bidirectional=True, batch_first=True, bias=biased)
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    whole = exported_recurrent(made, path)
    updates, names = {}, ["ih_l0", "hh_l0", "hh_l0_reverse"]
    with torch.no_grad():
        for name in names:
            scale = torch.rand(len(getattr(made, f"weight_{name}"))) + 0.5
            for part in ("weight", "bias")[: 1 + biased]:
                held = getattr(made, f"{part}_{name}")
                held *= scale.reshape(-1, *[1] * (held.ndim - 1))
            updates[Target(f"rnn.weight_{name}")] = (METHODS["ia3"](l=scale),)
        if biased:  # An update that adds to a bias.
            shift = torch.randn(len(made.bias_ih_l0_reverse))
            made.bias_ih_l0_reverse += shift
            updates[Target("rnn.weight_ih_l0_reverse")] = (METHODS["dense"](d=shift),)
        wanted = whole(torch.tensor(X)).numpy()
    before, adapter = graphs.run(path, X), Adapter(updates)
    assert abs(wanted - before).max() > 0.05
    for mode in ("constant", "slots"):
        report = ak.onnx.inject(path, adapter, out, mode=mode)
        assert report.difference < 1e-5
        feeds = ak.onnx.fit(out, adapter) if mode == "slots" else {}
        np.testing.assert_allclose(graphs.run(out, X, **feeds), wanted, atol=1e-6)
    np.testing.assert_allclose(graphs.run(out, X), before, atol=1e-7)
    report = ak.onnx.merge(path, adapter, out)
    assert report.difference < 1e-5
    np.testing.assert_allclose(graphs.run(out, X), wanted, atol=1e-6)
    if not biased:
        shift = Adapter({Target("rnn.weight_ih_l0"): (METHODS["dense"](d=torch.ones(len(made.weight_ih_l0))),)})
        for change, error, why in (
            (ak.onnx.merge, NotMergeable, "the layer does not have"),
            (ak.onnx.inject, Unsupported, f"this {kind} node has none"),
        ):
            with pytest.raises(error, match=why):
                change(path, shift, tmp_path / "bad.onnx")


def test_a_recurrent_bias_that_depends_on_inputs_is_refused(tmp_path):
    rng = np.random.default_rng(2)
    held = {"w": rng.normal(size=(1, 8, 16)).astype("f4"), "r": rng.normal(size=(1, 8, 8)).astype("f4")}
    nodes = [
        helper.make_node("RNN", ["x", "w", "r", "b"], ["h"], "/q/RNN", hidden_size=8),
        helper.make_node("Squeeze", ["h", "axis"], ["y"]),
    ]
    given = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 16])
    path = graphs.saved(model(nodes, {**held, "axis": np.array([1])}, [given]), tmp_path / "base.onnx")
    adapter = Adapter({Target("q.weight_ih_l0"): (METHODS["ia3"](l=torch.full((8,), 2.0)),)})
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match="the bias of the RNN depends on the graph's inputs"):
            change(path, adapter, tmp_path / "out.onnx")
    adapter = Adapter({Target("q.weight_ih_l0"): (METHODS["ia3"](l_in=torch.full((16,), 2.0)),)})
    ak.onnx.merge(path, adapter, tmp_path / "out.onnx")  # It keeps the bias.
    b = rng.normal(size=(1, 16)).astype("f4")
    np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", X, b=b), graphs.run(path, 2 * X, b=b), atol=1e-6)


@pytest.mark.parametrize(("op", "way"), [("BiasGelu", "none"), ("FastGelu", "tanh")])
def test_a_bias_inside_an_activation_is_taken_out(op, way, tmp_path):
    """Changing the weight alone would leave the bias unscaled."""
    b = np.linspace(-1, 1, 8).astype("f4")
    nodes = [
        helper.make_node("MatMul", ["x", "q.weight"], ["h"], "/q/MatMul"),
        helper.make_node(op, ["h", "q.bias"], ["y"], domain="com.microsoft"),
    ]
    made = model(nodes, {"q.weight": W, "q.bias": b})
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path = graphs.saved(made, tmp_path / "base.onnx")
    adapter = Adapter({Target("q"): (METHODS["ia3"](l=torch.linspace(-2, 2, 8)),)})
    inner = torch.linspace(-2, 2, 8) * (torch.tensor(X) @ torch.tensor(W) + torch.tensor(b))
    wanted = torch.nn.functional.gelu(inner, approximate=way)
    for change in (ak.onnx.inject, ak.onnx.merge):
        change(path, adapter, tmp_path / "out.onnx")
        np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", X), wanted, atol=1e-5)
    ak.onnx.merge(path, ADAPTER, tmp_path / "out.onnx")
    assert any(node.op_type == op for node in onnx.load(tmp_path / "out.onnx").graph.node)  # LoRA changes no bias.


def test_a_bias_inside_a_fused_norm_is_refused(tmp_path):
    """The norm also adds the output of another layer, whose bias the vector may be."""
    nodes = [
        helper.make_node("MatMul", ["x", "q.weight"], ["h"], "/q/MatMul"),
        helper.make_node(
            "SkipLayerNormalization", ["h", "h", "ones", "", "q.bias"], ["y"], domain="com.microsoft", epsilon=1e-5
        ),
    ]
    made = model(nodes, {"q.weight": W, "q.bias": np.ones(8, "f4"), "ones": np.ones(8, "f4")})
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    path = graphs.saved(made, tmp_path / "base.onnx")
    adapter = Adapter({Target("q"): (METHODS["ia3"](l=torch.full((8,), 2.0)),)})
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match="the bias of this layer is inside a SkipLayerNormalization"):
            change(path, adapter, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_layers_in_sequences_of_the_older_exporter(tmp_path):
    """It repeats the name of a Sequential in those of its modules: /body/body.1/body.1.0/MatMul."""
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU())
    whole = torch.nn.ModuleDict({"body": torch.nn.Sequential(torch.nn.Linear(16, 16), inner)}).eval()
    whole.forward = lambda x: whole.body(x)
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(whole, (torch.tensor(X),), str(path), dynamo=False, input_names=["x"], opset_version=17)
    assert not {"body.0.weight", "body.1.0.weight"} & {one.name for one in onnx.load(path).graph.initializer}
    updates = {}
    with torch.no_grad():
        for name in ("body.0", "body.1.0"):
            A, B = torch.randn(2, 16) / 4, torch.randn(16, 2) / 4
            whole.get_submodule(name).weight += B @ A
            updates[Target(name)] = (METHODS["lora"](A=A, B=B),)
        wanted = whole(torch.tensor(X)).numpy()
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(path, Adapter(updates), out)
        assert {place.method for place in report.found} == {"path"}
        np.testing.assert_allclose(graphs.run(out, X), wanted, atol=1e-5)


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


def fused(op, path):
    """Write a graph with one fused layer `q` and a bias; return its input, weight, bias and float64 formula."""
    random = np.random.default_rng(4)
    b = random.normal(size=8).astype("f4")
    if op == "FusedGemm":
        weight, x, words = random.normal(size=(8, 16)), random.normal(size=(5, 16)), {"transB": 1}
    else:
        weight, x, words = random.normal(size=(8, 4, 1, 1)), random.normal(size=(2, 4, 3, 3)), {"kernel_shape": [1, 1]}
    weight, x = weight.astype("f4"), x.astype("f4")
    node = helper.make_node(
        op, ["x", "q.weight", "q.bias"], ["y"], f"/q/{op}", domain="com.microsoft", activation="Relu", **words
    )
    made = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *x.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "q.weight"), numpy_helper.from_array(b, "q.bias")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(helper.make_model(made, opset_imports=opsets, ir_version=8).SerializeToString())

    def wanted(W, bias):
        y = np.einsum("ni...,oi->no...", x.astype("f8"), W.reshape(8, -1).astype("f8"))
        return np.maximum(y + bias.astype("f8").reshape(-1, *[1] * (x.ndim - 2)), 0)

    return x, weight, b, wanted


@pytest.mark.parametrize("method", ["lora", "dense", "replacement", "replaced bias"])
@pytest.mark.parametrize("op", ["FusedGemm", "FusedConv"])
def test_a_bias_that_is_added_before_an_activation(op, method, tmp_path):
    path, out = tmp_path / "base.onnx", tmp_path / "out.onnx"
    x, weight, b, wanted = fused(op, path)
    random = np.random.default_rng(5)
    new_b, new_w = random.normal(size=8).astype("f4"), random.normal(size=weight.shape).astype("f4")
    first, second = random.normal(size=(2, *weight.shape[1:])).astype("f4"), random.normal(size=(8, 2)).astype("f4")
    tensors = {name: torch.tensor(a) for name, a in {"A": first, "B": second, "b": new_b, "W": new_w}.items()}
    A, B, d, D = (tensors[name] for name in "ABbW")
    update, W, bias = {
        "lora": (
            METHODS["lora"](A=A, B=B, bias=d, scaling=0.5), weight + 0.5 * np.tensordot(second, first, 1),
            b + 0.5 * new_b,
        ),
        "dense": (METHODS["dense"](D=D, d=d), weight + new_w, b + new_b),
        "replacement": (METHODS["replacement"](weight=D, bias=d), new_w, new_b),
        "replaced bias": (METHODS["replacement"](bias=d), weight, new_b),
    }[method]  # fmt: skip
    adapter = Adapter({Target("q"): (update,)})
    for mode in ("constant", "slots"):
        ak.onnx.inject(path, adapter, out, mode=mode)
        feeds = ak.onnx.fit(out, adapter) if mode == "slots" else {}
        np.testing.assert_allclose(graphs.run(out, x, **feeds), wanted(W, bias), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(graphs.run(out, x), wanted(weight, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["FusedGemm", "FusedConv"])
def test_rows_of_a_weight_before_an_activation(op, tmp_path):
    """Both targets change the same tensor; without the adapter, the graph has the base's weight again."""
    path, out, plain = (tmp_path / f"{name}.onnx" for name in ("base", "out", "plain"))
    x, weight, b, wanted = fused(op, path)
    D = np.random.default_rng(5).normal(size=weight.shape).astype("f4")
    parts = {(0, 3): METHODS["dense"](D=torch.tensor(D[:3])), (5, 8): METHODS["dense"](D=torch.tensor(D[5:]))}
    adapter = Adapter({Target("q", rows=rows): (update,) for rows, update in parts.items()})
    D[3:5] = 0
    for mode in ("constant", "slots"):
        ak.onnx.inject(path, adapter, out, mode=mode)
        feeds = ak.onnx.fit(out, adapter) if mode == "slots" else {}
        np.testing.assert_allclose(graphs.run(out, x, **feeds), wanted(weight + D, b), rtol=1e-4, atol=1e-5)
        ak.onnx.eject(out, plain)
        ak.onnx.merge(plain, adapter, out)
        np.testing.assert_allclose(graphs.run(out, x), wanted(weight + D, b), rtol=1e-4, atol=1e-5)


class Attending(nn.Module):
    """A block whose reshapes onnxruntime merges, so that it drops shapes that it stored."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).reshape(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(y.transpose(1, 2).reshape(2, 5, 16))


def test_a_graph_that_onnxruntime_optimized_before_can_be_optimized_again(tmp_path):
    """onnxruntime stores shapes as `gemm_output_shape`, and does not load a graph where it gives that name again."""
    torch.manual_seed(0)
    block, x = Attending().eval(), torch.randn(2, 5, 16)
    scale = torch.rand(16) + 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            block, (x,), tmp_path / "float.onnx", input_names=["x"], dynamo=True, external_data=False, verbose=False
        )
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "base.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "float.onnx"), options)
    assert any("gemm_" in one.name for one in onnx.load(tmp_path / "base.onnx").graph.initializer)
    save_file(block.state_dict(), tmp_path / "base.safetensors")
    adapter = Adapter({Target("out"): (METHODS["ia3"](l=scale),)})
    out = tmp_path / "out.onnx"
    ak.onnx.inject(tmp_path / "base.onnx", adapter, out, base_weights=tmp_path / "base.safetensors", check=False)
    with torch.no_grad():
        wanted = (block(x) * scale).numpy()
    assert abs(graphs.run(out, x.numpy()) - wanted).max() <= 1e-5 * abs(wanted).max()
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == (tmp_path / "base.onnx").read_bytes()


class Containers(nn.Module):
    """Two layers `q`: torch's older exporter names their nodes `/q/MatMul` and `/q_1/MatMul`."""

    def __init__(self, bias=True):
        super().__init__()
        self.down, self.q = nn.ModuleDict({"q": nn.Linear(16, 16, bias)}), nn.Linear(16, 16, bias)

    def forward(self, x):
        return self.q(self.down["q"](x).tanh())


def export_by_scripts(module, x, path):
    """Export with torch's older exporter, which numbers equal names of nodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), path, dynamo=False, input_names=["x"], opset_version=17)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["q", "down.q"])
def test_a_layer_whose_name_lacks_its_container(target, bias, tmp_path):
    torch.manual_seed(0)
    module, x = Containers(bias).eval(), torch.from_numpy(X)
    export_by_scripts(module, x, tmp_path / "base.onnx")
    square = METHODS["lora"](A=A, B=torch.cat([B, -B]), scaling=0.5)
    adapter, base = Adapter({Target(target): (square,)}), None
    if not bias:  # Then only the values of the weights show which layer is which.
        with pytest.raises(TargetNotFound, match="unclear which is the target"):
            ak.onnx.inject(tmp_path / "base.onnx", adapter, tmp_path / "out.onnx")
        base = tmp_path / "base.safetensors"
        save_file(module.state_dict(), base)
    ak.onnx.inject(tmp_path / "base.onnx", adapter, tmp_path / "out.onnx", base_weights=base)
    with torch.no_grad():
        module.get_submodule(target).weight += 0.5 * torch.cat([B, -B]) @ A
        wanted = module(x).numpy()
    np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", X), wanted, rtol=1e-4, atol=1e-4)


class Numbered(nn.Module):
    """Two layers `q` and `q_1`, whose nodes have the same names as those of `Containers`."""

    def __init__(self, bias):
        super().__init__()
        self.q, self.q_1 = nn.Linear(16, 16, bias), nn.Linear(16, 16, bias)

    def forward(self, x):
        return self.q_1(self.q(x).tanh())


@pytest.mark.parametrize(("bias", "targets"), [(True, ["q"]), (True, ["q_1"]), (False, ["q_1"]), (False, ["q", "q_1"])])
def test_numbered_names_that_the_model_has(bias, targets, tmp_path):
    torch.manual_seed(0)
    module, x = Numbered(bias).eval(), torch.from_numpy(X)
    export_by_scripts(module, x, tmp_path / "base.onnx")
    square = METHODS["lora"](A=A, B=torch.cat([B, -B]), scaling=0.5)
    adapter = Adapter({Target(target): (square,) for target in targets})
    ak.onnx.inject(tmp_path / "base.onnx", adapter, tmp_path / "out.onnx")
    with torch.no_grad():
        for target in targets:
            module.get_submodule(target).weight += 0.5 * torch.cat([B, -B]) @ A
        wanted = module(x).numpy()
    np.testing.assert_allclose(graphs.run(tmp_path / "out.onnx", X), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["f4", "f2"])
def test_each_layer_without_a_name_is_compared_with_few_weights(kind, tmp_path, monkeypatch):
    """Models have thousands of layers: to compare each target with each weight would take hours."""
    rng, count = np.random.default_rng(0), 40
    weights = {f"layers.{n}.fc.weight": (rng.normal(size=(16, 16)) / 4).astype("f4") for n in range(count)}
    stored = [numpy_helper.from_array(W.T.astype(kind), f"onnx::{n}") for n, W in enumerate(weights.values())]
    nodes = [helper.make_node("MatMul", [f"h{n}", f"onnx::{n}"], [f"h{n + 1}"]) for n in range(count)]
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    x, y = (helper.make_tensor_value_info(name, dtype, ["n", 16]) for name in ("h0", f"h{count}"))
    made = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), ir_version=10)
    made.opset_import[0].version = 18
    onnx.save(made, tmp_path / "base.onnx")
    save_file({name: torch.from_numpy(W) for name, W in weights.items()}, tmp_path / "base.safetensors")
    calls, distance = [], matching.distance
    monkeypatch.setattr(matching, "distance", lambda *given: calls.append(given) or distance(*given))
    B_ = torch.cat([B, -B])
    adapter = Adapter({Target(name.removesuffix(".weight")): (METHODS["lora"](A=A, B=B_),) for name in weights})
    found = ak.onnx.plan(tmp_path / "base.onnx", adapter, base_weights=tmp_path / "base.safetensors")
    assert [place.spots[0].sources[0].name for place in found] == [f"onnx::{n}" for n in range(count)]
    assert {place.method for place in found} == {"values" if kind == "f4" else "nearest"}
    assert len(calls) <= 2 * count

"""Operators in which a weight is linear: inject and merge, against numpy; all others are refused by name."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import TargetNotFound, Unsupported
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

IN, OUT = 16, 8
RNG = np.random.default_rng(0)
W, SQUARE = RNG.normal(size=(OUT, IN)).astype("f4"), RNG.normal(size=(IN, IN)).astype("f4")
X = RNG.normal(size=(2, 3, IN)).astype("f4")
A = RNG.normal(size=(2, IN)).astype("f4")
B = {OUT: RNG.normal(size=(OUT, 2)).astype("f4"), IN: RNG.normal(size=(IN, 2)).astype("f4")}
TURN = {"perm": [0, 2, 1]}

NODES = {
    "einsum": ([("Einsum", ["x", "q.weight"], {"equation": "bsd,od->bso"})], W),
    "einsum-first": ([("Einsum", ["q.weight", "x"], {"equation": "od,bsd->bso"})], W),
    "einsum-first-turned": ([("Einsum", ["q.weight", "x"], {"equation": "do,...d->...o"})], W.T),
    "left": ([("Transpose", ["x"], TURN), ("MatMul", ["q.weight", "0"], {}), ("Transpose", ["1"], TURN)], W),
    "stored-1": ([("MatMul", ["x", "q.weight"], {})], W.T[None]),
    "stored-1-1": ([("MatMul", ["x", "q.weight"], {})], W.T[None, None]),
    "stored-square": ([("MatMul", ["x", "q.weight"], {})], SQUARE.T[None]),
    "left-stored": (
        [("Transpose", ["x"], TURN), ("MatMul", ["q.weight", "0"], {}), ("Transpose", ["1"], TURN)], SQUARE[None]
    ),
    "fused-turned": (
        [("Transpose", ["x"], TURN), ("FusedMatMul", ["0", "q.weight"], {"domain": "com.microsoft", "transA": 1})], W.T
    ),
    "function": ([("Linear", ["x", "q.weight"], {"domain": "mine"})], W.T),
}  # fmt: skip


def saved(path, steps, stored, opset=17):
    nodes = []
    for at, (op, inputs, words) in enumerate(steps):
        out = "y" if at == len(steps) - 1 else str(at)
        nodes.append(helper.make_node(op, inputs, [out], f"/q/{op}" if "q.weight" in inputs else f"n{at}", **words))
    inner = [helper.make_node("MatMul", ["a", "w"], ["o"])]
    function = helper.make_function("mine", "Linear", ["a", "w"], ["o"], inner, [helper.make_opsetid("", opset)])
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(stored), "q.weight")],
    )  # fmt: skip
    opsets = [helper.make_opsetid(domain, number) for domain, number in
              (("", opset), ("mine", 1), ("com.microsoft", 1))]  # fmt: skip
    used = [function] if any(op == "Linear" for op, _, _ in steps) else []
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=used), path)
    return path


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ran(path, **feeds):
    return session(path).run(None, {"x": X, **feeds})[0]


def adapter(out, scaling=0.5):
    update = METHODS["lora"](A=from_numpy(A), B=from_numpy(B[out]), scaling=scaling)
    return Adapter({Target("q"): (update,)})


@pytest.mark.parametrize("name", NODES)
def test_weights_that_an_operator_is_linear_in(name, tmp_path):
    steps, stored = NODES[name]
    out = IN if "square" in name or name == "left-stored" else OUT
    path, written = saved(tmp_path / "base.onnx", steps, stored), tmp_path / "out.onnx"
    before = ran(path)
    delta = (X.astype("f8") @ A.T @ B[out].T).reshape(before.shape)
    for mode in ("constant", "slots"):
        report = ak.onnx.inject(path, adapter(out), written, mode=mode)
        assert report.difference < 1e-5
        feeds = ak.onnx.fit(written, adapter(out)) if mode == "slots" else {}
        np.testing.assert_allclose(ran(written, **feeds), before + 0.5 * delta, rtol=1e-4, atol=1e-4)
        if mode == "slots":
            np.testing.assert_allclose(ran(written), before, rtol=1e-6, atol=1e-6)
    ak.onnx.merge(path, [adapter(out), adapter(out, 2.0)], written, weights=[1, -0.5])
    np.testing.assert_allclose(ran(written), before + (0.5 - 1.0) * delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 12, 13, 18, 21, 25])
def test_operator_sets(opset, tmp_path):
    path = saved(tmp_path / "base.onnx", [("MatMul", ["x", "q.weight"], {})], W.T, opset)
    before, delta = ran(path), X.astype("f8") @ A.T @ B[OUT].T
    for mode in ("constant", "merge"):
        out = tmp_path / f"{mode}.onnx"
        (ak.onnx.merge if mode == "merge" else ak.onnx.inject)(path, adapter(OUT), out)
        np.testing.assert_allclose(ran(out), before + 0.5 * delta, rtol=1e-4, atol=1e-4)


REFUSED = {
    "heads": ([("Einsum", ["x", "q.weight"], {"equation": "bsd,dhk->bshk"})], W.T.reshape(IN, 2, 4), "Einsum"),
    "alpha": (
        [("FusedMatMul", ["x", "q.weight"], {"domain": "com.microsoft", "transB": 1, "alpha": 0.5})], W, "FusedMatMul"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_operators_are_refused_by_name(name, tmp_path):
    steps, stored, operator = REFUSED[name]
    path = saved(tmp_path / "base.onnx", steps, stored)
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(Unsupported, match=rf"read by a {operator} \(/q/{operator}\)"):
            change(path, adapter(OUT), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_an_unknown_packed_layer_is_named_and_may_be_omitted(tmp_path):
    """onnxruntime's 4-bit floats: MatMulBnb4 stores its weight without axes, under a name of its own."""
    path = saved(tmp_path / "base.onnx", [("MatMul", ["x", "q.weight"], {}), ("MatMul", ["0", "p.weight"], {})], W.T)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(W[:4, :OUT].T), "p.weight"))
    quantizer = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, 16, nodes_to_exclude=["n1"])
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))
    assert [node.op_type for node in onnx.load(path).graph.node] == ["MatMulBnb4", "MatMul"]
    before, out = ran(path), tmp_path / "out.onnx"
    factors = (RNG.normal(size=(2, OUT)).astype("f4"), RNG.normal(size=(4, 2)).astype("f4"))
    kept = {Target("p"): (METHODS["lora"](A=from_numpy(factors[0]), B=from_numpy(factors[1])),)}
    both = Adapter({**adapter(OUT).updates, **kept})
    for change in (ak.onnx.inject, ak.onnx.merge, ak.onnx.plan):
        given = (path, both) if change is ak.onnx.plan else (path, both, out)
        with pytest.raises(Unsupported, match=r"read by a MatMulBnb4 .*omit such targets: --allow-partial \(allow_par"):
            change(*given)
        with pytest.raises(Unsupported, match=r"read by a MatMulBnb4 .*MatMulNBits$"):
            change(given[0], adapter(OUT), *given[2:], allow_partial=True)
    report = ak.onnx.inject(path, both, out, allow_partial=True)
    assert "q" in report.warnings[0]
    shown = onnx.load(path)
    shown.graph.output.append(helper.make_tensor_value_info("0", TensorProto.FLOAT, None))
    onnx.save(shown, tmp_path / "shown.onnx")
    hidden = session(tmp_path / "shown.onnx").run(["0"], {"x": X})[0]
    np.testing.assert_allclose(ran(out), before + hidden @ factors[0].T @ factors[1].T, rtol=1e-4, atol=1e-4)


def with_functions(path, held, opset, own=None, names=("/a/Linear", "/b/Linear"), word="w"):
    """Write a graph that calls one function twice; the function holds the weight. A second function has no weight.

    Args:
        held: where the function holds the weight: in a `constant`, or in the default of an `attribute`.
        opset: the operator set of the graph.
        own: the operator set of the function, if it is another one.
    """
    value = numpy_helper.from_array(SQUARE.T.copy(), "value")
    constant = helper.make_node("Constant", [], [word], **({"value": value} if held == "constant" else {}))
    if held == "attribute":
        constant.attribute.append(onnx.AttributeProto(name="value", ref_attr_name="W", type=onnx.AttributeProto.TENSOR))
    opsets = [helper.make_opsetid("", own or opset)]
    linear = helper.make_function(
        "mine", "Linear", ["p"], ["q"], [constant, helper.make_node("MatMul", ["p", word], ["q"])], opsets,
        attribute_protos=[helper.make_attribute("W", value)] if held == "attribute" else [],
    )  # fmt: skip
    other = helper.make_function("mine", "Twice", ["p"], ["q"], [helper.make_node("Add", ["p", "p"], ["q"])], opsets)
    nodes = [
        helper.make_node("Linear", ["x"], ["h"], names[0], domain="mine"),
        helper.make_node("Twice", ["h"], ["t"], "/twice/Twice", domain="mine"),
        helper.make_node("Linear", ["t"], ["y"], names[1], domain="mine"),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "s", IN]) for name in "xy"]
    graph = helper.make_graph(nodes, "calls", ports[:1], ports[1:])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=[linear, other]), path)
    return path


def in_second_call(mode, path, out, **options):
    """Change the second call, with the update of `adapter`; return the graph's output and the report."""
    one = Adapter({Target("b"): adapter(IN).updates[Target("q")]})
    report = (ak.onnx.merge if mode == "merge" else ak.onnx.inject)(
        path, one, out, **({} if mode == "merge" else {"mode": mode}), **options
    )
    return ran(out, **(ak.onnx.fit(out, one) if mode == "slots" else {})), report


FIRST = 2 * X.astype("f8") @ SQUARE.T
SECOND = FIRST @ (SQUARE + 0.5 * B[IN].astype("f8") @ A).T


@pytest.mark.parametrize("mode", ["constant", "slots", "merge"])
@pytest.mark.parametrize("held", ["constant", "attribute"])
@pytest.mark.parametrize(("opset", "own"), [(7, None), (11, None), (13, 17), (17, 13), (18, None), (21, 17), (25, 21)])
def test_a_function_that_holds_a_weight_is_inlined(opset, own, held, mode, tmp_path):
    """The weight has no name outside of the function; the call's name is the name of the module."""
    path = with_functions(tmp_path / "base.onnx", held, opset, own)
    np.testing.assert_allclose(ran(path), FIRST @ SQUARE.T, rtol=1e-4, atol=1e-3)
    got, report = in_second_call(mode, path, tmp_path / "out.onnx")
    np.testing.assert_allclose(got, SECOND, rtol=1e-4, atol=1e-4 * abs(SECOND).max())
    assert "calls of local functions were replaced by the functions' nodes (Linear, Twice)" in report.note
    assert not onnx.load(tmp_path / "out.onnx").functions


def test_a_function_whose_calls_have_no_names_is_found_by_its_values(tmp_path):
    """Both calls are calls of one module: they share its weight."""
    path = with_functions(tmp_path / "base.onnx", "constant", 17, names=("", ""))
    save_file({"a.weight": SQUARE}, tmp_path / "base.safetensors")
    one = Adapter({Target("a"): adapter(IN).updates[Target("q")]})
    with pytest.raises(TargetNotFound, match=r"--base-weights DIR \(base_weights=\)"):
        ak.onnx.inject(path, one, tmp_path / "out.onnx")
    changed = SQUARE + 0.5 * B[IN].astype("f8") @ A
    wanted = 2 * X.astype("f8") @ changed.T @ changed.T
    for change in (ak.onnx.inject, ak.onnx.merge):
        change(path, one, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors")
        np.testing.assert_allclose(ran(tmp_path / "out.onnx"), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_a_function_with_operators_of_another_meaning_is_refused(tmp_path):
    """ReduceSum takes its axes as an attribute before opset 13."""
    path = with_functions(tmp_path / "base.onnx", "constant", 17, 11)
    model = onnx.load(path)
    model.functions[0].node.append(helper.make_node("ReduceSum", ["q"], ["sum"], axes=[1]))
    onnx.save(model, path)
    with pytest.raises(Unsupported, match=r"local functions of another operator set.*Linear.*onnx\.inliner"):
        in_second_call("constant", path, tmp_path / "out.onnx")

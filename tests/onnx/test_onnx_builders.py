"""Graphs as onnxruntime-genai's builder writes them: packed queries, keys and values, and packed integer weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import CheckFailed, TargetNotFound, Unsupported
from adapterkit.methods import METHODS

HIDDEN, HEADS, SHARED, EACH = 32, 4, 2, 8
ROWS = {"q_proj": HEADS * EACH, "k_proj": SHARED * EACH, "v_proj": SHARED * EACH}
PATH = "model.layers.0.self_attn."
LENGTH = 3


def weight(name):
    return np.random.default_rng(sum(map(ord, name))).normal(size=(ROWS[name], HIDDEN)).astype("f4") / 4


def rounded(W):
    """Integers of 4 bits in blocks of 32 with the middle as 0, as MatMulNBits stores them; and what they stand for."""
    blocks = W.reshape(len(W), -1, 32)
    scale = abs(blocks).max(-1, keepdims=True) / 7
    q = np.clip(np.rint(blocks / scale) + 8, 0, 15).astype(np.uint8)
    return q[..., ::2] | (q[..., 1::2] << 4), scale[..., 0].astype("f4"), ((q - 8.0) * scale).reshape(W.shape)


def built(folder, kind="float", split=False, bias=False, head_size=EACH):
    """A folder of one layer of attention; returns the weights that it computes with."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = np.concatenate([weight(name) for name in ROWS])
    name = "model.layers.0.attn.qkv_proj.MatMul.weight"
    if kind == "float":
        held = [numpy_helper.from_array(np.ascontiguousarray(whole.T), name)]
        node = helper.make_node("MatMul", ["x", name], ["qkv"], name="/model/layers.0/attn/qkv_proj/MatMul")
    else:
        packed, scales, whole = rounded(whole)
        held = [numpy_helper.from_array(packed, f"{name}_Q4"), numpy_helper.from_array(scales.reshape(-1), f"{name}_s")]
        words = {"K": HIDDEN, "N": len(whole), "bits": 4, "block_size": 32, "accuracy_level": 4}
        node = helper.make_node(
            "MatMulNBits", ["x", f"{name}_Q4", f"{name}_s"], ["qkv"], domain="com.microsoft",
            name="/model/layers.0/attn/qkv_proj/MatMul_Q4", **words,
        )  # fmt: skip
    nodes, last, parts = [node], "qkv", ["qkv", "", ""]
    if bias:
        held.append(numpy_helper.from_array(np.ones(len(whole), "f4"), "model.layers.0.attn.qkv_proj.Add.bias"))
        nodes.append(helper.make_node("Add", ["qkv", held[-1].name], ["biased"], name="/model/layers.0/attn/Add"))
        last, parts = "biased", ["biased", "", ""]
    if split:
        held.append(numpy_helper.from_array(np.array([*ROWS.values()]), "sizes"))
        nodes.append(helper.make_node("Split", [last, "sizes"], ["q", "k", "v"], axis=-1))
        parts = ["q", "k", "v"]
    # The attention is told how long the past is; without that it reads memory that nobody wrote.
    numbers = {"two": np.array([2]), "own": np.array([LENGTH], "i4"), "one": np.array([1], "i4"),
               "none": np.array([0])}  # fmt: skip
    held += [numpy_helper.from_array(array, name) for name, array in numbers.items()]
    nodes += [
        helper.make_node("Shape", ["past_key_values.0.key"], ["shape"]),
        helper.make_node("Gather", ["shape", "two"], ["past"]), helper.make_node("Cast", ["past"], ["short"], to=6),
        helper.make_node("Add", ["short", "own"], ["whole"]), helper.make_node("Squeeze", ["whole", "none"], ["total"]),
        helper.make_node("Sub", ["whole", "one"], ["seqlens_k"]),
    ]  # fmt: skip
    inputs = [*parts, "past_key_values.0.key", "past_key_values.0.value", "seqlens_k", "total"]
    nodes.append(helper.make_node(
        "GroupQueryAttention", inputs, ["y", "present.0.key", "present.0.value"], domain="com.microsoft",
        num_heads=HEADS, kv_num_heads=SHARED, name="/model/layers.0/attn/GroupQueryAttention",
    ))  # fmt: skip
    f = TensorProto.FLOAT
    cache = [1, SHARED, "past_length", "kv_cache_dim"]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", f, [1, LENGTH, HIDDEN]),
         helper.make_tensor_value_info("past_key_values.0.key", f, cache),
         helper.make_tensor_value_info("past_key_values.0.value", f, cache)],
        [helper.make_tensor_value_info("y", f, [1, LENGTH, HEADS * EACH])],
        held,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    model = {"type": "llama", "decoder": {"filename": "model.onnx", "head_size": head_size}}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    return dict(zip(ROWS, np.split(whole, np.cumsum([*ROWS.values()])[:-1]), strict=True))


def attention(W, x, bias):
    """Causal attention of grouped queries in float64."""
    q, k, v = (x @ W[name].T.astype("f8") + bias for name in ROWS)
    q = q.reshape(*x.shape[:2], HEADS, EACH)
    k, v = (np.repeat(one.reshape(*x.shape[:2], SHARED, EACH), HEADS // SHARED, 2) for one in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(EACH)
    scores = np.where(np.tri(LENGTH, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhij,bjhd->bihd", weights, v).reshape(*x.shape[:2], -1)


def adapter(method="lora", names=("q_proj", "v_proj")):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype("f4"))

    def update(rows):
        A, B = draw(2, HIDDEN) / 3, draw(rows, 2) / 3
        if method == "ia3":
            return METHODS["ia3"](l=1 + draw(rows) / 3)
        if method == "dora":
            return METHODS["dora"](A=A, B=B, magnitude=1 + draw(rows).abs(), scaling=0.5)
        return METHODS["lora"](A=A, B=B, scaling=0.5)

    return Adapter({Target(PATH + name): (update(ROWS[name]),) for name in names})


def changed(held, W):
    told = dict(W)
    for target, (update,) in held.updates.items():
        name = target.path.rpartition(".")[2]
        told[name] = update.map(lambda leaf: leaf.numpy().astype("f8")).new_weight(W[name].astype("f8"))
    return told


def run(file, W, bias=0.0, feeds=None):
    """The graph's output and the formula's, without rounding what packed layers read."""
    model = onnx.load(file)
    for node in model.graph.node:
        kept = [each for each in node.attribute if each.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    x = np.random.default_rng(3).normal(size=(1, LENGTH, HIDDEN)).astype("f4")
    empty = np.zeros((1, SHARED, 0, EACH), "f4")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    past = {"past_key_values.0.key": empty, "past_key_values.0.value": empty}
    return session.run(["y"], {"x": x, **past, **(feeds or {})})[0], attention(W, x.astype("f8"), bias)


@pytest.mark.parametrize(
    ("method", "kind", "split"),
    [("lora", "float", False), ("dora", "float", True), ("ia3", "int4", False), ("lora", "int4", True)],
)
def test_packed_queries_and_values(tmp_path, method, kind, split):
    W = built(tmp_path / "model", kind, split, bias=split)
    held, bias = adapter(method), float(split)
    ways = ["constant", "dequantize"] if kind == "int4" else ["constant", None]
    for way in ways:
        out = tmp_path / str(way)
        if way == "constant":
            report = ak.onnx.inject(tmp_path / "model", held, out)
        else:
            report = ak.onnx.merge(tmp_path / "model", held, out, quantized=way)
        assert report.difference is not None, report.note
        assert {found.method for found in report.found} == {"heads"}
        got, wanted = run(out / "model.onnx", changed(held, W), bias)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["float", "int4"])
def test_slots_of_a_packed_layer(tmp_path, kind, method):
    """DoRA's factors are computed from the rows of the packed weight, when the adapter is written for the slots."""
    W = built(tmp_path / "model", kind)
    held = adapter(method)
    ak.onnx.inject(tmp_path / "model", held, tmp_path / "out", mode="slots")
    feeds = ak.onnx.fit(tmp_path / "out" / "model.onnx", held)
    got, wanted = run(tmp_path / "out" / "model.onnx", changed(held, W), feeds=feeds)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())
    plain, wanted = run(tmp_path / "out" / "model.onnx", W)
    np.testing.assert_allclose(plain, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


def test_all_parts_are_rounded_once(tmp_path):
    """Three targets of one packed node are one change of its weight."""
    W, held = built(tmp_path / "model", "int4"), adapter(names=tuple(ROWS))
    ak.onnx.merge(tmp_path / "model", held, tmp_path / "out", quantized="requantize", keep_change="packed")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    q, scale = arrays[node.input[1]], arrays[node.input[2]].reshape(-1, 1)
    got = (np.stack([q & 15, q >> 4], -1).reshape(len(q), -1) - 8.0) * scale
    wanted = np.concatenate(list(changed(held, W).values()))
    # Half a step of 15 is the most that one rounding to these scales may be off.
    assert (abs(got - wanted) <= 0.501 * abs(scale)).mean() > 0.99


def test_rows_are_compared_with_the_base(tmp_path):
    W = built(tmp_path / "model", "int4")
    names = {f"{PATH}{name}.weight": weight(name) for name in ROWS}
    save_file(names, tmp_path / "base.safetensors")
    config = {
        "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": SHARED, "hidden_size": HIDDEN,
        "head_dim": EACH,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    base, held = tmp_path / "base.safetensors", adapter()
    ak.onnx.inject(tmp_path / "model", held, tmp_path / "out", base_weights=base)
    # One family's naming has `attn.q_proj` with rows in another order, which the builder's graphs do not have.
    got, wanted = run(tmp_path / "out" / "model.onnx", changed(held, W))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())
    save_file({name: -W for name, W in names.items()}, tmp_path / "other.safetensors")
    with pytest.raises(TargetNotFound, match="rows of the packed layer differ"):
        ak.onnx.inject(tmp_path / "model", adapter(), tmp_path / "no", base_weights=tmp_path / "other.safetensors")


def test_a_packed_layer_without_head_counts_is_not_cut(tmp_path):
    built(tmp_path / "model")
    file = tmp_path / "model" / "model.onnx"
    model = onnx.load(file)
    model.graph.output.append(helper.make_tensor_value_info("qkv", TensorProto.FLOAT, None))
    onnx.save(model, file)
    with pytest.raises(TargetNotFound):
        ak.onnx.inject(tmp_path / "model", adapter(), tmp_path / "out")


def test_the_check_takes_sizes_from_the_config(tmp_path, monkeypatch):
    """Without the head size, no made-up past fits; then a wrong graph would go unseen."""
    built(tmp_path / "model")
    attach = ak.onnx.injecting.attach

    def half(found, *more):
        return attach(found[:1], *more)

    monkeypatch.setattr("adapterkit.onnx.injecting.attach", half)
    with pytest.raises(CheckFailed):
        ak.onnx.inject(tmp_path / "model", adapter(), tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_layer_that_the_builder_cuts(tmp_path, method):
    """Phi-3 has one layer for gate and up, the builder's graph two."""
    rng, names = np.random.default_rng(5), ("gate_proj", "up_proj")
    W = {name: rng.normal(size=(6, 4)).astype("f4") for name in names}
    stem = "model.layers.0.mlp."
    held = [numpy_helper.from_array(np.ascontiguousarray(W[n].T), f"{stem}{n}.MatMul.weight") for n in names]
    nodes = [
        helper.make_node("MatMul", ["x", f"{stem}{n}.MatMul.weight"], [n], name=f"/model/layers.0/mlp/{n}/MatMul")
        for n in names
    ]
    nodes.append(helper.make_node("Mul", list(names), ["y"]))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", size]) for n, size in (("x", 4), ("y", 6)))
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    A, B, scale = (torch.from_numpy(rng.normal(size=size).astype("f4")) for size in ((2, 4), (12, 2), (12,)))
    update = METHODS["lora"](A=A, B=B, scaling=0.5) if method == "lora" else METHODS["ia3"](l=scale)
    adapter_ = Adapter({Target(f"{stem}gate_up_proj"): (update,)})
    whole = update.map(lambda leaf: leaf.numpy().astype("f8")).new_weight(np.concatenate([W[n] for n in names]))
    given = rng.normal(size=(3, 4)).astype("f4")
    wanted = (given @ whole[:6].T) * (given @ whole[6:].T)
    ak.onnx.inject(tmp_path / "m.onnx", adapter_, tmp_path / "c.onnx")
    ak.onnx.merge(tmp_path / "m.onnx", adapter_, tmp_path / "f.onnx")
    ak.onnx.inject(tmp_path / "m.onnx", adapter_, tmp_path / "s.onnx", mode="slots")
    for name in ("c", "f", "s"):
        feeds = ak.onnx.fit(tmp_path / "s.onnx", adapter_) if name == "s" else {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(tmp_path / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        got = session.run(None, {"x": given, **feeds})[0]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


EXPERTS, INNER = 3, 6


def routed(folder):
    """Write a layer of experts as the builder does: a router, and one node for all experts; return its tensors."""
    rng, folder = np.random.default_rng(7), Path(folder)
    folder.mkdir()
    stem = "model.layers.0.moe."
    names = {"router": f"{stem}router.MatMul.weight", "up": f"{stem}experts.gate_up_proj.weight",
             "down": f"{stem}experts.down_proj.weight"}  # fmt: skip
    shapes = {"router": (HIDDEN, EXPERTS), "up": (EXPERTS, INNER, HIDDEN), "down": (EXPERTS, HIDDEN, INNER)}
    W = {name: rng.normal(size=shape).astype("f4") / 4 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("MatMul", ["x", names["router"]], ["chosen"], name="/model/layers.0/moe/router/MatMul"),
        helper.make_node(
            "MoE", ["x", "chosen", names["up"], "", names["down"]], ["y"], name="/model/layers.0/moe/MoE",
            domain="com.microsoft", k=2, activation_type="relu",
        ),
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", HIDDEN]) for name in "xy")
    held = [numpy_helper.from_array(W[name], names[name]) for name in W]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], held), opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    return W


def experts(W, x):
    """What the layer computes, in float64: the two likeliest experts, each times its probability."""
    logits = x @ W["router"].astype("f8")
    odds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    each = np.maximum(np.einsum("nd,eid->nei", x, W["up"].astype("f8")), 0)
    each = np.einsum("nei,edi->ned", each, W["down"].astype("f8"))
    kept = odds * (odds >= np.sort(odds, -1)[:, -2:-1])
    return np.einsum("ne,ned->nd", kept, each)


@pytest.mark.parametrize("word", ["router", "gate"])
@pytest.mark.parametrize("way", ["constant", "slots", "merge"])
def test_a_router_of_experts(tmp_path, word, way):
    """The builder calls it `moe.router`, whatever the model does."""
    W = routed(tmp_path / "model")
    rng = np.random.default_rng(8)
    A, B = (torch.from_numpy(rng.normal(size=shape).astype("f4")) for shape in ((2, HIDDEN), (EXPERTS, 2)))
    held = Adapter({Target(f"model.layers.0.mlp.{word}"): (METHODS["lora"](A=A, B=B),)})
    out, feeds = tmp_path / "out", {}
    if way == "merge":
        report = ak.onnx.merge(tmp_path / "model", held, out)
    else:
        report = ak.onnx.inject(tmp_path / "model", held, out, mode=way)
        feeds = ak.onnx.fit(out / "model.onnx", held) if way == "slots" else {}
    assert report.difference is not None, report.note
    x = rng.normal(size=(5, HIDDEN)).astype("f4")
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    wanted = experts({**W, "router": W["router"] + (B.numpy() @ A.numpy()).T}, x)
    assert abs(wanted - experts(W, x)).max() > 0.1 * abs(wanted).max()
    np.testing.assert_allclose(session.run(None, {"x": x, **feeds})[0], wanted, atol=1e-5 * abs(wanted).max())


def test_experts_of_an_unknown_layout_are_refused_by_the_name_of_their_node(tmp_path):
    """A third weight is not run by onnxruntime's kernel for processors, so nothing proves what it does."""
    routed(tmp_path / "model")
    model = onnx.load(tmp_path / "model" / "model.onnx")
    model.graph.node[1].input.extend(["", model.graph.node[1].input[2]])
    onnx.save(model, tmp_path / "model" / "model.onnx")
    target = Target("model.layers.0.mlp.experts.1.up_proj")
    update = METHODS["lora"](A=torch.ones(2, HIDDEN), B=torch.ones(INNER, 2))
    router = METHODS["lora"](A=torch.ones(2, HIDDEN), B=torch.ones(EXPERTS, 2))
    held = Adapter({target: (update,), Target("model.layers.0.mlp.router"): (router,)})
    for source in (tmp_path / "model", tmp_path / "model" / "model.onnx"):
        out = tmp_path / ("out" if source.is_dir() else "out.onnx")
        for change in (ak.onnx.inject, ak.onnx.merge):
            with pytest.raises(Unsupported, match=r"inside the node /model/layers.0/moe/MoE \(MoE\)") as error:
                change(source, held, out)
            assert "--allow-partial (allow_partial=True)" in str(error.value)
        assert not out.exists()
        report = ak.onnx.inject(source, held, out, allow_partial=True, check=False)
        assert [str(found.asked) for found in report.found] == ["model.layers.0.mlp.router"]
    other = Adapter({Target("model.layers.1.mlp.experts.1.up_proj"): held.updates[target]})
    with pytest.raises(TargetNotFound):  # The graph has no such layer.
        ak.onnx.inject(tmp_path / "model" / "model.onnx", other, tmp_path / "no.onnx")

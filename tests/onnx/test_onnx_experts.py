"""Experts in one node: onnxruntime computes what a float64 formula of the layer does, with changed experts."""

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
from adapterkit.errors import ShapeMismatch, TargetNotFound, Unsupported
from adapterkit.methods import METHODS

EXPERTS, HIDDEN, INNER, USED = 4, 32, 48, 2
STEM = "model.layers.0.moe.experts."


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def weights(fused):
    """Gate, up and down of each expert as in torch, `[expert, out, in]`, their biases, and the router."""
    parts = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    parts = parts if fused else {"up": parts["up"], "down": parts["down"]}
    W = {name: drawn(EXPERTS, *shape, seed=at) / 6 for at, (name, shape) in enumerate(parts.items())}
    W |= {f"{name}_bias": drawn(EXPERTS, shape[0], seed=9 + at) / 6 for at, (name, shape) in enumerate(parts.items())}
    return {**W, "router": drawn(EXPERTS, HIDDEN, seed=20)}


def expert(W, number, x, fused):
    up = W["up"][number] @ x + W["up_bias"][number]
    if fused:
        gate = W["gate"][number] @ x + W["gate_bias"][number]
        return W["down"][number] @ (gate / (1 + np.exp(-1.5 * gate)) * (up + 1)) + W["down_bias"][number]
    return W["down"][number] @ np.maximum(up, 0) + W["down_bias"][number]


def layer(W, x, fused):
    """The mean of the likeliest experts, weighted by their probabilities, in float64."""
    W = {name: array.astype("f8") for name, array in W.items()}
    odds = np.exp(x @ W["router"].T)
    out = np.zeros_like(x, dtype="f8")
    for row, (token, share) in enumerate(zip(x.astype("f8"), odds, strict=True)):
        top = np.argsort(-share)[:USED]
        for number in top:
            out[row] += share[number] / share[top].sum() * expert(W, number, token, fused)
    return out


def interleaved(W, ending=""):
    first = [W[f"gate{ending}"], W[f"up{ending}"]] if "gate" in W else [W[f"up{ending}"]]
    return np.stack(first, 2).reshape(EXPERTS, len(first) * INNER, *first[0].shape[2:])


def packed(W, bits, size):
    """Round `[expert, out, in]` symmetrically: bytes, scales, and the rounded numbers."""
    middle = 1 << (bits - 1)
    blocks = W.reshape(*W.shape[:2], -1, size or W.shape[2])
    scale = np.maximum(abs(blocks).max(-1, keepdims=True), 1e-9) / (middle - 1)
    q = (np.rint(blocks / scale) + middle).astype("u1").reshape(W.shape)
    rounded = ((q.reshape(blocks.shape).astype("f4") - middle) * scale).reshape(W.shape)
    pairs = q.reshape(*W.shape[:2], -1, 8 // bits)
    bytes_ = sum(pairs[..., at] << (bits * at) for at in range(8 // bits)).astype("u1")
    return bytes_, scale[..., 0] if size else scale[..., 0, 0], rounded


def joined(q, bits):
    """Bytes of small numbers, the last axis padded to whole bytes."""
    per = 8 // bits
    q = np.pad(q, (*((0, 0),) * (q.ndim - 1), (0, -q.shape[-1] % per))).reshape(*q.shape[:-1], -1, per)
    return sum(q[..., at].astype("u1") << (bits * at) for at in range(per)).astype("u1")


def packed_from_zeros(W, bits, size):
    """Round `[expert, out, in]` between the smallest and the largest number: bytes, scales, zero points, numbers."""
    most = (1 << bits) - 1
    blocks = W.reshape(*W.shape[:2], -1, size or W.shape[2])
    low, high = (np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0))
    scale = np.maximum(high - low, 1e-9) / most
    zero = np.rint(-low / scale)
    q = np.clip(np.rint(blocks / scale) + zero, 0, most)
    rounded = ((q - zero) * scale).reshape(W.shape).astype("f4")
    zeros = joined(zero[..., 0] if size else zero[..., 0, 0], bits)
    return joined(q.reshape(W.shape), bits), (scale[..., 0] if size else scale[..., 0, 0]).astype("f4"), zeros, rounded


def graph(
    folder, fused=True, bits=None, size=0, kind=None, zeros=False, weighted=False, dtype="f4", opset=21, biases=True,
    lead=("n",), **words,
):  # fmt: skip
    """Write a graph as onnxruntime-genai's builder does; return the numbers that it computes with."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    W = weights(fused)
    first, second = interleaved(W), W["down"]
    held = {f"{STEM}gate_up_proj.bias": interleaved(W, "_bias"), f"{STEM}down_proj.bias": W["down_bias"]}
    router = "model.layers.0.moe.router.MatMul.weight"
    held[router] = W["router"].T
    activation = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.5, "activation_beta": 1.0}
    words = {
        **(activation if fused else {"activation_type": "relu"}),
        "k": USED,
        "normalize_routing_weights": 1,
        **words,
    }
    if bits is None:
        held |= {f"{STEM}gate_up_proj.weight": first, f"{STEM}down_proj.weight": second}
        inputs = ["gate_up_proj.weight", "gate_up_proj.bias", "down_proj.weight", "down_proj.bias"]
        inputs = inputs if biases else [name if name.endswith("weight") else "" for name in inputs]
    else:
        words |= {"expert_weight_bits": bits, **({"block_size": size} if size else {})}
        for name, stack in (("gate_up_proj", first), ("down_proj", second)):
            if zeros:
                bytes_, scales, middle, rounded = packed_from_zeros(stack, bits, size)
                held[f"{STEM}{name}.zeros"] = middle
            else:
                bytes_, scales, rounded = packed(stack, bits, size)
            held |= {f"{STEM}{name}.qweight": bytes_, f"{STEM}{name}.scales": scales}
            if name == "down_proj":
                W["down"] = rounded
            else:
                parts = rounded.reshape(EXPERTS, INNER, -1, HIDDEN)
                W |= {part: parts[:, :, at] for at, part in enumerate(("gate", "up") if fused else ("up",))}
        inputs = [f"{name}.{part}" for name in ("gate_up_proj", "down_proj") for part in ("qweight", "scales", "bias")]
        inputs += ["", "", "", "gate_up_proj.zeros", "down_proj.zeros"] if zeros else []
        inputs += [""] * (12 - len(inputs)) + ["odds"] if weighted else []
    op = "MoE" if bits is None else "QMoE"
    inputs = [name if name in ("", "odds") else STEM + name for name in inputs]
    rows = "x" if len(lead) == 1 else "rows"
    nodes = [
        *([] if rows == "x" else [helper.make_node("Reshape", ["x", "flat"], ["rows"])]),
        helper.make_node("MatMul", [rows, router], ["chosen"], name="/model/layers.0/moe/router/MatMul"),
        *([helper.make_node("Softmax", ["chosen"], ["odds"])] if weighted else []),
        helper.make_node(
            op, ["x", "chosen", *inputs], ["y"], name=f"/model/layers.0/moe/{op}",
            domain="com.microsoft", **words,
        ),
    ]  # fmt: skip
    number = TensorProto.FLOAT if dtype == "f4" else TensorProto.FLOAT16
    x, y = (helper.make_tensor_value_info(name, number, [*lead, HIDDEN]) for name in "xy")
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype) if array.dtype.kind == "f" else array), name)
        for name, array in held.items()
    ]
    stored += [] if rows == "x" else [numpy_helper.from_array(np.array([-1, HIDDEN]), "flat")]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=opsets, ir_version=10),
        folder / "model.onnx",
    )
    if kind is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return W


def run(folder, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


X = drawn(6, HIDDEN, seed=30)

SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def update(method, out, in_, seed, experts=None):
    lead = () if experts is None else (experts,)
    rng = np.random.default_rng(seed)
    tensor = lambda *shape: torch.from_numpy(rng.normal(size=(*lead, *shape)).astype("f4") / 3)  # noqa: E731
    if method == "ia3":
        return METHODS["ia3"](l=tensor(out) + 1)
    found = {"A": tensor(2, in_), "B": tensor(out, 2), "scaling": 0.5}
    return METHODS["lora"](**found) if method == "lora" else METHODS["dora"](**found, magnitude=abs(tensor(out)) + 1)


def numbers(update, at=None):
    """An update in float64, or the update of one expert of a stack."""
    return update.map(lambda leaf: (leaf if at is None else leaf[at]).numpy().astype("f8"))


def changed(W, adapter):
    """The weights of the layer with an adapter of single experts."""
    W = {name: array.astype("f8") for name, array in W.items()}
    for target, (one,) in adapter.updates.items():
        words = target.path.split(".")
        if words[-1] in ("gate", "router"):
            W["router"] = numbers(one).new_weight(W["router"])
            continue
        number, part = int(words[-2]), words[-1].removesuffix("_proj")
        W[part][number] = numbers(one).new_weight(W[part][number])
        if one.changes_bias:
            W[f"{part}_bias"][number] = numbers(one).new_bias(W[f"{part}_bias"][number])
    return W


WAYS = ("constant", "merge")


def applied(way, source, adapter, out, **options):
    if way == "merge":
        return ak.onnx.merge(source, adapter, out, **options)
    return ak.onnx.inject(source, adapter, out, mode=way)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("fused", [True, False])
def test_single_experts_and_the_router(tmp_path, fused, method, way):
    W = graph(tmp_path / "base", fused)
    np.testing.assert_allclose(run(tmp_path / "base", X), layer(W, X, fused), rtol=1e-4, atol=1e-5)
    parts = ["gate_proj", "up_proj", "down_proj"] if fused else ["up_proj", "down_proj"]
    names = [(number, part) for number in (0, 2, 3) for part in parts if (number, part) != (2, "up_proj")]
    held = {
        Target(f"model.layers.0.mlp.experts.{number}.{part}"): (update(method, *SHAPES[part], seed),)
        for seed, (number, part) in enumerate(names)
    }
    held[Target("model.layers.0.mlp.gate")] = (update(method, EXPERTS, HIDDEN, 40),)
    adapter = Adapter(held)
    report = applied(way, tmp_path / "base", adapter, tmp_path / "out")
    assert report.difference is not None, report.note
    wanted = layer(changed(W, adapter), X, fused)
    assert abs(wanted - layer(W, X, fused)).max() > 0.1 * abs(wanted).max()
    np.testing.assert_allclose(run(tmp_path / "out", X), wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


STACKS = {
    "qwen3_5_moe": ("model.language_model.layers.0.mlp.experts", False, "e out *in"),
    "lfm2_moe": ("model.layers.0.feed_forward.experts", False, "e out *in"),
    "mixtral": ("model.layers.0.mlp.experts", False, "e out *in"),
    "gpt_oss": ("model.layers.0.mlp.experts", True, "e in out *k"),
}
"""Family -> the path of its stacks, whether they interleave gates and ups, and their layout."""


def stacks(kind, method="lora"):
    """An adapter of both stacks of a family, and the same adapter for single experts."""
    stem, mixed, layout = STACKS[kind]
    both = update(method, 2 * INNER, HIDDEN, 1, EXPERTS)
    down = update(method, HIDDEN, INNER, 2, EXPERTS)
    named = {"gate_up_proj": both, "down_proj": down}
    adapter = Adapter({Target(f"{stem}.{name}", layout=layout): (one,) for name, one in named.items()})
    single = {}
    for number in range(EXPERTS):
        for at, part in enumerate(("gate", "up")):
            rows = slice(at, None, 2) if mixed else slice(at * INNER, (at + 1) * INNER)
            cut = {
                n: leaf[number][rows] if n in ("B", "magnitude") else leaf[number] for n, leaf in both.tensors.items()
            }
            single[Target(f"model.layers.0.mlp.experts.{number}.{part}_proj")] = (both.replace(**cut),)
        one = {n: leaf[number] for n, leaf in down.tensors.items()}
        single[Target(f"model.layers.0.mlp.experts.{number}.down_proj")] = (down.replace(**one),)
    return adapter, Adapter(single)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_a_family(tmp_path, kind, method, way):
    W, (adapter, single) = graph(tmp_path / "base", kind=kind), stacks(kind, method)
    report = applied(way, tmp_path / "base", adapter, tmp_path / "out")
    assert report.difference is not None, report.note
    assert {str(at.asked) for at in report.found} == {str(target) for target in adapter.updates}
    wanted = layer(changed(W, single), X, True)
    np.testing.assert_allclose(run(tmp_path / "out", X), wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


def test_a_stack_without_a_family_is_refused(tmp_path):
    graph(tmp_path / "base")
    adapter, _ = stacks("gpt_oss")
    with pytest.raises(Unsupported, match="depends on the model's family") as error:
        ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out")
    assert "--base-weights DIR (base_weights=DIR)" in str(error.value)
    # The file that the builder writes names the family.
    (tmp_path / "base" / "genai_config.json").write_text(json.dumps({"model": {"type": "gptoss"}}))
    ak.onnx.inject(tmp_path / "base" / "model.onnx", adapter, tmp_path / "out.onnx")


def test_another_number_of_experts_is_refused(tmp_path):
    graph(tmp_path / "base", kind="mixtral")
    target = Target("model.layers.0.mlp.experts.down_proj", layout="e out *in")
    adapter = Adapter({target: (update("lora", HIDDEN, INNER, 1, EXPERTS + 1),)})
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(ShapeMismatch, match="5 experts, but the graph has 4"):
            change(tmp_path / "base", adapter, tmp_path / "out")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", [0, 16])
@pytest.mark.parametrize(("fused", "zeros"), [(True, False), (True, True), (False, False)])
def test_packed_experts(tmp_path, fused, zeros, size, bits):
    W = graph(tmp_path / "base", fused, bits, size, kind="mixtral", zeros=zeros)
    plain = layer(W, X, fused)
    # Block by block, the kernel for 8 bits rounds its inputs, too.
    noise = abs(run(tmp_path / "base", X) - plain).max() / abs(plain).max()
    assert noise < (2e-2 if bits == 8 and size else 1e-4)
    up, down = update("lora", INNER, HIDDEN, 3), update("lora", HIDDEN, INNER, 4)
    stem = "model.layers.0.mlp.experts"
    adapter = Adapter({Target(f"{stem}.1.up_proj"): (up,), Target(f"{stem}.3.down_proj"): (down,)})
    wanted = layer(changed(W, adapter), X, fused)
    report = ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "float", quantized="dequantize")
    assert report.difference is not None, report.note
    np.testing.assert_allclose(run(tmp_path / "float", X), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())
    report = ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "again", quantized="requantize")
    assert len(report.damage) == 2
    assert not report.beside
    got = onnx.load(tmp_path / "again" / "model.onnx")
    assert [node.op_type for node in got.graph.node] == ["MatMul", "QMoE"]
    # Nearest rounding of the changed stack, decoded independently.
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in got.graph.initializer}
    read = unpacked_stack(held, "down_proj", bits, size)
    aim = changed(W, adapter)["down"]
    nearest = (packed_from_zeros if zeros else packed)(aim.astype("f4"), bits, size)[-1]
    assert np.linalg.norm(read - aim) < 1.1 * np.linalg.norm(nearest - aim)
    others = [0, 1, 2]
    np.testing.assert_allclose(read[others], W["down"][others], atol=1e-6)
    told = layer({**changed(W, adapter), "down": read, **first_of(held, bits, size, fused)}, X, fused)
    np.testing.assert_allclose(run(tmp_path / "again", X), told, atol=(noise * 5 + 1e-5) * abs(told).max())


def test_router_weights_of_their_own(tmp_path):
    W = graph(tmp_path / "base", True, 4, 16, kind="mixtral", weighted=True)
    plain = layer(W, X, True)
    np.testing.assert_allclose(run(tmp_path / "base", X), plain, rtol=1e-4, atol=1e-4 * abs(plain).max())
    adapter = Adapter({Target("model.layers.0.mlp.experts.1.up_proj"): (update("lora", INNER, HIDDEN, 3),)})
    with pytest.raises(Unsupported, match=r"separate router weights.*--quantized requantize"):
        ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "out", quantized="dequantize")
    ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "out", quantized="requantize")
    got = onnx.load(tmp_path / "out" / "model.onnx")
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in got.graph.initializer}
    told = {**W, **first_of(held, 4, 16, True)}
    aim = changed(W, adapter)["up"]
    assert np.linalg.norm(told["up"] - aim) < 1.1 * np.linalg.norm(packed(aim.astype("f4"), 4, 16)[-1] - aim)
    wanted = layer(told, X, True)
    np.testing.assert_allclose(run(tmp_path / "out", X), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def split(bytes_, bits, count):
    """Small numbers from bytes, without padding at the end of the last axis."""
    pairs = np.stack([(bytes_ >> (bits * at)) & ((1 << bits) - 1) for at in range(8 // bits)], -1)
    return pairs.reshape(*bytes_.shape[:-1], -1)[..., :count].astype("f8")


def unpacked_stack(held, name, bits, size):
    bytes_, scales, zeros = (held.get(f"{STEM}{name}.{part}") for part in ("qweight", "scales", "zeros"))
    q = split(bytes_, bits, bytes_.shape[-1] * 8 // bits)
    zero = 1 << (bits - 1) if zeros is None else split(zeros, bits, scales.shape[-1])
    scales = np.repeat(scales, size, -1) if size else scales[..., None]
    if zeros is not None:
        zero = np.repeat(zero, size, -1) if size else zero[..., None]
    return (q - zero) * scales


def first_of(held, bits, size, fused):
    parts = unpacked_stack(held, "gate_up_proj", bits, size).reshape(EXPERTS, INNER, -1, HIDDEN)
    return {part: parts[:, :, at] for at, part in enumerate(("gate", "up") if fused else ("up",))}


def test_what_a_packed_node_cannot_take_names_the_way(tmp_path):
    graph(tmp_path / "base", True, 4)
    adapter = Adapter({Target("model.layers.0.mlp.experts.1.up_proj"): (update("lora", INNER, HIDDEN, 3),)})
    with pytest.raises(Unsupported, match=r"packed weights.*--quantized requantize"):
        ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out")
    with pytest.raises(Unsupported, match="the weight is quantized"):
        ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "out")
    with pytest.raises(Unsupported, match=r"cannot be added.*--keep-change packed"):
        ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "out", quantized="requantize", keep_change="float")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"fc2_expert_weight_bits": 8}, "its two weights have different numbers of bits"),
        ({"quant_type": "fp4"}, "its weights are not integers of 2, 4 or 8 bits"),
    ],
)
def test_packings_that_are_refused(tmp_path, words, why):
    graph(tmp_path / "base", True, 4, 16, **words)
    adapter = Adapter({Target("model.layers.0.mlp.experts.1.up_proj"): (update("lora", INNER, HIDDEN, 3),)})
    with pytest.raises(Unsupported, match=why):
        ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "out", quantized="requantize")


@pytest.mark.parametrize(("bits", "mode"), [(4, "constant"), (4, "slots"), (None, "rows")])
@pytest.mark.parametrize("file", ["", "model.onnx"])
def test_experts_that_nodes_cannot_change_are_omitted(tmp_path, bits, mode, file):
    W = graph(tmp_path / "base", bits=bits)
    router = {Target("model.layers.0.mlp.gate"): (update("lora", EXPERTS, HIDDEN, 40),)}
    expert_ = {Target("model.layers.0.mlp.experts.1.up_proj"): (update("lora", INNER, HIDDEN, 3),)}
    base, out = tmp_path / "base" / file, tmp_path / "out" / file
    for folder in ("out", "no") if file else ():
        (tmp_path / folder).mkdir()
    with pytest.raises(Unsupported, match=r"omit such targets: --allow-partial \(allow_partial=True\)"):
        ak.onnx.inject(base, Adapter(router | expert_), out, mode=mode)
    report = ak.onnx.inject(base, Adapter(router | expert_), out, mode=mode, allow_partial=True)
    assert any(line.endswith("model.layers.0.mlp.experts.1.up_proj") for line in report.warnings), report.warnings
    given = {"one": tmp_path / "out" / "model.onnx_adapter"} if mode == "slots" else {"one": Adapter(router)}
    session = ak.onnx.Session(tmp_path / "out" / "model.onnx", {} if mode == "constant" else given)
    choice = {"constant": None, "slots": "one", "rows": ["one"] * len(X)}[mode]
    wanted = layer(changed(W, Adapter(router)), X, True)
    np.testing.assert_allclose(session.run({"x": X}, choice)["y"], wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())
    with pytest.raises(Unsupported, match="omit such targets"):
        ak.onnx.inject(
            tmp_path / "base" / file, Adapter(expert_), tmp_path / "no" / file, mode=mode, allow_partial=True
        )


def test_rows_with_adapters_of_their_own_are_refused(tmp_path):
    graph(tmp_path / "base")
    adapter = Adapter({Target("model.layers.0.mlp.experts.1.up_proj"): (update("lora", INNER, HIDDEN, 3),)})
    with pytest.raises(Unsupported, match=r"the same weights for all rows.*--mode slots \(mode='slots'\)"):
        ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out", mode="rows")


@pytest.mark.parametrize("mode", ["slots", "inputs"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("fused", [True, False])
def test_slots_of_single_experts_and_the_router(tmp_path, fused, method, mode):
    W = graph(tmp_path / "base", fused)
    parts = ["gate_proj", "up_proj", "down_proj"] if fused else ["up_proj", "down_proj"]
    names = [(number, part) for number in (0, 2, 3) for part in parts if (number, part) != (2, "up_proj")]

    def adapter(seed, chosen):
        held = {
            Target(f"model.layers.0.mlp.experts.{number}.{part}"): (update(method, *SHAPES[part], seed + at),)
            for at, (number, part) in enumerate(chosen)
        }
        held[Target("model.layers.0.mlp.gate")] = (update(method, EXPERTS, HIDDEN, seed + 40),)
        return Adapter(held)

    adapters = {"one": adapter(0, names), "two": adapter(100, names), "few": adapter(200, names[:2])}
    report = ak.onnx.inject(tmp_path / "base", adapters["one"], tmp_path / "out", mode=mode)
    assert report.difference is not None, report.note
    assert "1 MoE node was split into nodes for each expert" in report.note
    session = ak.onnx.Session(tmp_path / "out", adapters)
    for name in ("one", None, "few", "two", "one"):
        wanted = layer(changed(W, adapters[name]) if name else W, X, fused)
        got = session.run({"x": X}, name)["y"]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())
    plain = run(tmp_path / "base", X)
    np.testing.assert_allclose(session.run({"x": X})["y"], plain, rtol=1e-6, atol=1e-6 * abs(plain).max())


SPLITS = {
    "relu": {"fused": False},
    "gelu": {"fused": False, "activation_type": "gelu"},
    "silu": {"fused": False, "activation_type": "silu"},
    "identity": {"fused": False, "activation_type": "identity"},
    "plain swiglu": {"activation_alpha": 1.0, "activation_beta": 0.0},
    "limited swiglu": {"swiglu_limit": 0.5},
    "shares of all experts": {"normalize_routing_weights": 0},
    "one expert": {"k": 1},
    "one expert, shares of all": {"k": 1, "normalize_routing_weights": 0},
    "all experts": {"k": EXPERTS},
    "no biases": {"biases": False},
    "several axes": {"lead": ("batch", "n")},
    "float16": {"dtype": "f2"},
    "opset 13": {"opset": 13},
    "opset 17": {"opset": 17},
    "opset 18": {"opset": 18},
}
"""Arguments of `graph` for nodes of experts that are split into nodes for each expert."""


@pytest.mark.parametrize("words", SPLITS.values(), ids=SPLITS)
def test_nodes_for_each_expert_compute_what_one_node_computes(tmp_path, words):
    """Compare with onnxruntime's kernel, also for no tokens, and for tokens whose experts are equally likely."""
    graph(tmp_path / "base", kind="mixtral", **words)
    parts = ["up_proj", "down_proj"] if words.get("fused") is False else ["gate_proj", "up_proj", "down_proj"]
    adapter = Adapter(
        {
            Target(f"model.layers.0.mlp.experts.{number}.{part}"): (update("lora", *SHAPES[part], number),)
            for number in range(EXPERTS)
            for part in parts
        }
    )
    report = ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out", mode="slots")
    assert report.difference is not None, report.note
    ak.onnx.merge(tmp_path / "base", adapter, tmp_path / "merged", check=False)
    session = ak.onnx.Session(tmp_path / "out", {"one": adapter})
    assert not any(node.op_type == "MoE" for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node)
    dtype = words.get("dtype", "f4")
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == "f4" else {"rtol": 2e-2, "atol": 2e-2}
    for tokens in (drawn(6, HIDDEN, seed=30), drawn(1, HIDDEN, seed=31), np.zeros((3, HIDDEN)), np.zeros((0, HIDDEN))):
        x = tokens.astype(dtype).reshape(*(1,) * (len(words.get("lead", "n")) - 1), *tokens.shape)
        for name, folder in ((None, "base"), ("one", "merged")):
            wanted = run(tmp_path / folder, x).astype("f8")
            size = abs(wanted).max(initial=1e-9)
            np.testing.assert_allclose(session.run({"x": x}, name)["y"] / size, wanted / size, **near)


def test_experts_that_no_token_selects_are_not_computed(tmp_path):
    """A weight that is not a number shows whether it is used: the kernel does not read experts without tokens."""
    graph(tmp_path / "base", k=1)
    model = onnx.load(tmp_path / "base" / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_proj.weight"):
            stack = numpy_helper.to_array(tensor).copy()
            stack[1:] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(stack, tensor.name))
        elif "router" in tensor.name:
            router = np.zeros((HIDDEN, EXPERTS), "f4")
            router[:, 0] = 9
            tensor.CopyFrom(numpy_helper.from_array(router, tensor.name))
    onnx.save(model, tmp_path / "base" / "model.onnx")
    adapter = Adapter(
        {Target(f"model.layers.0.mlp.experts.{at}.up_proj"): (update("ia3", INNER, HIDDEN, 3),) for at in (0, 1)}
    )
    ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out", mode="slots", check=False)
    got = ak.onnx.Session(tmp_path / "out", {"one": adapter}).run({"x": abs(X)}, "one")["y"]
    assert np.isfinite(got).all()


@pytest.mark.parametrize("kind", STACKS)
def test_slots_of_stacks(tmp_path, kind):
    W, (adapter, single) = graph(tmp_path / "base", kind=kind), stacks(kind)
    report = ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out", mode="slots")
    assert report.difference is not None, report.note
    more = adapter.map(lambda leaf: torch.as_tensor(leaf) * 0.5)
    ak.onnx.write_adapter(tmp_path / "out" / "model.onnx", more, tmp_path / "half.onnx_adapter")
    given = {"whole": adapter, "file": tmp_path / "out" / "model.onnx_adapter", "half": tmp_path / "half.onnx_adapter"}
    session = ak.onnx.Session(tmp_path / "out", given)
    half = single.map(lambda leaf: torch.as_tensor(leaf) * 0.5)
    for name, one in (("whole", single), ("half", half), ("file", single)):
        wanted = layer(changed(W, one), X, True)
        np.testing.assert_allclose(session.run({"x": X}, name)["y"], wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


def test_an_unknown_layout_is_refused(tmp_path):
    """onnxruntime accepts stacks with swapped axes, too, and reads their memory as if they were not swapped."""
    graph(tmp_path / "base", kind="mixtral")
    model = onnx.load(tmp_path / "base" / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_proj.weight"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).swapaxes(1, 2).copy(), tensor.name))
    onnx.save(model, tmp_path / "base" / "model.onnx")
    adapter, _ = stacks("mixtral")
    with pytest.raises(Unsupported, match=r"/model/layers.0/moe/MoE \(MoE\), and its weights are stored in an older"):
        ak.onnx.inject(tmp_path / "base", adapter, tmp_path / "out")


def test_a_change_can_be_ejected_and_two_adapters_be_merged(tmp_path):
    W = graph(tmp_path / "base")
    pair = [
        Adapter({Target("model.layers.0.mlp.experts.1.up_proj"): (update("lora", INNER, HIDDEN, seed),)})
        for seed in (3, 4)
    ]
    before = (tmp_path / "base" / "model.onnx").read_bytes()
    ak.onnx.inject(tmp_path / "base" / "model.onnx", pair[0], tmp_path / "one.onnx")
    ak.onnx.eject(tmp_path / "one.onnx", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == before
    ak.onnx.merge(tmp_path / "base", pair, tmp_path / "both", weights=[0.5, 2.0])
    one, two = (changed(W, adapter)["up"] - W["up"] for adapter in pair)
    wanted = layer({**W, "up": W["up"] + 0.5 * one + 2 * two}, X, True)
    np.testing.assert_allclose(run(tmp_path / "both", X), wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("bits", [None, 4])
def test_another_base_is_refused(tmp_path, kind, bits):
    """The base is given to name the family, and its weights are compared."""
    W, (adapter, _) = graph(tmp_path / "graph", bits=bits, size=16), stacks(kind)
    mixed = STACKS[kind][1]
    both = interleaved(W) if mixed else np.concatenate([W["gate"], W["up"]], 1)
    held = {"gate_up_proj": both, "down_proj": W["down"]}
    held = {name: stack.swapaxes(1, 2) if mixed else stack for name, stack in held.items()}
    how = {} if bits is None else {"quantized": "requantize"}
    for number, factor in enumerate((1, -1)):
        base = tmp_path / f"base{number}"
        base.mkdir()
        held["down_proj"] = held["down_proj"] * np.float32(factor)
        stem = STACKS[kind][0]
        save_file({f"{stem}.{n}": np.ascontiguousarray(a) for n, a in held.items()}, base / "model.safetensors")
        (base / "config.json").write_text(json.dumps({"model_type": kind, "num_local_experts": EXPERTS}))
        if factor == 1:
            ak.onnx.merge(tmp_path / "graph", adapter, tmp_path / "out", base_weights=base, **how)
            continue
        with pytest.raises(TargetNotFound, match=r"expert 0 in the graph differs from the base's weight .*down_proj"):
            ak.onnx.merge(tmp_path / "graph", adapter, tmp_path / "no", base_weights=base, **how)

"""Slots end to end: files for a graph by `convert`, files of Olive, batches with an adapter for each row."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import record, run
from onnx import TensorProto, helper, numpy_helper

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import (
    CheckFailed,
    Malformed,
    ShapeMismatch,
    StorageError,
    TargetNotFound,
    Unsupported,
    UsageError,
)
from adapterkit.io.lazy import from_numpy
from adapterkit.io.ort_adapter import OrtAdapter, write_ort_adapter
from adapterkit.methods import METHODS
from adapterkit.onnx import rowwise
from adapterkit.onnx.session import MOST_STACKS

SIZE = 6
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def weight(name):
    return np.random.default_rng(sum(map(ord, name))).normal(size=(SIZE, SIZE)).astype("f4")


def graph(folder, rank=3):
    """Two layers, one after the other, as torch's older exporter names them."""
    names = [name.replace(".", "/").replace("layers/", "layers.") for name in (Q, V)]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(weight(name).T), f"W{n}") for n, name in enumerate((Q, V))]
    nodes = [
        helper.make_node("MatMul", ["x", "W0"], ["h"], name=f"/{names[0]}/MatMul"),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "W1"], ["y"], name=f"/{names[1]}/MatMul"),
    ]
    sizes = ["batch", "tokens", SIZE] if rank == 3 else ["batch", SIZE]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in "xy")
    held = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(held, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "model.onnx")
    return folder / "model.onnx"


def adapter(seed=0, rank=2, names=(Q, V), method="lora"):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.normal(size=shape).astype("f4"))

    def update():
        more = {"magnitude": 1 + draw(SIZE).abs()} if method == "dora" else {}
        return METHODS[method](A=draw(rank, SIZE), B=draw(SIZE, rank), scaling=0.25 + seed / 10, **more)

    return Adapter({Target(name): (update(),) for name in names})


def formula(x, held=None):
    W = {name: weight(name).astype("f8") for name in (Q, V)}
    for target, (update,) in (held.updates if held else {}).items():
        W[target.path] = update.map(lambda leaf: leaf.numpy().astype("f8")).new_weight(W[target.path])
    return np.tanh(x.astype("f8") @ W[Q].T) @ W[V].T


def batch(rows, tokens=4):
    return np.random.default_rng(9).normal(size=(rows, tokens, SIZE)).astype("f4")


def test_convert_writes_a_file_for_a_graph(tmp_path):
    base, held = graph(tmp_path), adapter()
    ak.onnx.inject(base, held, tmp_path / "slots.onnx", mode="slots")
    other = adapter(1, rank=4, names=(V,))
    ak.write(other, tmp_path / "peft", format="peft")
    out = tmp_path / "other.onnx_adapter"
    told = record("convert", tmp_path / "peft", out, "--to", "onnx_adapter", "--base", tmp_path / "slots.onnx")
    assert told["targets"] == 1
    options, loaded = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
    loaded.Load(str(out))
    options.add_active_adapter(loaded)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(tmp_path / "slots.onnx"), settings, providers=["CPUExecutionProvider"])
    x = batch(2)
    np.testing.assert_allclose(session.run(None, {"x": x}, options)[0], formula(x, other), rtol=1e-4, atol=1e-5)
    assert ak.read(out).updates.keys() == other.updates.keys()
    words = ("convert", tmp_path / "peft", out, "--to", "onnx_adapter", "--base", tmp_path / "slots.onnx")
    for more in (["--profile", "vllm"], ["--on-loss", "drop"], ["--on-loss", "promote", "--max-error", "0.1"]):
        refused = run(*words, *more, "--overwrite")
        assert (refused.exit_code, "the slots of the graph determine" in refused.stderr) == (2, True)
    assert record(*words)["already_done"]
    assert run(*words, "--overwrite").exit_code == 0
    with pytest.raises(StorageError):
        ak.convert(tmp_path / "peft", out, to="onnx_adapter", base=tmp_path / "slots.onnx")
    with pytest.raises(TargetNotFound, match="slots"):
        ak.convert(tmp_path / "peft", tmp_path / "no", to="onnx_adapter", base=base)
    assert not (tmp_path / "no").exists()


def test_a_file_of_olive_loads(tmp_path):
    """Olive turns factors, folds the scale into B and has names of its own."""
    base, held = graph(tmp_path), adapter()
    ak.onnx.inject(base, held, tmp_path / "slots.onnx", mode="slots")
    other, values = adapter(2, rank=5), {}
    for target, (update,) in other.updates.items():
        values[f"{target.path}.lora_A.weight"] = from_numpy(np.ascontiguousarray(update.A.numpy().T))
        B = np.ascontiguousarray(update.B.numpy().T) * np.float32(update.scaling)
        values[f"{target.path}.lora_B.weight"] = from_numpy(B)
    write_ort_adapter(tmp_path / "olive.onnx_adapter", OrtAdapter(values))
    session, x = ak.onnx.Session(tmp_path / "slots.onnx"), batch(2)
    session.load("olive", tmp_path / "olive.onnx_adapter")
    np.testing.assert_allclose(session.run({"x": x}, "olive")["y"], formula(x, other), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(session.run({"x": x})["y"], formula(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [3, 2])
def test_a_batch_with_an_adapter_for_each_row(tmp_path, rank):
    """Eight adapters of different ranks, the base among them, and one with a single target."""
    base = graph(tmp_path, rank)
    report = ak.onnx.inject(base, adapter(), tmp_path / "rows.onnx", mode="rows")
    assert report.difference is not None
    assert report.difference < 1e-5
    session = ak.onnx.Session(tmp_path / "rows.onnx")
    held = {f"a{n}": adapter(n, rank=1 + n, names=(V,) if n == 3 else (Q, V)) for n in range(7)}
    for name, one in held.items():
        session.load(name, one)
    names = ["a0", "a1", None, "a2", "a3", "a4", "a5", "a6", "a1"]
    x = batch(len(names)) if rank == 3 else batch(len(names))[:, 0]
    together = session.run({"x": x}, names)["y"]
    for row, name in enumerate(names):
        alone = session.run({"x": x[row : row + 1]}, name)["y"][0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(together[row], formula(x[row], held.get(name)), rtol=1e-4, atol=1e-5)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    plain = onnxruntime.InferenceSession(str(base), settings, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_array_equal(session.run({"x": x})["y"], plain)
    with pytest.raises(UsageError, match="2 adapters for a batch of 9"):
        session.run({"x": x}, ["a0", None])
    with pytest.raises(UsageError, match="no adapter 'b'"):
        session.run({"x": x}, ["b"] * 9)


def test_rows_are_refused_where_nothing_tells_them(tmp_path):
    base = graph(tmp_path)
    with pytest.raises(Unsupported, match="this target has dora"):
        ak.onnx.inject(base, adapter(method="dora"), tmp_path / "out.onnx", mode="rows")
    model = onnx.load(base)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    with pytest.raises(Unsupported, match="batch of two"):
        ak.onnx.inject(tmp_path / "one.onnx", adapter(), tmp_path / "out.onnx", mode="rows")
    ak.onnx.inject(base, adapter(), tmp_path / "slots.onnx", mode="slots")
    session = ak.onnx.Session(tmp_path / "slots.onnx", {"a": adapter()})
    with pytest.raises(UsageError, match="mode='rows'"):
        session.run({"x": batch(2)}, ["a", None])
    ak.onnx.inject(base, adapter(), tmp_path / "rows.onnx", mode="rows")
    wide = Adapter({Target(Q): (METHODS["lora"](A=torch.ones(2, 9), B=torch.ones(6, 2)),)})
    with pytest.raises(ShapeMismatch):
        ak.onnx.fit(tmp_path / "rows.onnx", wide)


def test_two_dynamic_sizes_without_a_name_may_differ(tmp_path):
    """The layer sees all tokens of all texts: without names, nothing shows that its rows are no batch."""
    model = onnx.load(graph(tmp_path, 2))
    turn = helper.make_node("Reshape", ["z", "flat"], ["x"])
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 6], np.int64), "flat"))
    model.graph.node.insert(0, turn)
    shape = model.graph.input[0].type.tensor_type.shape
    model.graph.input[0].name = "z"
    del shape.dim[:]
    shape.dim.extend([onnx.TensorShapeProto.Dimension() for _ in range(2)])
    shape.dim.add().dim_value = 6
    model.graph.output[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 6]) for name in ("x", "h", "t")
    )
    onnx.save(model, tmp_path / "flat.onnx")
    with pytest.raises(Unsupported, match="2 axes of which the first is known to be the batch"):
        ak.onnx.inject(tmp_path / "flat.onnx", adapter(), tmp_path / "out.onnx", mode="rows")


@pytest.mark.parametrize("direct", [False, True])
def test_rows_of_a_gemm_that_transposes_its_input(tmp_path, direct):
    """The batch is the second axis of the input: behind a Transpose of the batch, or of an input of the graph."""
    linear = helper.make_node("Gemm", ["x" if direct else "t", "W", "b"], ["y"], name="/fc/Gemm", transA=1, transB=1)
    turn = [] if direct else [helper.make_node("Transpose", ["x"], ["t"])]
    W, b = np.random.default_rng(1).normal(size=(5, 4)).astype("f4"), np.arange(5, dtype="f4")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)
            for name, sizes in (("x", [4, "batch"] if direct else ["batch", 4]), ("y", ["batch", 5])))  # fmt: skip
    held = [numpy_helper.from_array(W, "W"), numpy_helper.from_array(b, "b")]
    made = helper.make_graph([*turn, linear], "g", [x], [y], held)
    base = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), base)
    rng = np.random.default_rng(2)
    update = METHODS["lora"](A=torch.tensor(rng.normal(size=(2, 4))), B=torch.tensor(rng.normal(size=(5, 2))))
    one = Adapter({Target("fc"): (update,)})
    if direct:
        with pytest.raises(Unsupported, match="of which the second is known to be the batch"):
            ak.onnx.inject(base, one, tmp_path / "rows.onnx", mode="rows")
        return
    ak.onnx.inject(base, one, tmp_path / "rows.onnx", mode="rows")
    session = ak.onnx.Session(tmp_path / "rows.onnx", {"a": one})
    rows = rng.normal(size=(3, 4)).astype("f4")
    got = session.run({"x": rows}, ["a", None, "a"])["y"]
    new = W + (update.tensors["B"] @ update.tensors["A"]).numpy() * update.scaling
    want = np.stack([rows[0] @ new.T, rows[1] @ W.T, rows[2] @ new.T]) + b
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_rows_that_are_not_the_first_axis_are_found_out(tmp_path):
    """Time before batch: the index would go along the tokens."""
    base = graph(tmp_path)
    model = onnx.load(base)
    turn = [helper.make_node("Transpose", ["z"], ["x"], perm=[1, 0, 2]), *model.graph.node,
            helper.make_node("Transpose", ["y"], ["out"], perm=[1, 0, 2])]  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(turn)
    model.graph.input[0].name, model.graph.output[0].name = "z", "out"
    onnx.save(model, tmp_path / "turned.onnx")
    with pytest.raises((CheckFailed, Unsupported)):
        ak.onnx.inject(tmp_path / "turned.onnx", adapter(), tmp_path / "out.onnx", mode="rows")


def test_rows_without_a_slot_for_the_bias_refuse_a_bias(tmp_path):
    ak.onnx.inject(graph(tmp_path), adapter(), tmp_path / "rows.onnx", mode="rows")
    update = METHODS["lora"](A=torch.ones(2, SIZE), B=torch.ones(SIZE, 2), bias=torch.ones(SIZE))
    session = ak.onnx.Session(tmp_path / "rows.onnx")
    with pytest.raises(TargetNotFound, match="no slot for bias"):
        session.load("a", Adapter({Target(V): (update,)}))


def test_stacks_of_rows_do_not_pile_up(tmp_path):
    """Each set of adapters has one stack; old stacks go. An empty name is a name, too."""
    ak.onnx.inject(graph(tmp_path), adapter(), tmp_path / "rows.onnx", mode="rows")
    names = ["", *(f"a{number}" for number in range(5))]
    held = {name: adapter(seed, rank=1 + seed) for seed, name in enumerate(names)}
    session = ak.onnx.Session(tmp_path / "rows.onnx", held)
    x = batch(3)
    for chosen in itertools.permutations([None, *names], 3):
        got = session.run({"x": x}, chosen)["y"]
        want = np.stack([formula(row, held.get(name)) for row, name in zip(x, chosen, strict=True)])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert len(session._stacks) <= MOST_STACKS


def test_an_adapter_replaced_during_a_run_is_not_used_later(tmp_path, monkeypatch):
    ak.onnx.inject(graph(tmp_path), adapter(), tmp_path / "rows.onnx", mode="rows")
    session = ak.onnx.Session(tmp_path / "rows.onnx", {"a": adapter(1)})
    x, stacked = batch(2), rowwise.stacked

    def meanwhile(*args):
        monkeypatch.undo()
        made = stacked(*args)
        session.load("a", adapter(2))  # As another thread would, while a run builds its stack.
        return made

    monkeypatch.setattr("adapterkit.onnx.session.stacked", meanwhile)
    session.run({"x": x}, ["a", None])
    got = session.run({"x": x}, ["a", None])["y"]
    np.testing.assert_allclose(got[0], formula(x[0], adapter(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["slots", "rows", "inputs"])
def test_numbers_too_large_for_a_slot_are_refused(mode, tmp_path):
    base = graph(tmp_path)
    model = onnx.load(base)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype("f2"), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, base)
    ak.onnx.inject(base, adapter(), tmp_path / "out.onnx", mode=mode)
    update = METHODS["lora"](A=torch.full((2, SIZE), 1e5), B=torch.full((SIZE, 2), 1e-6))
    session = ak.onnx.Session(tmp_path / "out.onnx")
    with pytest.raises(Malformed, match="too large for the slot's dtype float16"):
        session.load("a", Adapter({Target(Q): (update,)}))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
def test_weights_of_a_run_are_finite_numbers(weight, tmp_path):
    ak.onnx.inject(graph(tmp_path), adapter(), tmp_path / "slots.onnx", mode="slots")
    session = ak.onnx.Session(tmp_path / "slots.onnx", {"a": adapter()})
    with pytest.raises(UsageError, match="not a finite number"):
        session.run({"x": batch(2)}, {"a": weight})
    assert session.run({"x": batch(2)}, {"a": np.float32(0.5)}, outputs=[]) == {}


def test_rows_in_the_body_of_a_loop(tmp_path):
    """The body's input has no declared number of axes; here it has two."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "W"], ["new"], name="/fc/MatMul"),
         helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", 9, []),
         helper.make_tensor_value_info("h", 1, None)],
        [helper.make_tensor_value_info("d", 9, []), helper.make_tensor_value_info("new", 1, None)],
        [numpy_helper.from_array(np.ascontiguousarray(weight(Q).T), "W")],
    )  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", SIZE]) for name in "xy")
    times = numpy_helper.from_array(np.array(2, np.int64), "times")
    made = helper.make_graph([helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)], "g", [x], [y], [times])
    base = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), base)
    one = adapter(names=("fc",))
    ak.onnx.inject(base, one, tmp_path / "rows.onnx", mode="rows")
    (update,) = one.updates[Target("fc")]
    W = weight(Q).astype("f8")
    new = update.map(lambda leaf: leaf.numpy().astype("f8")).new_weight(W)
    session, rows = ak.onnx.Session(tmp_path / "rows.onnx", {"a": one}), batch(3)[:, 0]
    got = session.run({"x": rows}, ["a", None, "a"])["y"]
    want = np.stack([row @ used.T @ used.T for row, used in zip(rows.astype("f8"), (new, W, new), strict=True)])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(session.run({"x": rows})["y"].shape, (3, SIZE))

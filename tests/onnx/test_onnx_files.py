"""Graphs with numbers in several files or behind the links of a hub's cache, and sessions on graphs with slots."""

import gc
import os

import numpy as np
import onnx
import onnx_graphs as graphs
import onnx_ir
import pytest
import torch
from command_line import run
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from safetensors.torch import save_file

import adapterkit as ak
from adapterkit.errors import CheckFailed, Malformed, TargetNotFound, Unsupported, UsageError
from adapterkit.onnx import against_torch as oracle
from adapterkit.onnx import checking, model_file
from adapterkit.onnx import checking as rounding

X = np.random.default_rng(0).normal(size=(2, 20)).astype("f4")
W, V = (np.random.default_rng(n).normal(size=(20, 20)).astype("f4") for n in (1, 2))


def lora(name="q", rank=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 20, generator=g) / 4, torch.randn(20, rank, generator=g)
    return ak.Adapter({ak.Target(name): (ak.METHODS["lora"](A=A, B=B),)})


def delta(adapter, name="q"):
    return adapter.delta(name).numpy().T


def saved(folder, unused=0):
    """`x @ q @ k`, each weight in a data file of its own, and some bytes in one of them that no tensor is."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = [numpy_helper.from_array(array, name) for name, array in (("q.weight", W), ("k.weight", V))]
    for tensor, file, start in zip(stored, ("one.data", "two.data"), (unused, 0), strict=True):
        (folder / file).write_bytes(b"\1" * start + tensor.raw_data)
        set_external_data(tensor, file, offset=start, length=len(tensor.raw_data))
        tensor.ClearField("raw_data")
    nodes = [
        helper.make_node("MatMul", ["x", "q.weight"], ["h"], "/q/MatMul"),
        helper.make_node("MatMul", ["h", "k.weight"], ["y"], "/k/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 20]) for name in "xy")
    made = helper.make_graph(nodes, "g", [x], [y], stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def same(path, wanted):
    np.testing.assert_allclose(graphs.run(path, X), wanted, atol=1e-5 * abs(wanted).max())


def test_several_data_files_become_one_without_a_byte_too_many(tmp_path):
    path = saved(tmp_path / "base", unused=4096)
    wanted = X @ (W + delta(lora())) @ V
    merged = ak.onnx.merge(path, lora(), tmp_path / "merged.onnx")
    same(merged.out, wanted)
    assert sorted(os.listdir(tmp_path)) == ["base", "merged.onnx", "merged.onnx.data"]
    assert (tmp_path / "merged.onnx.data").stat().st_size == 2 * 20 * 20 * 4
    injected = ak.onnx.inject(path, lora(), tmp_path / "base" / "injected.onnx")
    same(injected.out, wanted)
    stored = onnx.load(injected.out, load_external_data=False).graph.initializer
    assert {"one.data", "two.data"} <= {tensor.external_data[0].value for tensor in stored if tensor.external_data}


def test_a_data_file_that_has_fewer_numbers_than_the_tensor(tmp_path):
    path = saved(tmp_path / "base")
    proto = onnx.load(path, load_external_data=False)
    for length in ("0", "1599"):
        for entry in proto.graph.initializer[0].external_data:
            entry.value = length if entry.key == "length" else entry.value
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(Malformed, match="is invalid") as raised:
            ak.onnx.inject(path, lora(), tmp_path / "base" / "out.onnx")
        assert raised.value.where == "q.weight"
    assert not (tmp_path / "base" / "out.onnx").exists()


@pytest.mark.parametrize("change", [ak.onnx.inject, ak.onnx.merge])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, MemoryError])
def test_what_could_not_be_checked_to_the_end_is_not_left(change, fault, tmp_path, monkeypatch):
    path, out = saved(tmp_path / "base"), tmp_path / "out" / "out.onnx"
    out.parent.mkdir()

    def stops(*_, **__):
        raise fault

    monkeypatch.setattr(checking, "_compared", stops)
    with pytest.raises(fault):
        change(path, lora(), out)
    assert os.listdir(out.parent) == []
    out.write_bytes(b"what was there")
    with pytest.raises(fault):
        change(path, lora(), out)
    assert os.listdir(out.parent) == ["out.onnx"]
    assert out.read_bytes() == b"what was there"


def test_a_base_whose_names_begin_with_a_wrappers(tmp_path):
    """Its numbers count all the same, equal ones and others."""
    path, out = saved(tmp_path / "base"), tmp_path / "out.onnx"
    for factor, names in ((1, ["model.q.weight"]), (-1, ["model.q.weight"]), (1, ["a.q.weight", "b.q.weight"])):
        held = {name: torch.tensor(W.T * factor).contiguous() for name in names}
        save_file(held, tmp_path / "base.safetensors")
        if factor < 0:
            with pytest.raises(TargetNotFound, match="differs from the base's weight"):
                ak.onnx.inject(path, lora(), out, base_weights=tmp_path / "base.safetensors")
        else:
            ak.onnx.inject(path, lora(), out, base_weights=tmp_path / "base.safetensors", check=False)


def test_outputs_that_no_number_is_far_from():
    inf, nan = np.array([1, np.inf]), np.array([1, np.nan])
    assert rounding.difference_of([inf, nan], [inf, nan]) == 0
    for one, other in ((inf, -inf), (inf, nan), (nan, inf), (nan, nan[:1] + nan[:1]), (nan, np.ones(2))):
        assert rounding.difference_of([one], [other]) == np.inf
    assert rounding.difference_of([np.array([1.0, 2.5])], [np.array([1.0, 2.0])]) == 0.25


def test_the_type_of_a_weight_that_no_node_tells(tmp_path):
    """Of 16 bits, and reshaped before it is read: merged it is of 16 bits still."""
    nodes = [
        helper.make_node("Reshape", ["q.weight", "sizes"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"], "/q/MatMul"),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 20]) for name in "xy")
    held = {"q.weight": W.astype("f2").reshape(-1), "sizes": np.array([20, 20])}
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    opset = [helper.make_opsetid("", 18)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], stored), opset_imports=opset, ir_version=10)
    path = graphs.saved(model, tmp_path / "model.onnx")
    for change in (ak.onnx.merge, ak.onnx.inject):
        report = change(path, lora(), tmp_path / "out.onnx")
        assert {tensor.data_type for tensor in onnx.load(report.out).graph.initializer} == {
            TensorProto.FLOAT16, TensorProto.INT64,
        }  # fmt: skip
        assert report.difference < 3e-2


def test_insides_of_sixteen_bits_behind_outputs_of_thirty_two(tmp_path, monkeypatch):
    """As converters to float16 leave them: the check allows what float16 rounds, and no more."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    path, out = tmp_path / "half.onnx", tmp_path / "out.onnx"
    half = convert_float_to_float16(onnx.load(saved(tmp_path / "base")), keep_io_types=True)
    path.write_bytes(half.SerializeToString())
    wanted = X @ (W + delta(lora())) @ V
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(path, lora(), out)
        got = graphs.run(out, X)
        assert got.dtype == np.float32
        assert 1e-5 < abs(got - wanted).max() / abs(wanted).max() < 3e-3
        assert 1e-5 < report.difference < 3e-3
    monkeypatch.setitem(rounding.TOLERANCE, "V", 1e-5)
    with pytest.raises(CheckFailed, match="outputs differ by"):
        ak.onnx.inject(path, lora(), out)


def test_a_model_in_memory_that_is_larger_than_any_file(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "LIMIT", 1 << 10)
    model = onnx_ir.load(graphs.saved(graphs.built("matmul")[2], tmp_path / "model.onnx"))
    model.graph.register_initializer(onnx_ir.Value(name="more", const_value=onnx_ir.tensor(W, name="more")))
    with pytest.raises(Unsupported, match="more than 2 GB in memory"):
        ak.onnx.inject(model, lora("0"), tmp_path / "out.onnx")


def test_few_numbers_move_into_the_model_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(model_file, "INLINE", 1 << 20)
    report = ak.onnx.merge(saved(tmp_path / "base"), lora(), tmp_path / "merged.onnx")
    same(report.out, X @ (W + delta(lora())) @ V)
    assert sorted(os.listdir(tmp_path)) == ["base", "merged.onnx"]


def test_a_model_in_a_hubs_cache(tmp_path):
    """Model and data are links into the blobs of one repository; those of another are not to be followed."""
    blobs, other = tmp_path / "models--a--b" / "blobs", tmp_path / "models--c--d" / "blobs"
    home = tmp_path / "models--a--b" / "snapshots" / "rev"
    home.mkdir(parents=True)
    other.mkdir(parents=True)
    saved(blobs)
    for number, name in enumerate(("model.onnx", "one.data", "two.data")):
        os.rename(blobs / name, blobs / f"{number}")
        (home / name).symlink_to(os.path.relpath(blobs / f"{number}", home))
    wanted = X @ (W + delta(lora())) @ V
    out = tmp_path / "out"
    out.mkdir()
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(home / "model.onnx", lora(), out / f"{change.__name__}.onnx")
        assert report.difference < 1e-5
        same(report.out, wanted)
    os.rename(blobs / "1", other / "1")
    (home / "one.data").unlink()
    (home / "one.data").symlink_to(os.path.relpath(other / "1", home))
    with pytest.raises(Malformed, match="link out of"):
        ak.onnx.inject(home / "model.onnx", lora(), out / "bad.onnx")
    assert not (out / "bad.onnx").exists()


def test_a_hard_link_may_be_anybodys_file(tmp_path):
    path = saved(tmp_path / "base")
    os.link(tmp_path / "base" / "one.data", tmp_path / "secret")
    for read in (lambda: ak.onnx.inject(path, lora(), tmp_path / "out.onnx"), lambda: ak.onnx.Session(path)):
        with pytest.raises(Malformed, match="hard link"):
            read()
    assert sorted(os.listdir(tmp_path)) == ["base", "secret"]


def test_operators_that_are_too_old(tmp_path):
    path, out = saved(tmp_path / "base"), tmp_path / "out.onnx"
    proto = onnx.load(path, load_external_data=False)
    proto.opset_import[0].version = 7
    path.write_bytes(proto.SerializeToString())
    wanted = X @ (W + delta(lora())) @ V
    for change in (ak.onnx.inject, ak.onnx.merge):  # Both are converted, and still share or rewrite the data files.
        report = change(path, lora(), tmp_path / "base" / f"{change.__name__}.onnx")
        same(report.out, wanted)
        stored = onnx.load(report.out, load_external_data=False)
        assert stored.opset_import[0].version == 13
        assert any(tensor.external_data for tensor in stored.graph.initializer)
    whole = onnx.load(path)
    whole.graph.node.append(helper.make_node("Upsample", ["y"], ["z"], scales=[1.0, 1.0]))
    whole.opset_import[0].version = 1
    path.write_bytes(whole.SerializeToString())
    with pytest.raises(Unsupported, match="operator set 1 cannot be converted to 13"):
        ak.onnx.inject(path, lora(), out)
    assert not out.exists()


@pytest.fixture
def session(tmp_path):
    path = saved(tmp_path / "base")
    ak.onnx.inject(path, lora(), tmp_path / "base" / "slots.onnx", mode="slots")
    return ak.onnx.Session(tmp_path / "base" / "slots.onnx")


def test_an_adapter_lives_as_long_as_the_session(session):
    first, second = lora(rank=3, seed=2), lora(rank=5, seed=3)
    for name, adapter in (("first", first), ("second", second)):
        session.load(name, adapter)
    wanted = {name: X @ (W + delta(a)) @ V for name, a in (("first", first), ("second", second))}
    del first, second
    gc.collect()
    for name in ("first", "second", "first"):
        np.testing.assert_allclose(session.run({"x": X}, name)["y"], wanted[name], atol=1e-5 * abs(wanted[name]).max())
    with pytest.raises(Unsupported, match="set twice: by an input and by the adapter"):
        session.run({"x": X, "q.lora.A": np.zeros((1, 20), "f4")}, "first")
    own = {key: value for key, (value, _) in session._loaded["first"].items()}
    np.testing.assert_array_equal(session.run({"x": X, **own})["y"], session.run({"x": X}, "first")["y"])


def test_bindings_have_the_adapters(session):
    """onnxruntime's own run options are ignored there."""
    session.load("one", lora(seed=4))
    for choice in (None, "one", {"one": 0.5}):
        binding = session.binding(choice)
        binding.bind_cpu_input("x", X)
        binding.bind_output("y")
        session.run_bound(binding)
        np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], session.run({"x": X}, choice)["y"])
    with pytest.raises(UsageError, match="cannot run the model"):
        session.run_bound(session.binding("one"))


def test_the_second_oracle_is_heard(tmp_path, monkeypatch):
    """Where it agrees with onnxruntime on the first graph, and not on the one that was written."""
    path, out = saved(tmp_path / "base"), tmp_path / "out.onnx"
    assert ak.onnx.inject(path, lora(), out).reference < 1e-6
    assert ak.onnx.merge(path, lora(), tmp_path / "merged.onnx").reference < 1e-6
    out.unlink()
    ask = oracle.reference_outputs

    def wrong(model, feeds):
        told = ask(model, feeds)
        return told if isinstance(model, bytes) else [2 * array for array in told]

    monkeypatch.setattr(checking, "reference_outputs", wrong)
    with pytest.raises(CheckFailed, match="reference implementation differ"):
        ak.onnx.inject(path, lora(), out)
    assert not out.exists()
    out.write_bytes(b"before")
    merged = tmp_path / "merged.onnx"
    merged.with_name("merged.onnx.data").unlink()
    before = merged.read_bytes()
    ak.write(lora(), tmp_path / "a.safetensors", format="adapterkit")
    for words, place, held in ((("inject", "--overwrite"), out, b"before"), (("merge", "--overwrite"), merged, before)):
        done = run(*words, path, tmp_path / "a.safetensors", "-o", place)
        assert done.exit_code == 1, done
        assert "reference implementation differ" in done.stderr
        assert place.read_bytes() == held
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "base", "merged.onnx", "one.data", "out.onnx", "two.data"]
    monkeypatch.setattr(checking, "reference_outputs", lambda model, feeds: [2 * a for a in ask(model, feeds)])
    assert ak.onnx.inject(path, lora(), out).reference is None


WRONG = {
    "adapters as a list": lambda session: ak.onnx.Session(session._path, ["a"]),
    "adapters with a number for a name": lambda session: ak.onnx.Session(session._path, {3: "a"}),
    "an adapter that is a list": lambda session: session.load("b", []),
    "no name": lambda session: session.load(None, "a"),
    "a list of names to unload": lambda session: session.unload([]),
    "one provider": lambda session: ak.onnx.Session(session._path, providers="cpu"),
    "a number of providers": lambda session: ak.onnx.Session(session._path, providers=3),
    "providers as numbers": lambda session: ak.onnx.Session(session._path, providers=[3]),
    "a provider of one": lambda session: ak.onnx.Session(session._path, providers=[("cpu",)]),
    "a provider with a number": lambda session: ak.onnx.Session(session._path, providers=[("cpu", 3)]),
    "inputs as a list": lambda session: session.run([X]),
    "no inputs": lambda session: session.run(None),
    "an input with a number for a name": lambda session: session.run({3: X}),
    "an input of unequal rows": lambda session: session.run({"x": [[1], [1, 2]]}),
    "a number as the adapter": lambda session: session.run({"x": X}, 3),
    "an adapter with a number for a name": lambda session: session.run({"x": X}, {3: 1.0}),
    "one output": lambda session: session.run({"x": X}, outputs="y"),
    "outputs as numbers": lambda session: session.run({"x": X}, outputs=[3]),
    "no name of an output": lambda session: session.run({"x": X}, outputs=[None]),
}


@pytest.mark.parametrize("call", WRONG)
def test_arguments_of_other_types_are_refused(session, call):
    with pytest.raises(UsageError) as raised:
        WRONG[call](session)
    assert raised.value.cure


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("way", ["constant", "slots", "merge"])
def test_constant_nodes_whose_numbers_are_in_a_data_file(way, opset, tmp_path):
    """`onnx.save(convert_attribute=True)` also moves the numbers of Constant nodes to the data file."""
    constants = [
        helper.make_node("Constant", [], [name], f"{name}_node", value=numpy_helper.from_array(array, name))
        for name, array in (("q.weight", W), ("b", V[:1]))
    ]
    nodes = [
        *constants,
        helper.make_node("MatMul", ["x", "q.weight"], ["h"], "/q/MatMul"),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 20]) for name in "xy")
    imports = [helper.make_opsetid("", opset)]
    made = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=imports, ir_version=8)
    (tmp_path / "out").mkdir()
    words = {"save_as_external_data": True, "location": "model.data", "size_threshold": 0, "convert_attribute": True}
    onnx.save(made, tmp_path / "model.onnx", **words)
    same(tmp_path / "model.onnx", X @ W + V[:1])
    adapter, out = lora(), tmp_path / "out" / "model.onnx"
    if way == "merge":
        ak.onnx.merge(tmp_path / "model.onnx", adapter, out)
    else:
        ak.onnx.inject(tmp_path / "model.onnx", adapter, out, mode=way)
    wanted = X @ (W + delta(adapter)) + V[:1]
    if way == "slots":
        same(out, X @ W + V[:1])
        got = ak.onnx.Session(out, {"a": adapter}).run({"x": X}, "a")["y"]
        np.testing.assert_allclose(got, wanted, atol=1e-5 * abs(wanted).max())
    else:
        same(out, wanted)


def test_a_session_loads_adapters_for_the_graph_that_it_runs(tmp_path):
    """The graph is read once, not once for each of many adapters, so a file that replaces it later has no effect."""
    model = saved(tmp_path / "model")
    ak.onnx.inject(model, lora(), model.with_name("slots.onnx"), mode="slots")
    session = ak.onnx.Session(model.with_name("slots.onnx"))
    model.with_name("slots.onnx").write_bytes(model.read_bytes())
    for seed in (2, 3):
        adapter = lora(seed=seed, rank=seed)
        session.load(f"a{seed}", adapter)
        wanted = X @ (W + delta(adapter)) @ V
        np.testing.assert_allclose(session.run({"x": X}, f"a{seed}")["y"], wanted, atol=1e-5 * abs(wanted).max())
    with pytest.raises(TargetNotFound, match=r"slots\.onnx: k: the model has no slots for this target"):
        session.load("k", lora("k"))

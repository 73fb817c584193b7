"""Slots filled as users fill them, by a `Session` or onnxruntime's own `LoraAdapter`, against torch with PEFT."""

import json
import warnings

import numpy as np
import onnx
import onnx_graphs as graphs
import onnxruntime
import peft
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import adapterkit as ak
from adapterkit.errors import CheckFailed, Malformed, TargetNotFound, Unsupported, UsageError
from adapterkit.methods.vera import VeRA
from adapterkit.onnx import injecting

X = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("f4")


class Reused(nn.Module):
    """One layer that is called three times, and one that is called once."""

    def __init__(self):
        super().__init__()
        self.turn, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.turn(x))
        return self.head(x)


def with_peft(model, folder, targets, seed=1, rank=2, alpha=5):
    """A model with PEFT's own LoRA, and its folder."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(target_modules=targets, r=rank, lora_alpha=alpha, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers' models by a name that they have given up.
        adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(folder)
    return adapted


def exported(model, args, path, dynamo, **words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        more = {"external_data": False, "verbose": False} if dynamo else {"opset_version": 17}
        torch.onnx.export(model.eval(), args, str(path), dynamo=dynamo, **more, **words)
    return path


def by_onnxruntime(path, adapter, feeds):
    """The first output, with onnxruntime's own way to load an adapter."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    held, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    held.Load(str(adapter))
    options.add_active_adapter(held)
    return session.run(None, feeds, options)[0]


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_module_that_is_called_again_has_one_slot_a_tensor(dynamo, tmp_path, close):
    torch.manual_seed(0)
    base = exported(Reused(), (torch.tensor(X),), tmp_path / "base.onnx", dynamo, input_names=["x"])
    torch.manual_seed(0)
    wanted = with_peft(Reused(), tmp_path / "one", ["turn", "head"])(torch.tensor(X)).detach()
    torch.manual_seed(0)
    other = with_peft(Reused(), tmp_path / "two", ["turn", "head"], seed=2, rank=3)(torch.tensor(X)).detach()
    report = ak.onnx.inject(base, tmp_path / "one", tmp_path / "slots.onnx", mode="slots")
    session = ak.onnx.Session(report.out, {"one": tmp_path / "one", "two": tmp_path / "two"})
    assert len(session.slots) == 6
    assert {file.name for file in report.files} == {"slots.onnx", "slots.onnx_adapter", "slots.onnx_adapter.json"}
    for name, told in (("one", wanted), ("two", other)):
        close(torch.tensor(next(iter(session.run({"x": X}, name).values()))), told)
    close(torch.tensor(by_onnxruntime(report.out, report.out.with_suffix(".onnx_adapter"), {"x": X})), wanted)
    assert report.difference < 1e-5


def test_albert(tmp_path, close):
    """All of its layers are one."""
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=40, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip

    def model():
        torch.manual_seed(0)
        return transformers.AlbertModel(config).eval()

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.albert = model()

        def forward(self, ids, mask):
            return self.albert(input_ids=ids, attention_mask=mask).last_hidden_state

    ids, mask = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]]), torch.ones(2, 4, dtype=torch.int64)
    base = exported(Called(), (ids, mask), tmp_path / "base.onnx", True, input_names=["ids", "mask"])
    adapted = with_peft(model(), tmp_path / "one", ["query", "ffn"])
    with torch.no_grad():
        wanted = adapted(input_ids=ids, attention_mask=mask).last_hidden_state
    report = ak.onnx.inject(base, tmp_path / "one", tmp_path / "slots.onnx", mode="slots")
    assert len(report.found) == 2
    session = ak.onnx.Session(report.out, {"one": tmp_path / "one"})
    assert len(session.slots) == 6
    feeds = {"ids": ids.numpy(), "mask": mask.numpy()}
    close(torch.tensor(next(iter(session.run(feeds, "one").values()))), wanted)


def test_a_session_and_a_file_of_slots_take_an_adapter_under_other_names(slots, tmp_path):
    path, adapter = slots, ak.read(tmp_path / "one")
    ((own, given),) = adapter.updates.items()
    renamed = ak.Adapter({ak.Target("odd.name", own.layout): given})
    session = ak.onnx.Session(path)
    with pytest.raises(TargetNotFound):
        session.load("one", renamed)
    session.load("one", adapter)
    session.load("two", renamed, rename=f"odd.name={own.path}")
    one, two = (session._loaded[name] for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key][0], two[key][0]) for key in one)
    files = tmp_path / "a.onnx_adapter", tmp_path / "b.onnx_adapter"
    ak.onnx.write_adapter(path, adapter, files[0])
    ak.onnx.write_adapter(path, renamed, files[1], rename=f"odd.name={own.path}")
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(UsageError, match="no targets to rename"):
        session.load("three", files[0], rename="a=b")


@pytest.mark.parametrize("inside", [False, True])
def test_both_branches_of_an_if(inside, tmp_path):
    """As merged decoders have them: weights outside of the branches, or in each."""
    W = np.random.default_rng(1).normal(size=(16, 8)).astype("f4")
    stored = [numpy_helper.from_array(W, "w")]

    def branch(name, op):
        out = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        own = numpy_helper.from_array(W, f"{name}_w")
        nodes = [
            helper.make_node("MatMul", ["x", own.name if inside else "w"], [f"{name}_h"], "/q/MatMul"),
            helper.make_node(op, [f"{name}_h"], [out.name]),
        ]
        return helper.make_graph(nodes, name, [], [out], [own] if inside else [])

    branches = {"then_branch": branch("then", "Neg"), "else_branch": branch("else", "Identity")}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 16])
    choice = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 8])
    node = helper.make_node("If", ["c"], ["y"], **branches)
    graph = helper.make_graph([node], "g", [x, choice], [y], [] if inside else stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / "base.onnx").write_bytes(model.SerializeToString())
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, 16, generator=g), torch.randn(8, 2, generator=g)
    adapter = ak.Adapter({ak.Target("q"): (ak.METHODS["lora"](A=A, B=B, scaling=0.5),)})
    report = ak.onnx.inject(tmp_path / "base.onnx", adapter, tmp_path / "slots.onnx", mode="slots")
    session = ak.onnx.Session(report.out, {"one": adapter})
    assert set(session.slots) == {"q.lora.A", "q.lora.B", "q.lora.scaling"}
    V = W + 0.5 * (B @ A).numpy().T
    for sign, chosen in ((-1, True), (1, False)):
        feeds = {"x": X, "c": np.array(chosen)}
        for weight, name in ((W, None), (V, "one")):
            np.testing.assert_allclose(session.run(feeds, name)["y"], sign * (X @ weight), rtol=1e-4, atol=1e-4)
        got = by_onnxruntime(report.out, report.out.with_suffix(".onnx_adapter"), feeds)
        np.testing.assert_allclose(got, sign * (X @ V), rtol=1e-4, atol=1e-4)


def test_empty_slots_of_a_convolution_have_a_channel(tmp_path):
    """onnxruntime leaves the output of a convolution over no channels as its memory was."""
    path = graphs.saved(graphs.built("conv1d")[2], tmp_path / "base.onnx")
    adapter = ak.Adapter({ak.Target("0"): (ak.METHODS["lora"](A=torch.randn(2, 16, 3), B=torch.randn(8, 2)),)})
    report = ak.onnx.inject(path, adapter, tmp_path / "slots.onnx", mode="slots")
    held = {i.name: numpy_helper.to_array(i) for i in onnx.load(report.out).graph.initializer}
    assert (held["0.lora.A"].shape, held["0.lora.B"].shape) == ((1, 16, 3), (8, 1))
    x = np.random.default_rng(0).normal(size=(2, 16, 6)).astype("f4")
    np.testing.assert_allclose(graphs.run(report.out, x), graphs.run(path, x), atol=1e-5)


@pytest.fixture
def slots(tmp_path):
    """The reused module with slots, and the adapter that it has them for."""
    torch.manual_seed(0)
    base = exported(Reused(), (torch.tensor(X),), tmp_path / "base.onnx", False, input_names=["x"])
    with_peft(Reused(), tmp_path / "one", ["turn"])
    ak.onnx.inject(base, tmp_path / "one", tmp_path / "slots.onnx", mode="slots")
    return tmp_path / "slots.onnx"


def test_the_check_sees_a_slot_that_nothing_fills(slots, tmp_path, monkeypatch):
    """A fault of the writer of the adapter file is found by the check, and what was there before stays."""
    before = {path.name: path.read_bytes() for path in tmp_path.glob("slots.*")}

    def lacking(model, adapter, out, **options):
        rest = ak.Adapter({t: tuple(u.replace(scaling=1.0) for u in us) for t, us in adapter.updates.items()})
        return real(model, rest, out, **options)

    real = injecting.write_adapter
    monkeypatch.setattr(injecting, "write_adapter", lacking)
    with pytest.raises(CheckFailed, match="outputs differ by"):
        ak.onnx.inject(tmp_path / "base.onnx", tmp_path / "one", slots, mode="slots")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("slots.*")} == before
    with pytest.raises(CheckFailed, match="outputs differ by"):
        ak.onnx.inject(tmp_path / "base.onnx", tmp_path / "one", tmp_path / "new.onnx", mode="slots")
    assert not list(tmp_path.glob("new*"))


def test_the_adapter_is_not_written_over_its_own_file(slots, tmp_path):
    before = (tmp_path / "slots.onnx_adapter").read_bytes()
    with pytest.raises(UsageError, match="would replace this file"):
        ak.onnx.inject(tmp_path / "base.onnx", tmp_path / "slots.onnx_adapter", slots, mode="slots")
    with pytest.raises(UsageError, match="would replace this file"):
        ak.onnx.inject(tmp_path / "base.onnx", tmp_path / "one", tmp_path / "a.onnx_adapter", mode="slots")
    assert (tmp_path / "slots.onnx_adapter").read_bytes() == before


def test_what_does_not_go_into_the_slots_is_refused(slots, tmp_path):
    session = ak.onnx.Session(slots)
    down, up = torch.randn(3, 16), torch.randn(16, 3)

    def bottleneck(kind):
        return ak.Adapter({ak.Target("turn"): (ak.METHODS["bottleneck"](down=down, up=up, non_linearity=kind),)})

    with_peft(Reused(), tmp_path / "both", ["turn", "head"])
    for adapter, error, match in (
        (tmp_path / "both", TargetNotFound, r"no slots for this target.*--mode slots"),
        (bottleneck("relu"), TargetNotFound, "no slots for bottleneck at this target; it has slots for lora"),
    ):
        with pytest.raises(error, match=match):
            session.load("one", adapter)
    ak.onnx.inject(tmp_path / "base.onnx", bottleneck("relu"), tmp_path / "relu.onnx", mode="slots")
    ak.onnx.fit(tmp_path / "relu.onnx", bottleneck("relu"))
    with pytest.raises(Unsupported, match=r"non_linearity is 'gelu' in the adapter, but 'relu' in the model's nodes"):
        ak.onnx.fit(tmp_path / "relu.onnx", bottleneck("gelu"))
    with pytest.raises(TargetNotFound, match="lists no slots"):
        ak.onnx.fit(tmp_path / "base.onnx", tmp_path / "one")


def test_a_damaged_list_of_slots(slots, tmp_path):
    proto = onnx.load(slots)
    (note,) = (entry for entry in proto.metadata_props if entry.key == "adapterkit.slots")
    held = json.loads(note.value)
    fields = {"A": "turn.lora.A", "B": "turn.lora.B", "scaling": "turn.lora.scaling"}
    assert held[0]["updates"][0][2] == fields
    held[0]["updates"][0][2]["A"] = "other"
    short = json.dumps([{"asked": ["turn", [5]], "target": ["turn", None], "updates": []}])
    for value, match in (
        ("[", "damaged"), ("[1]", "damaged"), (short, "damaged"), ("{}", None), (json.dumps(held), "slot 'other'")
    ):  # fmt: skip
        note.value = value
        (tmp_path / "bad.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(Malformed if match else TargetNotFound, match=match):
            ak.onnx.fit(tmp_path / "bad.onnx", tmp_path / "one")


@pytest.mark.parametrize("targets", ["qv", "q", "v"])
@pytest.mark.parametrize("mode", ["slots", "inputs"])
def test_vera_changes_only_some_of_the_layers_that_share_its_projections(tmp_path, mode, targets):
    rng = np.random.default_rng(5)
    W = {name: rng.normal(size=(4, 4)).astype("f4") for name in "qv"}
    A, B = torch.randn(3, 4), torch.randn(4, 3)

    def adapter(names):
        return ak.Adapter({ak.Target(p): (VeRA(A=A, B=B, b=torch.randn(4), d=torch.randn(3)),) for p in names})

    nodes = [helper.make_node("MatMul", ["x", "q.weight"], ["h"]), helper.make_node("MatMul", ["h", "v.weight"], ["y"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    weights = [numpy_helper.from_array(value.T.copy(), f"{name}.weight") for name, value in W.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    ak.onnx.inject(tmp_path / "g.onnx", adapter("qv"), tmp_path / "s.onnx", mode=mode)
    some, x = adapter(targets), rng.normal(size=(2, 4)).astype("f4")
    wanted = x
    for name in "qv":
        (update,) = some.updates.get(ak.Target(name), (None,))
        change = 0 if update is None else (update.b[:, None] * B @ (update.d[:, None] * A)).numpy()
        wanted = wanted @ (W[name] + change).T
    file = ak.onnx.write_adapter(tmp_path / "s.onnx", some, tmp_path / "some.onnx_adapter")
    assert {target.path for target in ak.read(file).updates} == set(targets)
    session = ak.onnx.Session(tmp_path / "s.onnx", {"object": some, "file": file})
    for name in session.adapters:
        np.testing.assert_allclose(session.run({"x": x}, name)["y"], wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(session.run({"x": x})["y"], x @ W["q"].T @ W["v"].T, rtol=1e-4, atol=1e-4)

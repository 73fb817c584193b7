"""Adapters in graphs that torch exported: every target found, the graph computes what the injected model does."""

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_graphs as graphs
import onnxruntime
import pytest
import torch
from command_line import record, run
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import TargetNotFound
from adapterkit.methods import METHODS

EXPORTS = {
    "dynamo": {"dynamo": True},
    "unoptimized": {"dynamo": True, "optimize": False},
    "legacy": {"dynamo": False, "opset_version": 17},
    "unfolded": {"dynamo": False, "opset_version": 17, "do_constant_folding": False},
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return torch.softmax(self.q_proj(x) @ x.transpose(1, 2), -1) @ self.v_proj(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.up, self.down = Attention(), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = x + self.self_attn(x)
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Blocks of which two projections hold equal numbers, a head that is called twice, a convolution, an embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.layers[1].up.weight.copy_(self.layers[0].up.weight)

    def forward(self, ids):
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x) + self.head(x[:, :1])


def lora(out, into, *kernel, seed=0):
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, into, *kernel, generator=g), torch.randn(out, 2, generator=g)
    return METHODS["lora"](A=A, B=B, scaling=0.25)


def whole():
    """An adapter of every layer, of several methods."""
    plain = lora(8, 8, seed=3)
    first = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"
    return Adapter(
        {
            Target("embed", "in out *k"): (lora(8, 16),),
            Target("conv"): (lora(8, 8, 3, seed=1),),
            Target(first[0]): (METHODS["dora"](A=plain.A, B=plain.B, magnitude=torch.rand(8) + 0.5),),
            Target(first[1]): (METHODS["ia3"](l=torch.rand(8) + 0.5),),
            Target("layers.0.up"): (lora(12, 8, seed=4), METHODS["ia3"](l=torch.rand(12) + 0.5)),
            Target("layers.1.down"): (lora(8, 12, seed=5),),
            Target("head"): (lora(5, 8, seed=6),),
        }
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The model, an input, and its graph from every exporter."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("exports"), Model().eval()
    ids = torch.tensor([[0, 3, 15], [7, 7, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in EXPORTS.items():
            words = {"external_data": False, "verbose": False} if options["dynamo"] else {}
            torch.onnx.export(model, (ids,), str(folder / f"{name}.onnx"), input_names=["ids"], **options, **words)
    session = onnxruntime.SessionOptions()
    session.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session.optimized_model_filepath = str(folder / "session.onnx")
    onnxruntime.InferenceSession(str(folder / "dynamo.onnx"), session, providers=["CPUExecutionProvider"])
    save_file(model.state_dict(), folder / "base.safetensors")
    return folder, model, ids


def test_the_exports_are_those_that_names_get_lost_in(exported):
    folder, _, _ = exported
    names = {i.name for i in onnx.load(folder / "dynamo.onnx").graph.initializer}
    assert "layers.0.up.weight" not in names
    assert "layers.0.up.weight" in {i.name for i in onnx.load(folder / "unoptimized.onnx").graph.initializer}
    assert any(i.name.startswith("onnx::MatMul") for i in onnx.load(folder / "legacy.onnx").graph.initializer)
    assert not any(n.metadata_props for n in onnx.load(folder / "session.onnx").graph.node)


@pytest.mark.parametrize("name", EXPORTS)
def test_every_target_is_found_and_computes_as_in_torch(name, exported, tmp_path, close):
    folder, model, ids = exported
    path, adapter, out = folder / f"{name}.onnx", whole(), tmp_path / "out.onnx"
    before, y = path.read_bytes(), model(ids)
    report = ak.onnx.inject(path, adapter, out)
    assert report.difference is not None
    assert len(report.found) == len(adapter.updates)
    assert len(next(p for p in report.found if p.target.path == "head").spots) == 2
    handle = ak.torch.inject(model, adapter)
    wanted = model(ids)
    handle.remove()
    close(torch.tensor(graphs.run(out, ids)), wanted, y)
    ak.onnx.merge(path, adapter, tmp_path / "merged.onnx")
    close(torch.tensor(graphs.run(tmp_path / "merged.onnx", ids)), wanted, y)
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == before == path.read_bytes()


def test_equal_weights_that_are_stored_once_change_apart(exported, tmp_path, close):
    folder, model, ids = exported
    adapter = Adapter({Target("layers.1.up"): (lora(12, 8, seed=7),)})
    handle = ak.torch.inject(model, adapter)
    wanted = model(ids)
    handle.remove()
    for name in EXPORTS:
        for change in (ak.onnx.inject, ak.onnx.merge):
            report = change(folder / f"{name}.onnx", adapter, tmp_path / f"{name}{change.__name__}.onnx")
            assert len(report.found[0].spots) == 1
            close(torch.tensor(graphs.run(report.out, ids)), wanted)


def test_names_that_are_lost_are_found_by_numbers(exported, tmp_path, close):
    folder, model, ids = exported
    names = {"layers.0.self_attn.q_proj": (8, 8), "layers.0.self_attn.v_proj": (8, 8), "layers.1.down": (8, 12)}
    adapter = Adapter({Target(name): (lora(*sizes),) for name, sizes in names.items()})
    path = folder / "session.onnx"
    assert {"FusedMatMul", "Gemm"} <= {node.op_type for node in onnx.load(path).graph.node}
    with pytest.raises(TargetNotFound, match="by their values, pass the base"):
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx")
    report = ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=folder / "base.safetensors")
    assert {place.method for place in report.found} == {"values"}
    handle = ak.torch.inject(model, adapter)
    close(torch.tensor(graphs.run(tmp_path / "out.onnx", ids)), model(ids))
    ak.onnx.merge(path, adapter, tmp_path / "merged.onnx", base_weights=folder / "base.safetensors")
    close(torch.tensor(graphs.run(tmp_path / "merged.onnx", ids)), model(ids))
    handle.remove()
    twin = Adapter({Target("layers.1.up"): (lora(12, 8),)})
    with pytest.raises(TargetNotFound, match=r"2 nodes have this weight, and the base.s layers\.0\.up\.weight"):
        ak.onnx.inject(path, twin, tmp_path / "twin.onnx", base_weights=folder / "base.safetensors")


def test_another_checkpoint_is_not_the_base(exported, tmp_path):
    folder, _, _ = exported
    torch.manual_seed(9)
    save_file(Model().state_dict(), tmp_path / "other.safetensors")
    adapter = Adapter({Target("layers.1.down"): (lora(8, 12),)})
    for name in ("session", "dynamo"):
        with pytest.raises(TargetNotFound, match=r"right one|exported from"):
            ak.onnx.inject(
                folder / f"{name}.onnx", adapter, tmp_path / "o.onnx", base_weights=tmp_path / "other.safetensors"
            )
    assert not (tmp_path / "o.onnx").exists()


def test_the_map_of_a_graph(exported, tmp_path):
    folder, model, _ = exported
    wanted = [name.removesuffix(".weight") for name, tensor in model.state_dict().items() if tensor.dim() > 1]
    for name in (*EXPORTS, "session"):
        found = record("inspect", folder / f"{name}.onnx", "--base-weights", folder / "base.safetensors")
        told = {place["target"]: place for place in found["layers"]}
        assert sorted(place["target"] for place in found["layers"]) == sorted(wanted)
        assert {name: place["note"] for name, place in told.items() if place["confidence"] != 1} == {}
        assert len(told["head"]["nodes"]) == 2
        assert told["layers.0.up"]["shape"] == [12, 8]
    for name in EXPORTS:
        named = record("inspect", folder / f"{name}.onnx")["layers"]
        assert {"head", "conv", "embed", "layers.1.down"} <= {place["target"] for place in named}
    torch.manual_seed(9)
    save_file(Model().state_dict(), tmp_path / "other.safetensors")
    lost = record("inspect", folder / "session.onnx", "--base-weights", tmp_path / "other.safetensors")["layers"]
    assert {place["method"] for place in lost if place["target"] == "layers.1.down"} == {None}
    assert run("inspect", folder / "dynamo.onnx").exit_code == 0
    assert run("inspect", tmp_path / "other.safetensors", "--base-weights", folder).exit_code == 2


def test_names_of_wrappers_and_of_attention_differ(exported, tmp_path):
    folder, _, _ = exported
    adapter = Adapter({Target("model.layers.0.attn.q_proj"): (lora(8, 8),)})
    with pytest.raises(TargetNotFound):
        ak.onnx.inject(folder / "dynamo.onnx", Adapter({Target("layers.0.attn.k_proj"): (lora(8, 8),)}), tmp_path / "o")
    report = ak.onnx.inject(folder / "dynamo.onnx", adapter, tmp_path / "out.onnx")
    assert report.found[0].target.path == "layers.0.self_attn.q_proj"


def converted():
    root = Path(onnx.__file__).parent / "backend" / "test" / "data" / "pytorch-converted"
    kinds = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"}
    for folder in sorted(root.iterdir()):
        model = onnx.load(folder / "model.onnx")
        if model.graph.initializer and {node.op_type for node in model.graph.node} & kinds:
            yield pytest.param(folder, id=folder.name.removeprefix("test_"))


def test_there_are_as_many_converted_models_as_there_were():
    assert len(list(converted())) == 32


@pytest.mark.parametrize("folder", list(converted()))
def test_converted_models(folder, tmp_path, close):
    """A change of nothing gives the recorded outputs, a random one what onnx's converter and merged weights give."""
    path, out = folder / "model.onnx", tmp_path / "out.onnx"
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if len(i.dims) > 1)
    x, y = (
        numpy_helper.to_array(onnx.load_tensor(folder / "test_data_set_0" / f"{name}_0.pb"))
        for name in ("input", "output")
    )
    W = numpy_helper.to_array(weight)
    D = torch.tensor(np.random.default_rng(0).normal(size=W.shape).astype("f4"))
    for change in (0 * D, D):
        update = METHODS["dense"](D=change)
        adapter = Adapter({Target(weight.name): (update,)})
        ak.onnx.inject(path, adapter, out)
        edited = onnx.ModelProto.FromString(path.read_bytes())
        stored = next(i for i in edited.graph.initializer if i.name == weight.name)
        stored.CopyFrom(numpy_helper.from_array(W + change.numpy(), weight.name))
        modern = onnx.version_converter.convert_version(edited, 13).SerializeToString()
        wanted = y if change.abs().max() == 0 else graphs.run(modern, x)
        close(torch.tensor(graphs.run(out, x)), torch.tensor(wanted), tolerance=1e-5)
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("length", [1, 3])
def test_heads_that_a_reshape_joins_before_a_layer(length, tmp_path, close):
    """torch's MultiheadAttention: a Reshape joins the heads to the input of `out_proj`, which becomes a Gemm."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).eval()
    model.forward = lambda x: model["attn"](x[:, :length], x, x)[0]
    x, path = torch.randn(2, 4, 8), tmp_path / "base.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    update, before = lora(8, 8), model(x)
    adapter = Adapter({Target("attn.out_proj"): (update,)})
    with torch.no_grad():
        model["attn"].out_proj.weight += 0.25 * update.B @ update.A
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(path, adapter, tmp_path / "out.onnx")
        assert report.difference is not None
        close(torch.tensor(graphs.run(report.out, x)), model(x), before)


@pytest.mark.parametrize("apart", [False, True])
def test_numbers_of_calls_and_of_modules(apart, tmp_path, close):
    """torch's older exporter calls the second call of `fc` `fc_1`, which may also be a module with equal weights."""
    torch.manual_seed(0)
    first, path = nn.Linear(8, 8, bias=False), tmp_path / "base.onnx"
    second = copy.deepcopy(first) if apart else first
    model = nn.ModuleDict({"fc": first, **({"fc_1": second} if apart else {})}).eval()
    model.forward = lambda x: second(torch.relu(first(x)))
    x = torch.randn(2, 3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=17)
    names = [place.target for place in ak.onnx.layers(path)]
    assert "fc" in names
    assert apart or names == ["fc"]
    updates = {name: lora(8, 8, seed=seed) for seed, name in enumerate(dict(model.named_children()))}
    before = model(x)
    with torch.no_grad():
        for name, update in updates.items():
            model[name].weight += 0.25 * update.B @ update.A
    adapter = Adapter({Target(name): (update,) for name, update in updates.items()})
    for change in (ak.onnx.inject, ak.onnx.merge):
        close(torch.tensor(graphs.run(change(path, adapter, tmp_path / "out.onnx").out, x)), model(x), before)


class Cell(nn.Module):
    """A recurrent cell that a loop calls; its weights have equal shapes, and neither is called `weight`."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x):
        h = c = x[:, 0]
        for t in range(1, x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return h


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_module_with_several_weights(dynamo, tmp_path, close):
    torch.manual_seed(0)
    model, x, path = Cell().eval(), torch.randn(2, 4, 8), tmp_path / "base.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), **EXPORTS["dynamo" if dynamo else "legacy"])
    names = {place.target for place in ak.onnx.layers(path)}
    assert names == {"cell.weight_ih", "cell.weight_hh"}
    update, before = lora(32, 8), model(x).detach()
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(TargetNotFound, match="several weights") as error:
            change(path, Adapter({Target("cell"): (update,)}), tmp_path / "out.onnx")
        assert all(name in (error.value.cure or "") for name in names)
        for name in names:
            changed = copy.deepcopy(model)
            with torch.no_grad():
                changed.get_parameter(name).add_(0.25 * update.B @ update.A)
            report = change(path, Adapter({Target(name): (update,)}), tmp_path / "out.onnx")
            close(torch.tensor(graphs.run(report.out, x)), changed(x).detach(), before)

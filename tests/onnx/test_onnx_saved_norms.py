"""Norms as targets: their weights and biases replaced, as constants, slots and merged, against torch."""

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, TargetNotFound, Unsupported
from adapterkit.methods import METHODS
from adapterkit.onnx.norm_layers import norms_at

WIDE = 8
X = torch.randn(2, 3, WIDE, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Two norms of equal weights, which exporters store once, and a layer between them."""

    def __init__(self, kind):
        super().__init__()
        self.first, self.last = kind(WIDE), kind(WIDE)
        self.q = nn.Linear(WIDE, WIDE)

    def forward(self, x):
        return self.last(self.q(self.first(x)))


class Mean(nn.Module):
    """Llama's norm, which exporters write as several nodes."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def exported(kind, folder, dynamo):
    torch.manual_seed(0)
    model = Block(kind).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (X,), folder / "base.onnx", dynamo=dynamo, external_data=False, input_names=["x"],
            opset_version=18 if dynamo else 17, verbose=False,
        )  # fmt: skip
    save_file(model.state_dict(), folder / "base.safetensors")
    return model, folder / "base.onnx"


def ran(path, **feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X.numpy(), **feeds})[0]


def replaced(model, name):
    """Return an adapter that replaces a norm's parameters, and the output of the torch model with them."""
    rng = torch.Generator().manual_seed(1)
    held = {key: torch.randn(WIDE, generator=rng) for key, _ in model.get_submodule(name).named_parameters()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for key, value in held.items():
            getattr(model.get_submodule(name), key).copy_(value)
        wanted = model(X).numpy()
        model.load_state_dict(before)
    return Adapter({Target(name): (METHODS["replacement"](**held),)}), wanted


class Stages(nn.Module):
    """A last norm, whose name is the end of another norm's name, as in Swin; torch's exporter drops the word `down`."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.ModuleDict({"norm": nn.LayerNorm(WIDE)}), nn.LayerNorm(WIDE)
        nn.init.normal_(self.down["norm"].weight)

    def forward(self, x):
        return self.norm(self.down["norm"](x).tanh())


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDE)

    def forward(self, x):
        return self.norm(self.norm(x).tanh())


@pytest.mark.parametrize("given", [False, True], ids=["no base", "base"])
@pytest.mark.parametrize(("kind", "name"), [(Stages, "norm"), (Stages, "down.norm"), (Twice, "norm")])
def test_norms_whose_names_in_the_graph_are_not_whole(kind, name, given, tmp_path):
    model, path, base = kind().eval(), tmp_path / "model.onnx", tmp_path / "base.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (X,), path, dynamo=False, input_names=["x"], opset_version=17)
    save_file(model.state_dict(), base)
    adapter, wanted = replaced(model, name)
    ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=base if given else None)
    np.testing.assert_allclose(ran(tmp_path / "out.onnx"), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False], ids=["newer", "older"])
@pytest.mark.parametrize("kind", [nn.LayerNorm, Mean])
@pytest.mark.parametrize("name", ["first", "last"])
def test_saved_norms(kind, name, dynamo, tmp_path):
    model, path = exported(kind, tmp_path, dynamo)
    adapter, wanted = replaced(model, name)
    before, out, base = ran(path), tmp_path / "out.onnx", tmp_path / "base.safetensors"
    assert abs(wanted - before).max() > 0.5
    for mode in ("constant", "slots"):
        report = ak.onnx.inject(path, adapter, out, mode=mode, base_weights=base)
        assert report.difference < 1e-5
        feeds = ak.onnx.fit(out, adapter, base_weights=base) if mode == "slots" else {}
        np.testing.assert_allclose(ran(out, **feeds), wanted, atol=1e-5)
    np.testing.assert_array_equal(ran(out), before)
    report = ak.onnx.merge(path, adapter, out, base_weights=base)
    assert report.difference < 1e-5
    np.testing.assert_allclose(ran(out), wanted, atol=1e-5)


def test_what_tells_a_norm(tmp_path):
    model, path = exported(Mean, tmp_path, True)
    adapter, _ = replaced(model, "first")
    with pytest.raises(Unsupported, match="may store this norm's weight as 1 \\+ weight"):
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx")
    held = model.state_dict()
    save_file({**held, "first.weight": held["first.weight"] - 1}, tmp_path / "shifted.safetensors")
    with pytest.raises(Unsupported, match="stores this norm's weight as 1 \\+ weight"):
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "shifted.safetensors")
    save_file({**held, "first.weight": held["first.weight"] * 3}, tmp_path / "other.safetensors")
    with pytest.raises(TargetNotFound, match="the norm's weight differs from the base's weight"):
        ak.onnx.merge(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "other.safetensors")
    other = Adapter({Target("decoder.first"): adapter.updates[Target("first")]})
    with pytest.raises(
        TargetNotFound, match="no layer of the graph has this weight"
    ):  # The graph may be that of the encoder.
        ak.onnx.inject(path, other, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors")
    wide = Adapter({Target("first"): (METHODS["replacement"](weight=torch.ones(WIDE + 1)),)})
    with pytest.raises(ShapeMismatch, match="9"):
        ak.onnx.inject(path, wide, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("mode", ["constant", "slots", "merge"])
@pytest.mark.parametrize(
    "operator",
    ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization"],
)
def test_norms_that_an_optimizer_fused(tmp_path, operator, mode):
    """The vector keeps its name, and only one node reads it."""
    rng, skips, shifts = np.random.default_rng(0), operator.startswith("Skip"), "Simplified" not in operator
    names = ["first.weight", "first.bias"][: 1 + shifts]
    held = {name: rng.normal(size=WIDE).astype("f4") for name in names}
    domain = "com.microsoft" if skips else ""
    node = helper.make_node(
        operator, ["x", *(["x"] if skips else []), *held], ["y"], "norm_0", domain=domain, epsilon=1e-6
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, WIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in held.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "base.onnx")
    save_file({name: torch.from_numpy(array) for name, array in held.items()}, tmp_path / "base.safetensors")
    new = {name.removeprefix("first."): torch.randn(WIDE) for name in names}
    adapter = Adapter({Target("first"): (METHODS["replacement"](**new),)})
    x = 2 * X if skips else X
    if shifts:
        wanted = torch.nn.functional.layer_norm(x, (WIDE,), new["weight"], new["bias"], 1e-6).numpy()
    else:
        wanted = torch.nn.functional.rms_norm(x, (WIDE,), new["weight"], 1e-6).numpy()
    out, base = tmp_path / "out.onnx", tmp_path / "base.safetensors"
    if mode == "merge":
        report = ak.onnx.merge(tmp_path / "base.onnx", adapter, out, base_weights=base)
    else:
        report = ak.onnx.inject(tmp_path / "base.onnx", adapter, out, mode=mode, base_weights=base)
    assert report.difference < 1e-5
    feeds = ak.onnx.fit(out, adapter, base_weights=base) if mode == "slots" else {}
    np.testing.assert_allclose(ran(out, **feeds), wanted, atol=1e-5)


def test_many_targets_read_the_names_of_layers_once():
    class Counted(dict):
        times = 0

        def __iter__(self):
            self.times += 1
            return super().__iter__()

    names = [f"layers.{number}.q" for number in range(40)]
    factors = {"A": torch.ones(1, 4), "B": torch.ones(4, 1)}
    adapter = Adapter({Target(name): (METHODS["lora"](**factors, scaling=1.0),) for name in names})
    layers = Counted({f"model.{name}.weight": None for name in names})
    empty = helper.make_model(helper.make_graph([], "g", [], []))
    assert norms_at(ir.from_proto(empty), adapter, layers, None) == {}
    assert layers.times <= 2

"""PEFT's own adapters in the graphs of every exporter and quantizer, against torch with PEFT."""

import contextlib
import warnings

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import TargetNotFound
from adapterkit.methods import METHODS

X = np.random.default_rng(3).normal(size=(2, 3, 32)).astype("f4")
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
FLOAT, PACKED = ("dynamo", "unoptimized", "legacy", "session"), ("dynamic", "nbits", "qdq")


class Attention(nn.Module):
    """Projections side by side: what rounding does to one of them is in no other's output."""

    def __init__(self):
        super().__init__()
        for name, out in zip(NAMES, (32, 16, 16, 48), strict=True):
            setattr(self, name, nn.Linear(32, out, bias=name != "k_proj"))

    def forward(self, x):
        return tuple(getattr(self, name)(x) for name in NAMES)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()})])

    def forward(self, x):
        return self.layers[0]["self_attn"](x)


class Inputs(quantization.CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": X}]

    def get_next(self):
        return self.left.pop() if self.left else None


def base():
    torch.manual_seed(0)
    return Model().eval()


def graphs_of(model, folder):
    words = {"input_names": ["x"], "output_names": list(NAMES)}
    dynamo = {"dynamo": True, "external_data": False, "verbose": False}
    for name, options in (
        ("dynamo", dynamo),
        ("unoptimized", {**dynamo, "optimize": False}),
        ("legacy", {"dynamo": False, "opset_version": 17}),
    ):
        torch.onnx.export(model, (torch.tensor(X),), str(folder / f"{name}.onnx"), **words, **options)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "session.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(folder / "dynamo.onnx"), options, providers=["CPUExecutionProvider"])
    quantization.quantize_dynamic(folder / "dynamo.onnx", folder / "dynamic.onnx", per_channel=True)
    quantizer = MatMulNBitsQuantizer(onnx.load(folder / "dynamo.onnx"), block_size=16, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / "nbits.onnx"))
    quantization.quantize_static(folder / "dynamo.onnx", folder / "qdq.onnx", Inputs(), per_channel=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the folder, what torch computes, what torch with PEFT computes)."""
    folder = tmp_path_factory.mktemp("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graphs_of(base(), folder)
        model = peft.get_peft_model(base(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(NAMES)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) / 4)
        model.save_pretrained(folder / "adapter")
        save_file(base().state_dict(), folder / "base.safetensors")
        with torch.no_grad():
            plain, adapted = ([y.numpy() for y in one(torch.tensor(X))] for one in (base(), model.eval()))
    return folder, plain, adapted


def told(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(list(NAMES), {"x": X})


def equal(got, wanted):
    for name, one, other in zip(NAMES, got, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * abs(other).max(), err_msg=name)


@pytest.mark.parametrize("name", FLOAT + PACKED)
def test_peft_adapters_in_any_graph(name, made, tmp_path):
    folder, plain, adapted = made
    lost = {"base_weights": folder / "base.safetensors"} if name in ("session", *PACKED) else {}
    report = ak.onnx.inject(folder / f"{name}.onnx", folder / "adapter", tmp_path / "out.onnx", **lost)
    assert {place.target.path.rpartition(".")[2] for place in report.found} == set(NAMES)
    quantized = told(folder / f"{name}.onnx")
    branches = [peft - torch_ for peft, torch_ in zip(adapted, plain, strict=True)]
    wanted = [q + d for q, d in zip(quantized, branches, strict=True)] if name in PACKED else adapted
    equal(told(report.out), wanted)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == (folder / f"{name}.onnx").read_bytes()
    if name in FLOAT:
        merged = ak.onnx.merge(folder / f"{name}.onnx", folder / "adapter", tmp_path / "merged.onnx", **lost)
        assert max(report.difference, merged.difference) <= 1e-5
        equal(told(merged.out), told(report.out))
        assert name == "session" or (report.reference <= 1e-5 and merged.reference <= 1e-5)


class Layers(Model):
    """Two layers that torch's older exporter gives the same names: the list that holds them is not called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()}) for _ in range(2)])

    def forward(self, x):
        return tuple(one + other for one, other in zip(*(layer["self_attn"](x) for layer in self.layers), strict=True))


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
@pytest.mark.parametrize("layer", [0, 1])
def test_layers_whose_names_a_legacy_graph_has_lost_are_found_or_refused(layer, name, tmp_path):
    """Never a layer of another number: what the names do not prove takes the base's numbers."""
    torch.manual_seed(1)
    model = Layers().eval()
    words = {"input_names": ["x"], "output_names": list(NAMES), "dynamo": False, "opset_version": 17}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.tensor(X),), str(tmp_path / "m.onnx"), **words)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    linear = getattr(model.layers[layer]["self_attn"], name)
    A, B = torch.randn(2, 32) / 4, torch.randn(linear.out_features, 2) / 4
    lora = METHODS["lora"](A=A, B=B)
    adapter = ak.Adapter({ak.Target(f"layers.{layer}.self_attn.{name}"): (lora,)})
    with torch.no_grad():
        linear.weight.add_(B @ A)
        wanted = [y.numpy() for y in model(torch.tensor(X))]
    with contextlib.suppress(TargetNotFound):
        equal(told(ak.onnx.inject(tmp_path / "m.onnx", adapter, tmp_path / "named.onnx").out), wanted)
    out = ak.onnx.inject(
        tmp_path / "m.onnx", adapter, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors"
    )
    equal(told(out.out), wanted)

"""Adapters on graphs that onnxruntime's own quantizers made: the quantized model's output, and the branch in float."""

import json
import warnings

import numpy as np
import onnx
import onnx_graphs as graphs
import pytest
import torch
from command_line import record, run
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer, QuantFormat
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import TargetNotFound, Unsupported, UsageError
from adapterkit.methods import METHODS

OUT, IN = 24, 64
X = np.random.default_rng(3).normal(size=(2, 3, IN)).astype("f4")


class Two(nn.Module):
    """Two layers, so that one whose branch is missing or misplaced shows in the other's input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN, bias=False)

    def forward(self, x):
        return self.up(x)


class Inputs(quantization.CalibrationDataReader):
    def __init__(self):
        self.left = [{"x": X}]

    def get_next(self):
        return self.left.pop() if self.left else None


def nbits(path, out, **options):
    quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=16, **options)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out))


def static(path, out, **options):
    kind = quantization.QuantFormat.QDQ
    quantization.quantize_static(path, out, Inputs(), quant_format=kind, per_channel=True, **options)


QUANTIZERS = {
    "dynamic": lambda path, out: quantization.quantize_dynamic(path, out, per_channel=True),
    "dynamic-tensor": lambda path, out: quantization.quantize_dynamic(path, out),
    "dynamic-unsigned": lambda path, out: quantization.quantize_dynamic(
        path, out, weight_type=quantization.QuantType.QUInt8
    ),
    "nbits": lambda path, out: nbits(path, out, is_symmetric=True),
    "nbits-zeros": lambda path, out: nbits(path, out, is_symmetric=False),
    "nbits-8": lambda path, out: nbits(path, out, is_symmetric=False, bits=8),
    "nbits-qdq": lambda path, out: nbits(path, out, is_symmetric=True, quant_format=QuantFormat.QDQ),
    "qdq": static,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The layer as the legacy and the dynamo exporter write it, quantized in every way, and the base's weights."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("quantized"), Two().eval()
    words = {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.tensor(X),), str(folder / "legacy.onnx"), dynamo=False, opset_version=21 - 4, **words
        )
        torch.onnx.export(
            model, (torch.tensor(X),), str(folder / "dynamo.onnx"), external_data=False, verbose=False, **words
        )
        model21 = onnx.version_converter.convert_version(onnx.load(folder / "legacy.onnx"), 21)
        onnx.save(model21, folder / "legacy.onnx")
        for exporter in ("legacy", "dynamo"):
            for name, quantize in QUANTIZERS.items():
                quantize(folder / f"{exporter}.onnx", folder / f"{exporter}-{name}.onnx")
    save_file(model.state_dict(), folder / "base.safetensors")
    return folder


def lora():
    g = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, IN, generator=g), torch.randn(OUT, 2, generator=g)
    return METHODS["lora"](A=A, B=B, scaling=0.5)


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_branch_beside_what_a_quantizer_made(exporter, name, exported, tmp_path):
    path, out, update = exported / f"{exporter}-{name}.onnx", tmp_path / "out.onnx", lora()
    adapter = Adapter({Target("up"): (update,)})
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert kinds & {"MatMulInteger", "MatMulNBits", "DequantizeLinear"}
    report = ak.onnx.inject(path, adapter, out, base_weights=exported / "base.safetensors")
    assert len(report.found) == 1
    wanted = graphs.run(path, X) + X @ (0.5 * (update.B @ update.A)).numpy().T
    np.testing.assert_allclose(graphs.run(out, X), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())
    ak.onnx.eject(out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
    with pytest.raises(Unsupported, match=r"keep_change='float'.*quantized='dequantize'.*quantized='requantize'"):
        ak.onnx.merge(path, adapter, tmp_path / "merged.onnx", base_weights=exported / "base.safetensors")
    with pytest.raises(UsageError, match="Known: dequantize, requantize"):
        ak.onnx.merge(path, adapter, tmp_path / "merged.onnx", quantized="original")


def dense(path):
    """The numbers that a packed layer stands for, `[out, in]` in float64, by other ways than adapterkit's."""
    proto = onnx.load(path)
    held = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    nodes = {node.op_type: node for node in proto.graph.node}
    if "MatMulNBits" in nodes:  # Its kernel takes floating-point inputs as they are.
        rows = [graphs.run(path, row)[0, 0] for row in np.eye(IN)[:, None, None] + 0 * X]
        return (np.array(rows) - graphs.run(path, 0 * X)[0, 0]).T.astype("f8")
    if "MatMulInteger" in nodes:
        q, zero = (held[nodes["MatMulInteger"].input[at]].astype("f8") for at in (1, 3))
        inputs = {name for node in proto.graph.node for name in node.input}
        (scale,) = (array for name, array in held.items() if name in inputs and "_scale" in name)
        return ((q - zero) * scale).T
    back = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and held[n.input[0]].ndim == 2)
    proto.graph.output.append(helper.make_tensor_value_info(back.output[0], TensorProto.FLOAT, None))
    return onnx.reference.ReferenceEvaluator(proto).run([back.output[0]], {"x": X})[0].T.astype("f8")


@pytest.mark.parametrize("exporter", ["legacy", "dynamo"])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_merge_into_what_a_quantizer_made(exporter, name, exported, tmp_path):
    path, out, update = exported / f"{exporter}-{name}.onnx", tmp_path / "out.onnx", lora()
    adapter, base = Adapter({Target("up"): (update,)}), exported / "base.safetensors"
    D = (0.5 * (update.B @ update.A)).numpy().astype("f8")
    W, x = dense(path), X.astype("f8")
    bias = load_file(base)["up.bias"].numpy()
    report = ak.onnx.merge(path, adapter, out, base_weights=base, quantized="dequantize")
    assert report.difference < 1e-5
    left = {"DequantizeLinear"} if name == "qdq" else set()  # Of the bias.
    assert {node.op_type for node in onnx.load(out).graph.node} <= {"MatMul", "Gemm", "Add"} | left
    if name == "qdq":  # The bias is rounded too, and stays so.
        rounded = graphs.run(out, 0 * X)[0, 0]
        np.testing.assert_allclose(rounded, bias, atol=1e-3)
        bias = rounded
    wanted = x @ (W + D).T + bias
    np.testing.assert_allclose(graphs.run(out, X), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())
    onnx.checker.check_model(onnx.load(out), full_check=True)
    ops = sorted(node.op_type for node in onnx.load(path).graph.node)
    options = {"base_weights": base, "quantized": "requantize", "keep_change": "packed"}
    report = ak.onnx.merge(path, adapter, tmp_path / "again.onnx", **options)
    assert report.beside == ()
    assert sorted(node.op_type for node in onnx.load(tmp_path / "again.onnx").graph.node) == ops
    R = dense(tmp_path / "again.onnx")
    (damage,) = report.damage.values()
    error = np.linalg.norm(R - W - D) / np.linalg.norm(W + D)
    assert damage["error"] == pytest.approx(error, rel=1e-3)
    assert error < (0.12 if name in ("nbits", "nbits-zeros", "nbits-qdq") else 0.02)
    assert damage["kept"] == pytest.approx(((R - W) * D).sum() / (D * D).sum(), rel=1e-3)
    if name != "qdq":  # Its output is clipped to what the quantizer saw of the base.
        wanted = x @ R.T + bias
        assert abs(graphs.run(tmp_path / "again.onnx", X) - wanted).max() < 0.02 * abs(wanted).max()


def small():
    """A change that is lost in the steps of a packed weight."""
    update = lora()
    return update.replace(scaling=update.scaling / 200)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_change_that_is_kept_beside_a_packed_weight(name, exported, tmp_path):
    path, out, base = exported / f"legacy-{name}.onnx", tmp_path / "out.onnx", exported / "base.safetensors"
    first, second = lora(), small()
    D = [(one.scaling * (one.B @ one.A)).numpy() for one in (first, second)]
    adapters = [Adapter({Target("up"): (one,)}) for one in (first, second)]
    plain = graphs.run(path, X)
    report = ak.onnx.merge(path, adapters, out, weights=[1, -0.5], base_weights=base, keep_change="float")
    assert report.beside == ("up",)
    wanted = plain + X @ (D[0] - 0.5 * D[1]).T
    np.testing.assert_allclose(graphs.run(out, X), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())
    held = {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
    after = {i.name: numpy_helper.to_array(i) for i in onnx.load(out).graph.initializer}
    for key, array in held.items():
        np.testing.assert_array_equal(after[key], array)
    # By itself, it is decided by what quantizing again loses.
    report = ak.onnx.merge(path, adapters[1], out, base_weights=base, quantized="requantize")
    (told,) = report.damage.values()
    assert (report.beside == ("up",)) == (told["kept"] < 0.95)
    if report.beside:
        wanted = plain + X @ D[1].T
        np.testing.assert_allclose(graphs.run(out, X), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())
    else:
        ops = [sorted(node.op_type for node in onnx.load(file).graph.node) for file in (path, out)]
        assert ops[0] == ops[1]


def test_a_change_beside_by_the_command(exported, tmp_path):
    path, out = exported / "legacy-nbits.onnx", tmp_path / "out.onnx"
    ak.write(Adapter({Target("up"): (small(),)}), tmp_path / "a.safetensors")
    words = ["merge", path, tmp_path / "a.safetensors", "-o", out, "--base-weights", exported / "base.safetensors"]
    refused = run(*words)
    assert "--keep-change float" in refused.output
    told = run(*words, "--quantized", "requantize")
    assert told.exit_code == 0, told.output
    assert "1 change kept next to the quantized weight" in told.stdout
    assert "quantizing again would keep only" in told.stdout
    packed = record(*words, "--quantized", "requantize", "--keep-change", "packed", "--overwrite")
    assert "beside" not in packed
    assert packed["damage"]["up"]["kept"] < 0.95
    assert run(*words, "--keep-change", "packed", "--overwrite").exit_code == 2
    assert run(*words, "--keep-change", "float", "--quantized", "dequantize", "--overwrite").exit_code == 2


def test_what_is_not_kept_beside(exported, tmp_path):
    """A scale of outputs beside another adapter is no sum of branches."""
    path, base = exported / "legacy-nbits.onnx", exported / "base.safetensors"
    scale = METHODS["ia3"](l=torch.linspace(0.5, 1.5, OUT))
    both = [Adapter({Target("up"): (one,)}) for one in (scale, small())]
    with pytest.raises(
        Unsupported, match="can be stored beside a quantized weight only if a single adapter is merged, with weight 1"
    ):
        ak.onnx.merge(path, both, tmp_path / "out.onnx", base_weights=base, keep_change="float")
    report = ak.onnx.merge(path, both, tmp_path / "out.onnx", base_weights=base, quantized="requantize")
    assert report.beside == ()
    alone = ak.onnx.merge(path, both[0], tmp_path / "one.onnx", base_weights=base, keep_change="float")
    assert alone.beside == ("up",)
    wanted = graphs.run(path, X) * scale.l.numpy()  # PEFT scales the bias, too.
    np.testing.assert_allclose(graphs.run(tmp_path / "one.onnx", X), wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_another_checkpoint_is_no_neighbour(name, exported, tmp_path):
    torch.manual_seed(5)
    save_file(Two().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(TargetNotFound, match=r"nearest weight has a distance of|exported from"):
        ak.onnx.inject(
            exported / f"dynamo-{name}.onnx", Adapter({Target("up"): (lora(),)}), tmp_path / "o.onnx",
            base_weights=tmp_path / "other.safetensors",
        )  # fmt: skip


class Deep(nn.Module):
    """A layer whose output is rounded before another one reads it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def ranges(tmp_path_factory):
    """Such a model, quantized by ranges that were calibrated without an adapter, with its adapters on disk."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("ranges"), Deep().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = {"input_names": ["x"], "output_names": ["y"], "dynamo": False, "opset_version": 17}
        torch.onnx.export(model, (torch.tensor(X),), str(folder / "float.onnx"), **words)
        static(folder / "float.onnx", folder / "qdq.onnx")
        # On processors without VNNI onnxruntime's products of 8-bit numbers saturate unless weights have 7 bits.
        static(folder / "float.onnx", folder / "narrow.onnx", reduce_range=True)
    np.savez(folder / "inputs.npz", x=X)
    ak.write(Adapter({Target("up"): (lora(),)}), folder / "a.safetensors", format="adapterkit")
    return folder, model


def test_values_that_static_quantization_clips_are_counted_and_told(ranges, tmp_path):
    """By torch: what the layers give with the adapter, beyond the ranges that the graph has."""
    folder, model = ranges
    path, out, small = folder / "qdq.onnx", tmp_path / "out.onnx", lora().replace(scaling=0.0)
    report = ak.onnx.inject(path, Adapter({Target("up"): (lora(),)}), out, check={"x": X})
    proto = onnx.load(path)
    held = {i.name: numpy_helper.to_array(i).astype("f8") for i in proto.graph.initializer}
    (node,) = (node for node in proto.graph.node if node.input[0] == "/Relu_output_0")
    scale, zero = held[node.input[1]], held[node.input[2]]
    kind = next(i.data_type for i in proto.graph.initializer if i.name == node.input[2])
    low, high = {TensorProto.INT8: (-128, 127), TensorProto.UINT8: (0, 255)}[kind]
    with torch.no_grad():
        h = model.up(torch.tensor(X)) + torch.tensor(X) @ (0.5 * (lora().B @ lora().A)).T
        q = np.rint(torch.relu(h).double().numpy() / scale) + zero
    assert zero == low
    wanted = (q > high).sum()
    found = report.saturation
    assert found.nodes[node.name] == (0, pytest.approx(wanted, rel=0.1))
    assert wanted > 20
    assert found.after == sum(after for _, after in found.nodes.values())
    (warning,) = report.warnings
    assert f"clips {found.after} of {found.values} values with the adapter, {found.before} without it" in warning
    assert "merge the adapter into the floating-point model" in warning
    assert report.record()["saturation"]["nodes"][node.name] == list(found.nodes[node.name])
    assert ak.onnx.inject(path, Adapter({Target("up"): (small,)}), out, check={"x": X}).warnings == ()
    (unknown,) = ak.onnx.inject(path, Adapter({Target("up"): (lora(),)}), out, check=False).warnings
    assert "did not run" in unknown
    assert ak.onnx.inject(folder / "float.onnx", Adapter({Target("up"): (lora(),)}), out, check=False).warnings == ()
    merged = ak.onnx.merge(path, Adapter({Target("up"): (lora(),)}), tmp_path / "m.onnx", quantized="requantize")
    assert merged.saturation.after > merged.saturation.before


@pytest.mark.parametrize("target", ["up", "down"])
def test_a_range_that_stands_for_a_relu_stays_one(target, ranges, tmp_path):
    """onnxruntime's quantizer left the Relu out: one layer's output is clipped at 0, and the next layer reads that."""
    folder, model = ranges
    assert "Relu" not in {node.op_type for node in onnx.load(folder / "narrow.onnx").graph.node}
    g = torch.Generator().manual_seed(7)
    out, into = model.get_submodule(target).weight.shape
    A, B = torch.randn(2, into, generator=g) / 8, torch.randn(out, 2, generator=g) / (12 if target == "up" else 4)
    adapter = Adapter({Target(target): (METHODS["lora"](A=A, B=B),)})
    with torch.no_grad():
        before = model(torch.tensor(X)).numpy()
        layer = model.get_submodule(target)
        layer.weight += B @ A
        wanted = model(torch.tensor(X)).numpy()
        layer.weight -= B @ A
    size = abs(wanted).max()
    rounding = abs(graphs.run(folder / "narrow.onnx", X) - before).max() / size
    assert abs(wanted - before).max() > 0.1 * size
    found = [ak.onnx.inject(folder / "narrow.onnx", adapter, tmp_path / "out.onnx")]
    found.append(ak.onnx.merge(folder / "narrow.onnx", adapter, tmp_path / "m.onnx", quantized="dequantize"))
    for report in found:
        assert abs(graphs.run(report.out, X) - wanted).max() / size < 3 * rounding + 0.02 < 0.1


def test_the_command_line_warns_of_clipping(ranges, tmp_path):
    folder, _ = ranges
    words = ("inject", folder / "qdq.onnx", folder / "a.safetensors", "-o", tmp_path / "out.onnx")
    done = run(*words, "--calibration", folder / "inputs.npz", "--json")
    assert done.exit_code == 0, done
    told = json.loads(done.stdout)
    assert "warning: static quantization clips" in done.stderr
    assert told["warnings"][0] in done.stderr
    assert told["saturation"]["after"] > told["saturation"]["before"]
    assert run(*words[:-1], tmp_path / "no.onnx", "--calibration", folder / "inputs.npz", "--no-check").exit_code == 2


@pytest.mark.parametrize("method", ["dora", "ia3", "bottleneck"])
def test_other_methods_on_four_bits(method, exported, tmp_path):
    """The formula at the numbers that the packed weight stands for, which the reference implementation tells."""
    path, out = exported / "legacy-nbits-qdq.onnx", tmp_path / "out.onnx"
    proto = onnx.load(path)
    held = next(node for node in proto.graph.node if node.op_type == "DequantizeLinear")
    proto.graph.output.append(helper.make_tensor_value_info(held.output[0], TensorProto.FLOAT, None))
    W = onnx.reference.ReferenceEvaluator(proto).run([held.output[0]], {"x": X})[0].T.astype("f8")
    bias = next(numpy_helper.to_array(i) for i in proto.graph.initializer if i.name == "up.bias").astype("f8")
    g = torch.Generator().manual_seed(2)
    plain, x = lora(), X.astype("f8")
    if method == "dora":
        m = torch.rand(OUT, generator=g) + 0.5
        update = METHODS["dora"](A=plain.A, B=plain.B, magnitude=m)
        V = W + (plain.B.double() @ plain.A.double()).numpy()
        wanted = x @ (m.double().numpy()[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)).T + bias
    elif method == "ia3":
        scale = torch.rand(OUT, generator=g) + 0.5
        update, wanted = METHODS["ia3"](l=scale), (x @ W.T + bias) * scale.double().numpy()
    else:
        down, up = torch.randn(3, OUT, generator=g), torch.randn(OUT, 3, generator=g)
        update = METHODS["bottleneck"](down=down, up=up, non_linearity="relu")
        wanted = None
    for name in ("legacy-nbits-qdq", "legacy-nbits"):
        ak.onnx.inject(exported / f"{name}.onnx", Adapter({Target("up"): (update,)}), out, check=False)
        got = graphs.run(out, X)
        if method == "bottleneck":  # It reads what the runtime's own kernel gives, which computes in fewer bits.
            y = graphs.run(exported / f"{name}.onnx", X).astype("f8")
            wanted = y + np.maximum(y @ down.double().numpy().T, 0) @ up.double().numpy().T
        assert abs(got - wanted).max() <= 1e-5 * abs(wanted).max(), name

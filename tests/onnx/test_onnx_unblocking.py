"""Graphs whose convolutions onnxruntime stored in blocks of channels, for one kind of processor.

onnxruntime writes the blocked graphs and runs them; torch tells what the changed layers compute.
"""

import copy
import warnings

import numpy as np
import onnx
import onnx_graphs as graphs
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import CheckFailed, TargetNotFound, Unsupported
from adapterkit.methods import METHODS
from adapterkit.onnx.unrounded import obstacle

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

TARGETS = ("few", "fill", "normed", "deep", "groups", "point", "last")


class Blocked(nn.Module):
    """Convolutions of each kind that onnxruntime blocks, and the nodes that it runs on blocks between them.

    A block has 8 or 16 channels: `few` reads plain channels, `fill` reads 20, which do not fill the last block, and
    `last` writes 12.
    """

    def __init__(self):
        super().__init__()
        self.few, self.fill = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 32, 3, padding=1)
        self.normed, self.norm = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.groups = nn.Conv2d(32, 64, 3, padding=1, groups=2)
        self.point, self.last = nn.Conv2d(96, 48, 1), nn.Conv2d(48, 12, 1)
        self.head = nn.Conv2d(48, 20, 1)

    def forward(self, x):
        y = torch.relu(self.fill(torch.relu(self.few(x))))
        z = torch.relu(self.norm(self.normed(y)) + y)
        h = nn.functional.avg_pool2d(nn.functional.max_pool2d(self.deep(z), 2), 3, stride=1, padding=1)
        h = torch.tanh(nn.functional.interpolate(self.groups(h), scale_factor=2))
        h = torch.sigmoid(self.point(torch.cat([h, y], 1)))
        return self.last(h) * torch.sigmoid(self.head(h).mean((2, 3), keepdim=True)[:, :12])


def optimized(path, out):
    """Write the graph that onnxruntime runs on this processor."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(str(path), options)


def blocked(model, folder, dynamic=False):
    """Write a graph that onnxruntime optimized at its last level, and the model's weights; return their paths."""
    axes = {"x": {0: "n", 2: "h", 3: "w"}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (X,), folder / "float.onnx", input_names=["x"], dynamo=False, opset_version=17, dynamic_axes=axes
        )
    optimized(folder / "float.onnx", folder / "base.onnx")
    save_file(model.state_dict(), folder / "base.safetensors")
    assert "com.microsoft.nchwc" in domains(folder / "base.onnx")
    return folder / "base.onnx", folder / "base.safetensors"


def domains(path):
    return {node.domain for node in onnx.load(path).graph.node}


def randomized(kind):
    torch.manual_seed(0)
    model = kind().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["fixed", "dynamic"])
def written(request, tmp_path_factory):
    model = randomized(Blocked)
    return model, *blocked(model, tmp_path_factory.mktemp("blocked"), request.param)


def changed(model, method):
    """Return an adapter of every target, and the output of the model with it."""
    model, g, updates = copy.deepcopy(model), torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name in TARGETS:
            layer = getattr(model, name)
            W = layer.weight
            A, B = torch.randn(2, *W.shape[1:], generator=g) / 3, torch.randn(len(W), 2, generator=g) / 3
            scale = torch.rand(len(W), generator=g) + 0.5
            wide = scale.reshape(-1, 1, 1, 1)
            V = W + (B @ A.flatten(1)).reshape(W.shape)
            if method == "lora":
                updates[Target(name)], new = (METHODS["lora"](A=A, B=B),), V
            elif method == "dora":
                updates[Target(name)] = (METHODS["dora"](A=A, B=B, magnitude=scale),)
                new = V * wide / V.flatten(1).norm(dim=1).reshape(wide.shape)
            else:
                updates[Target(name)], new = (METHODS["ia3"](l=scale),), W * wide
                if layer.bias is not None:
                    layer.bias *= scale
            layer.weight.copy_(new)
        return Adapter(updates), model(X).numpy()


@pytest.mark.parametrize("mode", ["constant", "slots", "merge"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_changes_of_blocked_convolutions(method, mode, written, tmp_path):
    model, path, base = written
    adapter, wanted = changed(model, method)
    with torch.no_grad():
        before = model(X).numpy()
    assert abs(wanted - before).max() > 0.1 * abs(before).max()
    out, feeds = tmp_path / "out.onnx", {}
    if mode == "merge":
        report = ak.onnx.merge(path, adapter, out, base_weights=base)
    else:
        report = ak.onnx.inject(path, adapter, out, mode=mode, base_weights=base)
        ak.onnx.eject(out, tmp_path / "back.onnx")
        assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
    if mode == "slots":
        assert abs(graphs.run(out, X.numpy()) - before).max() <= 1e-6 * abs(before).max()
        feeds = ak.onnx.fit(out, adapter, base_weights=base)
    assert report.difference is not None
    assert "com.microsoft.nchwc" not in domains(out)
    assert abs(graphs.run(out, X.numpy(), **feeds) - wanted).max() <= 1e-5 * abs(wanted).max()


def test_layers_are_listed_under_the_names_of_the_base(written):
    _, path, base = written
    found = {place.target: place.confidence for place in ak.onnx.layers(path, base_weights=base)}
    assert {name for name in TARGETS if found[name] == 1} == set(TARGETS) - {"normed"}  # A norm is folded into it.


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def of_first(model):
    W = model.first.weight
    return Adapter({Target("first"): (METHODS["lora"](A=torch.randn(2, *W.shape[1:]), B=torch.randn(len(W), 2)),)})


def order(shape, size):
    """Return the axes of a stored kernel, and their order in a plain one, for a number of channels in a block."""
    out, into, height, width = shape
    if into < size:
        return (out // size, into, height, width, size), (0, 4, 1, 2, 3)
    return (out // size, into // size, height, width, size, size), (0, 5, 1, 4, 2, 3)


def kernels_of(proto):
    names = [node.input[1] for node in proto.graph.node if node.op_type == "Conv"]
    return [next(held for held in proto.graph.initializer if held.name == name) for name in names]


def stored_for_another_processor(path, model):
    """Store the kernels in blocks of another size."""
    proto = onnx.load(path)
    held, W = kernels_of(proto)[0], model.first.weight.detach().numpy()
    stored = numpy_helper.to_array(held)
    sizes = []
    for size in (8, 16):
        axes, turn = order(W.shape, size)
        sizes += [size] if np.array_equal(stored.reshape(axes).transpose(turn).reshape(W.shape), W) else []
    (size,) = sizes
    for held in kernels_of(proto):
        V = numpy_helper.to_array(held)
        axes, turn = order(V.shape, size)
        plain = V.reshape(axes).transpose(turn).reshape(V.shape)
        axes, turn = order(V.shape, 24 - size)
        split = [axes[axis] for axis in turn]
        again = plain.reshape(split).transpose(np.argsort(turn)).reshape(V.shape)
        held.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(again), held.name))
    onnx.save(proto, path)


@pytest.mark.parametrize("check", [True, False])
def test_a_graph_for_another_processor(check, tmp_path):
    """The base shows its block size. Here, onnxruntime computes something else from the original graph."""
    model = randomized(Plain)
    path, base = blocked(model, tmp_path)
    stored_for_another_processor(path, model)
    adapter, out = of_first(model), tmp_path / "out.onnx"
    if check:
        with pytest.raises(CheckFailed, match=r"blocks of another size\. Optimize .* --no-check \(check=False\)"):
            ak.onnx.inject(path, adapter, out, base_weights=base)
        assert not out.exists()
        return
    ak.onnx.inject(path, adapter, out, base_weights=base, check=False)
    (lora,) = adapter.updates[Target("first")]
    with torch.no_grad():
        model.first.weight += (lora.B @ lora.A.flatten(1)).reshape(model.first.weight.shape)
        wanted = model(X).numpy()
    assert abs(graphs.run(out, X.numpy()) - wanted).max() <= 1e-5 * abs(wanted).max()


@pytest.mark.parametrize("why", ["weights", "operator", "output"])
def test_blocks_that_cannot_be_undone_are_refused_by_their_reason(why, tmp_path):
    model = randomized(Plain)
    path, base = blocked(model, tmp_path)
    adapter, graph = of_first(model), onnx.load(path)
    if why == "weights":
        torch.manual_seed(1)
        save_file(Plain().state_dict(), base)
        reason = "no kernel matches a weight of the base with exactly one block size"
    elif why == "operator":
        first = next(node for node in graph.graph.node if node.op_type == "Conv")
        graph.graph.node.insert(1, onnx.helper.make_node("Softplus", [first.output[0]], ["soft"]))
        graph.graph.node[2].input[0] = "soft"
        reason = "the operator Softplus of .* reads blocked values"
    else:
        first = next(node for node in graph.graph.node if node.op_type == "Conv")
        graph.graph.output.append(onnx.helper.make_tensor_value_info(first.output[0], 1, [2, 32, 16, 16]))
        reason = "an output of the graph is blocked"
    onnx.save(graph, path)
    with pytest.raises(Unsupported, match=rf"reordered.*nchwc\.Conv.*{reason}.*ORT_ENABLE_EXTENDED"):
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=base)


def test_blocked_layers_have_no_names_without_the_base(tmp_path):
    model = randomized(Plain)
    path, _ = blocked(model, tmp_path)
    with pytest.raises(TargetNotFound, match=r"first: .*--base-weights DIR \(base_weights=\)"):
        ak.onnx.inject(path, of_first(model), tmp_path / "out.onnx")


class Once:
    """Calibration data larger than the inputs of the test, so that changed layers do not clip."""

    def __init__(self):
        self.left = [{"x": 2 * X.numpy()}]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.parametrize("mode", ["constant", "slots", "merge"])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_integer_convolutions_that_read_channels_last(form, mode, tmp_path):
    model = randomized(Plain)
    blocked(model, tmp_path)
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "q.onnx", Once(), quant_format=getattr(QuantFormat, form),
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    path, base, out = tmp_path / "last.onnx", tmp_path / "base.safetensors", tmp_path / "out.onnx"
    optimized(tmp_path / "q.onnx", path)
    kinds = {(node.domain, node.op_type) for node in onnx.load(path).graph.node}
    assert ("com.microsoft", "QLinearConv") in kinds
    assert (obstacle(ir.load(path)) or "").startswith("QLinearConv ")  # Its float form would read channels first.
    W, g = model.second.weight, torch.Generator().manual_seed(3)
    lora = METHODS["lora"](A=torch.randn(2, *W.shape[1:], generator=g) / 20, B=torch.randn(len(W), 2, generator=g) / 2)
    adapter = Adapter({Target("second"): (lora,)})
    with torch.no_grad():
        before = model(X).numpy()
        W += (lora.B @ lora.A.flatten(1)).reshape(W.shape)
        wanted = model(X).numpy()
    own = abs(graphs.run(path, X.numpy()) - before).max() / abs(before).max()
    assert own < 0.05 < abs(wanted - before).max() / abs(before).max() / 4
    feeds = {}
    if mode == "merge":
        ak.onnx.merge(path, adapter, out, base_weights=base, quantized="dequantize")
    else:
        ak.onnx.inject(path, adapter, out, mode=mode, base_weights=base)
        ak.onnx.eject(out, tmp_path / "back.onnx")
        assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
    if mode == "slots":
        assert abs(graphs.run(out, X.numpy()) - before).max() / abs(before).max() <= 1.5 * own
        feeds = ak.onnx.fit(out, adapter, base_weights=base)
    assert abs(graphs.run(out, X.numpy(), **feeds) - wanted).max() / abs(wanted).max() <= 3 * own


def test_channels_last_do_not_clip_a_change_more_than_channels_first(tmp_path):
    """A change larger than the calibrated range is added after the output is rounded, as before the optimization."""
    model = randomized(Plain)
    blocked(model, tmp_path)
    quantize_static(tmp_path / "float.onnx", tmp_path / "q.onnx", Once(), weight_type=QuantType.QInt8)
    optimized(tmp_path / "q.onnx", tmp_path / "last.onnx")
    W, g = model.second.weight, torch.Generator().manual_seed(3)
    lora = METHODS["lora"](A=torch.randn(2, *W.shape[1:], generator=g) / 2, B=torch.randn(len(W), 2, generator=g))
    with torch.no_grad():
        before = model(X).numpy()
        W += (lora.B @ lora.A.flatten(1)).reshape(W.shape)
        wanted = model(X).numpy()
    assert abs(wanted).max() > 4 * abs(before).max()
    ak.onnx.inject(
        tmp_path / "last.onnx", Adapter({Target("second"): (lora,)}), tmp_path / "out.onnx",
        base_weights=tmp_path / "base.safetensors", check=False,
    )  # fmt: skip
    assert abs(graphs.run(tmp_path / "out.onnx", X.numpy()) - wanted).max() <= 0.05 * abs(wanted).max()

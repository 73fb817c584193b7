"""Batch normalisations that exporters fold into the layer before them: torch's own outputs tell what is right."""

import warnings

import onnx
import onnx_graphs as graphs
import onnxruntime
import pytest
import torch
from command_line import run
from safetensors.torch import save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import TargetNotFound, Unsupported

EXPORTS = {
    "dynamo": {"dynamo": True, "external_data": False, "verbose": False},
    "unoptimized": {"dynamo": True, "optimize": False, "external_data": False, "verbose": False},
    "legacy": {"dynamo": False, "opset_version": 17},
    "unfolded": {"dynamo": False, "opset_version": 17, "do_constant_folding": False},
}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """As ResNet's blocks, with a shortcut that is normalised too."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.bn3 = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.plain = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        h = torch.relu(self.bn1(self.conv1(x)))
        return self.plain(torch.relu(self.bn2(self.conv2(h)) + self.bn3(self.down(x))))


class Mobile(nn.Module):
    """A depthwise convolution, one that is transposed, in groups, a linear layer, each with a norm of its own eps."""

    def __init__(self):
        super().__init__()
        self.point, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.deep, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.up, self.bn3 = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4, eps=1e-3)
        self.head, self.bn4 = nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False)

    def forward(self, x):
        x = torch.relu(self.bn2(self.deep(torch.relu(self.bn1(self.point(x))))))
        return self.bn4(self.head(torch.relu(self.bn3(self.up(x))).mean((2, 3))))


def randomized(model):
    g = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            size = module.running_var.shape
            module.running_mean.copy_(torch.randn(size, generator=g) / 4)
            module.running_var.copy_(torch.rand(size, generator=g) * 2 + 0.2)
            if module.affine:
                with torch.no_grad():
                    module.weight.copy_(torch.randn(size, generator=g))
                    module.bias.copy_(torch.randn(size, generator=g))
    return model.eval()


def export(model, path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (X,), str(path), input_names=["x"], **EXPORTS[name])
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("norms")
    for kind in (Residual, Mobile):
        torch.manual_seed(2)
        model = randomized(kind())
        save_file(model.state_dict(), folder / f"{kind.__name__}.safetensors")
        for name in EXPORTS:
            export(model, folder / f"{kind.__name__}-{name}.onnx", name)
    return folder


def of(kind):
    torch.manual_seed(2)
    return randomized(kind())


def lora(weight, seed):
    g = torch.Generator().manual_seed(seed)
    out, into, *kernel = weight.shape
    A = torch.randn(2, into, *kernel, generator=g) / 2
    return ak.METHODS["lora"](A=A, B=torch.randn(out, 2, generator=g) / 2, scaling=0.5)


def adapter_of(model, method):
    """An adapter of every layer, and the model with it, by formulas in torch."""
    updates = {}
    with torch.no_grad():
        for seed, (name, module) in enumerate(model.named_children()):
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                continue
            W, plain = module.weight, not isinstance(module, nn.ConvTranspose2d)
            thin = lora(W if plain else W.swapaxes(0, 1), seed)
            D = 0.5 * (thin.B @ thin.A.flatten(1)).reshape(W.shape if plain else W.swapaxes(0, 1).shape)
            D = D if plain else D.swapaxes(0, 1)
            if method == "lora" or not plain:
                updates[ak.Target(name)] = (thin,)
                W += D
            elif method == "dora":
                magnitude = torch.rand(len(W), generator=torch.Generator().manual_seed(seed)) + 0.5
                updates[ak.Target(name)] = (ak.METHODS["dora"](A=thin.A, B=thin.B, magnitude=magnitude),)
                V = W + 2 * D
                W.copy_(V * (magnitude / V.flatten(1).norm(dim=1)).reshape(-1, *[1] * (W.ndim - 1)))
            else:
                shift = {} if module.bias is None else {"bias": module.bias + 1}
                updates[ak.Target(name)] = (ak.METHODS["replacement"](weight=W + D, **shift),)
                W += D
                if module.bias is not None:
                    module.bias += 1
    return ak.Adapter(updates), model(X).detach()


@pytest.mark.parametrize("method", ["lora", "dora", "replacement"])
@pytest.mark.parametrize("name", EXPORTS)
@pytest.mark.parametrize("kind", [Residual, Mobile])
def test_changes_are_scaled_as_the_norm_scales_the_layer(kind, name, method, exported, tmp_path, close):
    path, base = exported / f"{kind.__name__}-{name}.onnx", exported / f"{kind.__name__}.safetensors"
    model = of(kind)
    before = model(X).detach()
    close(torch.tensor(graphs.run(path, X)), before, tolerance=1e-5)
    adapter, wanted = adapter_of(model, method)
    assert abs(wanted - before).max() > 0.1 * abs(before).max()
    injected = ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=base)
    merged = ak.onnx.merge(path, adapter, tmp_path / "merged.onnx", base_weights=base)
    for report in (injected, merged):
        close(torch.tensor(graphs.run(report.out, X)), wanted, tolerance=1e-5)
        assert report.difference < 1e-5
    folded = {target["target"]: target.get("folded_norm") for target in injected.record()["targets"]}
    if name == "dynamo":
        norms = {
            "conv1": "bn1",
            "conv2": "bn2",
            "down": "bn3",
            "point": "bn1",
            "deep": "bn2",
            "up": "bn3",
            "head": "bn4",
        }
        assert folded == {layer: norms.get(layer) for layer in folded}
    if method != "replacement":
        slots = ak.onnx.inject(path, adapter, tmp_path / "slots.onnx", mode="slots", base_weights=base)
        session = ak.onnx.Session(slots.out)
        session.load("one", adapter, base_weights=base)
        close(torch.tensor(next(iter(session.run({"x": X.numpy()}).values()))), before, tolerance=1e-5)
        got = next(iter(session.run({"x": X.numpy()}, "one").values()))
        close(torch.tensor(got), wanted, tolerance=1e-5)


@pytest.mark.parametrize("mode", ["constant", "slots", "merge"])
@pytest.mark.parametrize("bias", [False, True])
def test_scaled_outputs_of_a_layer_with_a_norm_and_an_activation(bias, mode, tmp_path, close):
    """onnxruntime fuses the activation after the norm, so that the weight and the bias have to change."""
    torch.manual_seed(3)
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    onnxruntime.InferenceSession(
        export(model, tmp_path / "plain.onnx", "legacy"), options, providers=["CPUExecutionProvider"]
    )
    assert any(node.op_type == "FusedConv" for node in onnx.load(tmp_path / "session.onnx").graph.node)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    factors = torch.randn(8)
    adapter = ak.Adapter({ak.Target("0"): (ak.METHODS["ia3"](l=factors),)})
    words = {"base_weights": tmp_path / "base.safetensors"}
    if mode == "merge":
        ak.onnx.merge(tmp_path / "session.onnx", adapter, tmp_path / "out.onnx", **words)
    else:
        ak.onnx.inject(tmp_path / "session.onnx", adapter, tmp_path / "out.onnx", mode=mode, **words)
    with torch.no_grad():
        wanted = model[1:](factors.reshape(1, -1, 1, 1) * model[0](X))
    if mode == "slots":
        live = ak.onnx.Session(tmp_path / "out.onnx")
        live.load("one", adapter, **words)
        got = next(iter(live.run({"x": X.numpy()}, "one").values()))
    else:
        got = graphs.run(tmp_path / "out.onnx", X)
    close(torch.tensor(got), wanted, tolerance=1e-5)


def only(adapter, name):
    return ak.Adapter({target: updates for target, updates in adapter.updates.items() if target.path == name})


@pytest.mark.parametrize(
    ("kind", "name", "layers", "refused"),
    [
        (Residual, "dynamo", ("conv1", "conv2", "down"), True),
        (Residual, "legacy", ("conv1", "conv2", "down"), True),
        (Residual, "dynamo", ("plain",), False),
        (Residual, "legacy", ("plain",), False),
        (Residual, "unoptimized", ("conv1", "conv2", "down", "plain"), False),
        (Residual, "unfolded", ("conv1", "conv2", "down", "plain"), False),
        (Mobile, "dynamo", ("point", "deep", "up", "head"), True),
        (Mobile, "legacy", ("point", "deep"), True),
        (Mobile, "legacy", ("up", "head"), False),
    ],
)
def test_without_the_base_a_possible_fold_is_refused_and_nothing_else(kind, name, layers, refused, exported, tmp_path):
    path = exported / f"{kind.__name__}-{name}.onnx"
    adapter, _ = adapter_of(of(kind), "lora")
    for layer in layers:
        for change in (ak.onnx.inject, ak.onnx.merge):
            if not refused:
                change(path, only(adapter, layer), tmp_path / "out.onnx")
                continue
            with pytest.raises(Unsupported, match=r"may be folded.*--base-weights DIR \(base_weights=\)"):
                change(path, only(adapter, layer), tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()


def test_the_norm_itself_is_not_the_layer_before_it(exported, tmp_path):
    """The exporter notes the norm's name at the convolution that it was folded into."""
    scale = ak.Adapter({ak.Target("bn1"): (ak.METHODS["ia3"](l=torch.ones(8)),)})
    with pytest.raises(TargetNotFound, match="not in the base"):
        ak.onnx.inject(exported / "Residual-dynamo.onnx", scale, tmp_path / "out.onnx")


def test_bases_that_prove_nothing(exported, tmp_path):
    """One without the statistics, one of other numbers; the command line names the option."""
    path = exported / "Residual-legacy.onnx"
    adapter, _ = adapter_of(of(Residual), "lora")
    state = of(Residual).state_dict()
    save_file({n: t for n, t in state.items() if "running" not in n}, tmp_path / "bare.safetensors")
    with pytest.raises(TargetNotFound, match=r"no batch normalisation and no vector of the base.*running_var"):
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "bare.safetensors")
    torch.manual_seed(9)
    save_file(randomized(Residual()).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(TargetNotFound, match="differs from the base's weight"):
        ak.onnx.inject(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "other.safetensors")
    ak.write(only(adapter, "conv1"), tmp_path / "a.safetensors", format="adapterkit")
    done = run("inject", path, tmp_path / "a.safetensors", "-o", tmp_path / "out.onnx")
    assert done.exit_code == 3
    assert "--base-weights DIR" in done.stderr
    base = exported / "Residual.safetensors"
    done = run("inject", path, tmp_path / "a.safetensors", "-o", tmp_path / "out.onnx", "--base-weights", base)
    assert done.exit_code == 0, done


def test_channels_that_a_norm_multiplies_by_nothing(tmp_path, close):
    """And a norm that is as it was made, whose factors are nearly one."""
    torch.manual_seed(4)
    model = randomized(Residual())
    with torch.no_grad():
        model.bn1.weight[::2] = 0
        model.conv2.weight[3] = 0
    model.bn2 = nn.BatchNorm2d(8).eval()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    path = export(model, tmp_path / "base.onnx", "legacy")
    adapter, wanted = adapter_of(model, "lora")
    for change in (ak.onnx.inject, ak.onnx.merge):
        report = change(path, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors")
        close(torch.tensor(graphs.run(report.out, X)), wanted, tolerance=1e-5)


def test_what_onnxruntime_folds(exported, tmp_path, close):
    """A session that was saved after its own optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "session.onnx")
    onnxruntime.InferenceSession(exported / "Residual-unfolded.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "session.onnx").graph.node]
    assert "BatchNormalization" not in kinds
    adapter, wanted = adapter_of(of(Residual), "lora")
    with pytest.raises(Unsupported, match="may be folded"):
        ak.onnx.inject(tmp_path / "session.onnx", adapter, tmp_path / "out.onnx")
    base = exported / "Residual.safetensors"
    report = ak.onnx.inject(tmp_path / "session.onnx", adapter, tmp_path / "out.onnx", base_weights=base)
    close(torch.tensor(graphs.run(report.out, X)), wanted, tolerance=1e-5)


class Scaled(nn.Module):
    """As ConvNeXt's blocks: what a layer adds is multiplied by a vector."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 3, 1)
        self.gamma = nn.Parameter(torch.tensor([0.5, -1.5, 0.1]))

    def forward(self, x):
        return x + self.narrow(torch.relu(self.wide(x))) * self.gamma.reshape(1, -1, 1, 1)


class Unbiased(Scaled):
    """Without a bias, which a folded norm would leave."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Conv2d(16, 3, 1, bias=False)


def optimized(source, out, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(out)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    assert not any(node.op_type == "Mul" for node in onnx.load(out).graph.node)
    return out


def narrowed(model, method):
    """An adapter of the layer before the scale; changes the model by torch's own formulas."""
    A, B = torch.randn(2, 16, 1, 1), torch.randn(3, 2)
    W, D = model.narrow.weight, (B @ A.flatten(1)).reshape(3, 16, 1, 1)
    with torch.no_grad():
        if method == "lora":
            W += D
            return ak.Adapter({ak.Target("narrow"): (ak.METHODS["lora"](A=A, B=B),)})
        magnitude = torch.tensor([0.7, 1.9, 3.0])
        W.copy_((W + D) * (magnitude / (W + D).flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1))
    return ak.Adapter({ak.Target("narrow"): (ak.METHODS["dora"](A=A, B=B, magnitude=magnitude),)})


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
@pytest.mark.parametrize("name", ["dynamo", "legacy"])
@pytest.mark.parametrize("kind", [Scaled, Unbiased])
def test_a_scale_that_an_optimizer_folded(kind, name, level, method, tmp_path):
    """onnxruntime stores the product of the weight and the scale, under a name that it makes up."""
    torch.manual_seed(0)
    model = kind().eval()
    session = optimized(export(model, tmp_path / "plain.onnx", name), tmp_path / "session.onnx", level)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "base.safetensors")
    adapter = narrowed(model, method)
    wanted = model(X).detach()
    for change in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises((TargetNotFound, Unsupported), match=r"--base-weights DIR \(base_weights=\)"):
            change(session, adapter, tmp_path / "bad.onnx")
        report = change(session, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors")
        torch.testing.assert_close(torch.tensor(graphs.run(report.out, X)), wanted, atol=1e-5, rtol=1e-5)
        assert [target["folded_norm"] for target in report.record()["targets"]] == ["gamma"]
    slots = ak.onnx.inject(
        session, adapter, tmp_path / "slots.onnx", mode="slots", base_weights=tmp_path / "base.safetensors"
    )
    live = ak.onnx.Session(slots.out)
    live.load("one", adapter, base_weights=tmp_path / "base.safetensors")
    got = torch.tensor(next(iter(live.run({"x": X.numpy()}, "one").values())))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_scales_that_prove_nothing(tmp_path):
    """A base without the scale, and a base with two scales between which a rounded weight does not decide."""
    torch.manual_seed(0)
    model = Scaled().eval()
    session = optimized(export(model, tmp_path / "plain.onnx", "dynamo"), tmp_path / "session.onnx", "ORT_ENABLE_BASIC")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = narrowed(model, "lora")
    save_file({name: value for name, value in state.items() if name != "gamma"}, tmp_path / "bare.safetensors")
    why = r"narrow: .*Conv \S+ stores it with each output channel multiplied by a factor.*before it is optimized"
    with pytest.raises(TargetNotFound, match=why):
        ak.onnx.inject(session, adapter, tmp_path / "out.onnx", base_weights=tmp_path / "bare.safetensors")
    graph = onnx.load(session)
    for held in graph.graph.initializer:
        if held.dims == [3, 16, 1, 1]:
            W = onnx.numpy_helper.to_array(held)
            held.CopyFrom(onnx.numpy_helper.from_array((W * 20).round() / 20, held.name))
    onnx.save(graph, tmp_path / "rounded.onnx")
    save_file(state | {"other": state["gamma"] * 1.02}, tmp_path / "two.safetensors")
    with pytest.raises(TargetNotFound, match=r"narrow: .*scaled by gamma or by other"):
        ak.onnx.inject(
            tmp_path / "rounded.onnx", adapter, tmp_path / "out.onnx", base_weights=tmp_path / "two.safetensors"
        )
    assert not (tmp_path / "out.onnx").exists()


def test_vectors_near_one_do_not_make_quantized_layers_ambiguous(tmp_path):
    """As the weights of a LayerNorm, beside a layer in few bits that no scale was folded into."""
    torch.manual_seed(0)
    model = Scaled().eval()
    export(model, tmp_path / "plain.onnx", "dynamo")
    graph = onnx.load(tmp_path / "plain.onnx")
    for held in graph.graph.initializer:
        if held.dims == [3, 16, 1, 1]:
            W = onnx.numpy_helper.to_array(held)
            held.CopyFrom(onnx.numpy_helper.from_array((W * 20).round() / 20, held.name))
    onnx.save(graph, tmp_path / "rounded.onnx")
    near = {f"norm{i}.weight": 1 + 0.05 * torch.randn(3) for i in range(20)}
    save_file({**model.state_dict(), **near}, tmp_path / "base.safetensors")
    report = ak.onnx.inject(
        tmp_path / "rounded.onnx", narrowed(model, "lora"), tmp_path / "out.onnx",
        base_weights=tmp_path / "base.safetensors",
    )  # fmt: skip
    assert "folded_norm" not in report.record()["targets"][0]


def statically(source, out, form):
    """Quantize a graph by onnxruntime's static quantizer."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": 4 * X.numpy()}]

        def get_next(self):
            return self.left.pop() if self.left else None

    quantize_static(source, out, Once(), quant_format=getattr(QuantFormat, form), weight_type=QuantType.QInt8)


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_the_epsilon_of_a_norm_is_found_from_the_bias_of_a_quantized_graph(eps, form, tmp_path):
    """Eight bits round a weight by more than the epsilons differ, so the nearest weight often has a wrong one."""
    torch.manual_seed(0)
    layers = [(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps=eps)), (nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24, eps=eps)),
              (nn.Conv2d(24, 32, 1), nn.BatchNorm2d(32, eps=eps))]  # fmt: skip
    model = randomized(nn.Sequential(*(one for conv, norm in layers for one in (conv, norm, nn.ReLU()))))
    statically(export(model, tmp_path / "float.onnx", "legacy"), tmp_path / "q.onnx", form)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    updates = {ak.Target(str(3 * i)): (lora(conv.weight, i),) for i, (conv, _) in enumerate(layers)}
    report = ak.onnx.inject(
        tmp_path / "q.onnx", ak.Adapter(updates), tmp_path / "out.onnx", base_weights=tmp_path / "base.safetensors",
        check=False,
    )  # fmt: skip
    scales = {place.target.path: place.norm.scale for place in report.found}
    for i, (_, norm) in enumerate(layers):
        exact = (norm.weight.double() / (norm.running_var.double() + eps).sqrt()).detach().numpy()
        assert abs(scales[str(3 * i)] - exact).max() <= 1e-5 * abs(exact).max()


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_a_merge_behind_a_norm_of_a_quantized_graph_passes_its_check(form, exported, tmp_path):
    """DoRA scales the base's weight, not the rounded one; onnxruntime's quantizer rounds the product with the norm."""
    statically(exported / "Residual-legacy.onnx", tmp_path / "q.onnx", form)
    adapter, _ = adapter_of(of(Residual), "dora")
    report = ak.onnx.merge(
        tmp_path / "q.onnx", adapter, tmp_path / "out.onnx", base_weights=exported / "Residual.safetensors",
        quantized="dequantize",
    )  # fmt: skip
    assert report.difference < 1e-4

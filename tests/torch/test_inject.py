"""Injected adapters against plain models whose weights were changed by the formulas."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, TargetNotFound, UsageError
from adapterkit.io.lazy import as_torch
from adapterkit.methods import METHODS
from adapterkit.naming.binding import fold, view

OF_WEIGHTS = [name for name, cls in METHODS.items() if cls.kind in ("additive", "weight")]
IDS = torch.tensor([[0, 3], [15, 7]])
LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (2, 16), "out *in"),
    "stored in, out": (lambda: Conv1D(8, 16), (2, 16), "in out *k"),
    "conv1d": (lambda: nn.Conv1d(16, 8, 3, padding=1, padding_mode="reflect"), (2, 16, 6), "out *in"),
    "conv2d": (lambda: nn.Conv2d(16, 8, 3, stride=2, dilation=2, padding=2), (2, 16, 6, 6), "out *in"),
    "conv3d": (lambda: nn.Conv3d(16, 8, 2, padding="same", padding_mode="circular"), (1, 16, 4, 4, 4), "out *in"),
    "groups": (lambda: nn.Conv1d(32, 8, 3, groups=2), (2, 32, 6), "out *in"),
    "embedding": (lambda: nn.Embedding(16, 8), None, "in out *k"),
}


def model_and_input(kind, dtype):
    build, shape, layout = LAYERS[kind]
    model = nn.Sequential(build()).to(dtype)
    return model, IDS if shape is None else torch.randn(shape, dtype=dtype), layout


def merge(model, update, layout):
    """The plain model after the formulas alone."""
    target = Target("0", layout)
    layer = model[0]
    loaded = update.map(lambda leaf: as_torch(leaf, dtype=layer.weight.dtype)).settled(view(layer.weight, target))
    with torch.no_grad():
        layer.weight.copy_(view(fold((update,), view(layer.weight, target), False), target))
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(loaded.new_bias(layer.bias))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", OF_WEIGHTS)
@settings(max_examples=5)
@given(data=st.data())
def test_forward_is_merging_and_removing_leaves_no_trace(method, kind, data, made, close):
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, x, layout = model_and_input(kind, dtype)
        update = data.draw(made.updates(method=method, kernel=tuple(model[0].weight.shape[2:])))
        if kind == "embedding" and update.changes_bias and method != "ia3":
            return
        shape = tuple(model[0].weight.shape)
        if not made.takes(update, shape, layout):
            if any(made.takes(update, shape, other) for other in ("out *in", "in out *k")):
                return
            with pytest.raises(ShapeMismatch, match=method):
                ak.torch.inject(model, Adapter({Target("0", layout): (update,)}))
            return
        before, keys, y = trace(model), list(model.state_dict()), model(x)
        handle = ak.torch.inject(model, Adapter({Target("0", layout): (update,)}))
        got = model(x)
        assert list(model.state_dict()) == keys
        with handle.disable():
            assert torch.equal(model(x), y)
        handle.remove()
        assert trace(model) == before
        assert torch.equal(model(x), y)
        merge(model, update, layout)
        close(got, model(x), y, tolerance=tolerance)


@pytest.mark.parametrize("method", OF_WEIGHTS)
@settings(max_examples=3)
@given(data=st.data())
def test_rows_of_an_attentions_fused_weight(method, data, made, close):
    """The keys of `nn.MultiheadAttention` alone, whose weight is rows of a parameter that no layer of its own holds."""
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)}).double().eval()
    attn, x = model["attn"], torch.randn(2, 3, 16, dtype=torch.float64)
    update = data.draw(made.updates(method=method, kernel=()))
    target = Target("attn.in_proj_weight", rows=(16, 24))
    if not made.takes(update, (8, 16)):
        return
    y = attn(x, x, x)[0]
    handle = ak.torch.inject(model, Adapter({target: (update,)}))
    got = attn(x, x, x)[0]
    handle.remove()
    assert torch.equal(attn(x, x, x)[0], y)
    rows = slice(*target.rows)
    with torch.no_grad():
        W, b = attn.in_proj_weight[rows].clone(), attn.in_proj_bias[rows].clone()
        loaded = update.map(lambda leaf: as_torch(leaf, dtype=torch.float64)).settled(W)
        attn.in_proj_weight[rows] = loaded.new_weight(W) if loaded.changes_weight else W
        attn.in_proj_bias[rows] = loaded.new_bias(b) if loaded.changes_bias else b
    close(got, attn(x, x, x)[0], y, tolerance=1e-10)


def trace(model):
    """Everything that an injection could leave behind: attributes, hooks, parameters as objects, their bytes."""
    held = {name: dict(module.__dict__) for name, module in model.named_modules()}
    for attributes in held.values():
        attributes |= {key: dict(value) for key, value in attributes.items() if key.endswith("hooks")}
    parameters = {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return held, parameters, {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def lora(seed):
    g = torch.Generator().manual_seed(seed)
    return METHODS["lora"](A=torch.randn(2, 16, generator=g), B=torch.randn(8, 2, generator=g), scaling=0.5)


def test_several_adapters_routes_and_merging_in_place():
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(3, 16)
    y = model(x)
    one, two = (Adapter({Target("model.0"): (lora(seed),)}) for seed in (1, 2))
    a = ak.torch.inject(model, one, name="a")
    ya = model(x)
    b = ak.torch.inject(model, two, name="b", weight=0.5)
    torch.testing.assert_close(model(x) - ya, 0.5 * functional.linear(x, lora(2).delta((8, 16))), rtol=1e-4, atol=1e-5)
    with ak.torch.route(model, ["a", None, "b"]):
        routed = model(x)
    torch.testing.assert_close(routed[:2], torch.stack([ya[0], y[1]]), rtol=1e-5, atol=1e-5)
    expected = model(x)
    a.merge_()
    b.merge_()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="removed or merged"):
        a.remove()
    with pytest.raises(TargetNotFound):
        ak.torch.inject(model, Adapter({Target("nothing"): (lora(1),)}))


@pytest.mark.parametrize("name", ["attn.in_proj_weight", "attn.out_proj"])
def test_attention_projections(name):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True)}).double().eval()
    attn, x = model["attn"], torch.randn(2, 3, 8, dtype=torch.float64)
    out = 24 if "in_" in name else 8
    update = METHODS["lora"](A=torch.randn(2, 8).double(), B=torch.randn(out, 2).double())
    handle = ak.torch.inject(model, Adapter({Target(name): (update,)}))
    got = attn(x, x, x)[0]
    handle.remove()
    with torch.no_grad():
        W = attn.in_proj_weight if out == 24 else attn.out_proj.weight
        W += update.delta((out, 8))
    torch.testing.assert_close(got, attn(x, x, x)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_touches_the_handles_parameters_alone(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).to(dtype).requires_grad_(False), torch.randn(32, 16, dtype=dtype)
    goal = torch.randn(32, 8, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = ak.torch.create(model, "lora", rank=4, alpha=8)
    y = model(x)
    handle = ak.torch.inject(model, fresh, trainable=True)
    assert torch.equal(model(x), y), "a fresh LoRA changes nothing"
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = functional.mse_loss(model(x), goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trained = handle.adapter()
    now = model(x)
    handle.remove()
    ak.torch.inject(model, trained)
    torch.testing.assert_close(model(x), now)


class Experts(nn.Module):
    """Stacked experts whose forward is their own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 8, dtype=torch.float64))

    def forward(self, x):
        return torch.relu(torch.einsum("eoi,bi->beo", self.up, x))


def test_stacked_experts_change_under_their_own_forward():
    model, x = nn.ModuleDict({"moe": Experts()}), torch.randn(4, 8, dtype=torch.float64)
    A, B = torch.randn(3, 2, 8).double(), torch.randn(3, 6, 2).double()
    update = METHODS["lora"](A=A, B=B, scaling=0.5)
    before = dict(model["moe"].__dict__)
    handle = ak.torch.inject(model, Adapter({Target("moe.up", "e out *in"): (update,)}), weight=0.5)
    got = model["moe"](x)
    handle.remove()
    assert model["moe"].__dict__ == before
    with torch.no_grad():
        model["moe"].up += 0.25 * B @ A
    torch.testing.assert_close(got, model["moe"](x), rtol=1e-10, atol=1e-10)

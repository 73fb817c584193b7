"""Injection beyond one update at one plain layer, against models whose stored parameters were changed by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.methods import METHODS


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lora(out, into, *kernel, seed=0, dtype=torch.float64, experts=()):
    A, B = draw(*experts, 2, into, *kernel, seed=seed, dtype=dtype), draw(*experts, out, 2, seed=seed + 9, dtype=dtype)
    return METHODS["lora"](A=A, B=B, scaling=0.5)


def product(update):
    """The change of a LoRA `[out, in * k]`, by its factors alone."""
    return 0.5 * update.B @ update.A.flatten(update.B.ndim - 1)


def changed(model, edit):
    """A copy of a model whose parameters `edit` changed."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        edit(other)
    return other


NORMS = {"layer": lambda: nn.LayerNorm(8), "rms": lambda: nn.RMSNorm(8), "group": lambda: nn.GroupNorm(2, 8)}


@pytest.mark.parametrize("method", ["replacement", "dense", "ia3"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(kind, method, close):
    model, x = nn.Sequential(NORMS[kind]()).double(), draw(3, 8, seed=1)
    v, c = draw(8, seed=2), draw(8, seed=3)
    has_bias = kind != "rms"
    update, weight, bias = {
        "replacement": (METHODS["replacement"](weight=v, bias=c if has_bias else None), v, c),
        "dense": (METHODS["dense"](D=v, d=c if has_bias else None), 1 + v, c),
        "ia3": (METHODS["ia3"](l=v), v, torch.zeros(8)),
    }[method]

    def edit(plain):
        plain[0].weight.copy_(weight)
        if has_bias:
            plain[0].bias.copy_(bias)

    wanted = changed(model, edit)(x)
    ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    close(model(x), wanted, tolerance=1e-12)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_slices_of_a_fused_weight(method, close):
    """q and v of a fused qkv: each update sees its rows of the weight and of the bias alone."""
    model, x = nn.Sequential(nn.Linear(6, 12)).double(), draw(3, 6, seed=1)
    q, v, s = lora(4, 6, seed=2), lora(4, 6, seed=3), draw(4, seed=4)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    V = W[8:] + product(v)
    second, weight, bias = {
        "lora": (v, V, b[8:]),
        "dora": (
            METHODS["dora"](A=v.A, B=v.B, scaling=0.5, magnitude=s),
            V / torch.linalg.vector_norm(V, dim=1, keepdim=True) * s[:, None],
            b[8:],
        ),
        "ia3": (METHODS["ia3"](l=s), W[8:] * s[:, None], b[8:] * s),
    }[method]
    ak.torch.inject(model, Adapter({Target("0", rows=(0, 4)): (q,), Target("0", rows=(8, 12)): (second,)}))
    W[:4] += product(q)
    W[8:], b[8:] = weight, bias
    close(model(x), functional.linear(x, W, b), tolerance=1e-12)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_several_updates_at_one_target_apply_in_order(weight, close):
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(3, 6, seed=1)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    first, s = lora(4, 6, seed=2), draw(4, seed=3)
    for updates, after in (
        ((first, METHODS["ia3"](l=s)), (W + product(first)) * s[:, None]),
        ((METHODS["ia3"](l=s), first), W * s[:, None] + product(first)),
    ):
        handle = ak.torch.inject(model, Adapter({Target("0"): updates}), weight=weight)
        new = W + weight * (after - W), b + weight * (b * s - b)
        close(model(x), functional.linear(x, *new), tolerance=1e-12)
        handle.remove()


def test_adapters_with_weights_are_summed_each_over_the_plain_base(close):
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(3, 6, seed=1)
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    one, s = lora(4, 6, seed=2), draw(4, seed=3)
    a = ak.torch.inject(model, Adapter({Target("0"): (one,)}), name="a", weight=0.25)
    c = ak.torch.inject(model, Adapter({Target("0"): (METHODS["ia3"](l=s),)}), name="c", weight=2.0)

    def wanted(first, second):
        scale = 1 + second * (s - 1)
        return functional.linear(x, scale[:, None] * W + first * product(one), scale * b)

    close(model(x), wanted(0.25, 2), tolerance=1e-12)
    a.weight = -1.5
    close(model(x), wanted(-1.5, 2), tolerance=1e-12)
    a.set_active(False)
    close(model(x), wanted(0, 2), tolerance=1e-12)
    with c.disable():
        assert torch.equal(model(x), functional.linear(x, W, b))
    a.set_active(True)
    c.remove()
    close(model(x), wanted(-1.5, 0), tolerance=1e-12)


def test_a_disabled_adapter_comes_back_after_an_error():
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(3, 6)
    handle = ak.torch.inject(model, Adapter({Target("0"): (lora(4, 6),)}))
    y = model(x)
    with pytest.raises(RuntimeError), handle.disable():
        raise RuntimeError
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions(groups, close):
    model, x = nn.Sequential(nn.Conv2d(8, 4, 3, groups=groups, padding=1)).double(), draw(2, 8, 5, 5, seed=1)
    update = lora(4, 8 // groups, 3, 3)

    def edit(plain):
        plain[0].weight += product(update).reshape(plain[0].weight.shape)

    wanted = changed(model, edit)(x)
    ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    close(model(x), wanted, tolerance=1e-12)


@pytest.mark.parametrize("kdim", [8, 6])
def test_every_projection_of_an_attention(kdim, close):
    """Packed weights, and those apart when keys are of another width; in training mode and on the fused path."""
    attn = nn.MultiheadAttention(8, 2, kdim=kdim, batch_first=True).double()
    model, x, key = nn.ModuleDict({"attn": attn}), draw(2, 3, 8, seed=1), draw(2, 4, kdim, seed=2)
    names = ["in_proj_weight"] if kdim == 8 else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    names += ["out_proj.weight"]
    updates = {name: lora(*attn.get_parameter(name).shape, seed=seed) for seed, name in enumerate(names)}
    value = key if kdim == 8 else draw(2, 4, 8, seed=3)

    def edit(plain):
        for name, update in updates.items():
            plain.attn.get_parameter(name).add_(product(update))

    wanted = changed(model, edit)
    ak.torch.inject(model, Adapter({Target(f"attn.{name}"): (u,) for name, u in updates.items()}))
    for mode in (True, False):
        for net in (model, wanted):
            net.train(mode)
        with torch.set_grad_enabled(mode):
            close(attn(x, key, value)[0], wanted.attn(x, key, value)[0], tolerance=1e-12)


def test_recurrent_layers(close):
    model, x = nn.ModuleDict({"rnn": nn.LSTM(6, 4, batch_first=True)}).double(), draw(2, 5, 6, seed=1)
    update = lora(16, 6)

    def edit(plain):
        plain.rnn.weight_ih_l0.add_(product(update))
        plain.rnn.flatten_parameters()

    plain, wanted = model.rnn(x)[0], changed(model, edit).rnn(x)[0]
    handle = ak.torch.inject(model, Adapter({Target("rnn.weight_ih_l0"): (update,)}))
    close(model.rnn(x)[0], wanted, tolerance=1e-12)
    handle.remove()
    assert torch.equal(model.rnn(x)[0], plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "loha"])
def test_sixteen_bits(method, dtype, close):
    """Within two units in the last place of the largest output: less than that, the base's own product is off by."""
    model, x = nn.Sequential(nn.Linear(64, 32)).to(dtype), draw(5, 64, seed=1, dtype=dtype)
    A, B, v = (draw(*shape, seed=seed, dtype=torch.float32) / 8 for seed, shape in enumerate([(2, 64), (32, 2), (32,)]))
    update = {
        "lora": lambda: METHODS["lora"](A=A, B=B),
        "dora": lambda: METHODS["dora"](A=A, B=B, magnitude=v),
        "ia3": lambda: METHODS["ia3"](l=1 + v),
        "loha": lambda: METHODS["loha"](w1_a=B, w1_b=A, w2_a=B + 1, w2_b=A - 1),
    }[method]()
    W, b = model[0].weight.detach().double(), model[0].bias.detach().double()
    wide = update.map(lambda leaf: leaf.double())
    wanted = functional.linear(x.double(), wide.new_weight(W), wide.new_bias(b))
    plain = model(x)
    for trainable in (False, True):
        handle = ak.torch.inject(model, Adapter({Target("0"): (update,)}), trainable=trainable)
        got = model(x)
        assert got.dtype == dtype
        close(got.double(), wanted, plain, tolerance=2 * torch.finfo(dtype).eps)
        handle.remove()
        assert torch.equal(model(x), plain)


def test_sixteen_bit_formulas_of_the_weight_are_rounded_once():
    """A trained change far below a bfloat16's last place is not lost on the way to the new weight."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False)).bfloat16()
    W = model[0].weight.detach().float()
    magnitude = torch.linalg.vector_norm(W, dim=1) * (1 + 2**-9)
    update = METHODS["dora"](A=torch.zeros(1, 64), B=torch.zeros(32, 1), magnitude=magnitude)
    ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    assert torch.equal(model(torch.eye(64).bfloat16()).T, (W * (1 + 2**-9)).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_handle_gives_back_the_numbers_it_was_given(dtype):
    """Also where the base's own dtype could not hold them."""
    model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    update = lora(4, 6, dtype=torch.float32)
    handle = ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    ((_, back),) = handle.adapter()
    assert all(torch.equal(leaf, update.tensors[name]) for name, leaf in back.tensors.items())


class Experts(nn.Module):
    """Stacked experts whose forward is their own."""

    def __init__(self, layout):
        super().__init__()
        self.turned = layout == "e in out *k"
        self.up = nn.Parameter(draw(*((3, 8, 6) if self.turned else (3, 6, 8)), seed=7))

    def forward(self, x):
        return torch.einsum("eio,bi->beo" if self.turned else "eoi,bi->beo", self.up, x)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("layout", ["e out *in", "e in out *k"])
def test_stacked_experts(layout, method, close):
    model, x = nn.ModuleDict({"moe": Experts(layout)}), draw(4, 8)
    pair, s = lora(6, 8, experts=(3,)), draw(3, 6, seed=4)
    W = model["moe"].up.detach()
    W = W.mT if layout == "e in out *k" else W
    V = W + product(pair)
    update, new = {
        "lora": (pair, V),
        "dora": (
            METHODS["dora"](A=pair.A, B=pair.B, scaling=0.5, magnitude=s),
            V / torch.linalg.vector_norm(V, dim=2, keepdim=True) * s[:, :, None],
        ),
        "ia3": (METHODS["ia3"](l=s), W * s[:, :, None]),
    }[method]
    wanted = torch.einsum("eoi,bi->beo", new, x)
    handle = ak.torch.inject(model, Adapter({Target("moe.up", layout): (update,)}))
    close(model["moe"](x), wanted, tolerance=1e-12)
    handle.merge_()
    close(model["moe"](x), wanted, tolerance=1e-12)


def test_a_copied_model_keeps_its_adapter_apart():
    model, x = nn.Sequential(nn.Linear(6, 4)).double(), draw(3, 6)
    handle = ak.torch.inject(model, Adapter({Target("0"): (lora(4, 6),)}))
    y, twin = model(x), copy.deepcopy(model)
    handle.remove()
    assert torch.equal(twin(x), y)
    assert not torch.equal(model(x), y)

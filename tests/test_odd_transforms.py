"""Odd situations of models that a tool rewrites: scripts, fused norms, exports, copies of single layers.

Each gives what the formula gives, or a typed error, as in test_odd_situations.py, which lists those of single modules.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Unsupported
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = {}


def odd(name, raises=None, match=""):
    """List a situation."""

    def take(function):
        assert name not in SITUATIONS
        SITUATIONS[name] = (function, raises, match)
        return function

    return take


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(out, into, *kernel, seed=0, rank=2):
    return METHODS["lora"](A=draw(rank, into, *kernel, seed=seed), B=draw(out, rank, seed=seed + 50), scaling=0.25)


def inject(model, target="0", out=8, into=16, *kernel, **rest):
    return ak.torch.inject(model, Adapter({Target(target): (lora(out, into, *kernel),)}), **rest)


def changed(W, seed=0):
    """W + D of the LoRA that `inject` attaches."""
    update = lora(W.shape[0], W.shape[1], *W.shape[2:], seed=seed)
    return W + update.delta(tuple(W.shape)).to(W)


def one():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8)).double()


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).double()


X = draw(3, 16, seed=7)


@odd("torch.jit.script of a model with an adapter", raises=Unsupported, match="torch.jit.script.*merge_")
def _():
    model = one()
    inject(model)
    torch.jit.script(model)


@odd("torch.jit.script of the adapted layer alone", raises=Unsupported, match="torch.jit.script")
def _():
    model = one()
    inject(model)
    torch.jit.script(model[0])


@odd("torch.jit.script inside a copy of the model", raises=Unsupported, match="torch.jit.script")
def _():
    model = two()
    inject(model)
    torch.jit.script(copy.deepcopy(model))


@odd("torch.jit.script after the adapter is merged")
def _():
    model = one()
    W = changed(model[0].weight).detach()
    inject(model).merge_()
    return torch.jit.script(model)(X), functional.linear(X, W, model[0].bias)


@odd("torch.jit.script after the adapter is removed")
def _():
    model = one()
    inject(model).remove()
    return torch.jit.script(model)(X), functional.linear(X, model[0].weight, model[0].bias)


def normed(bias=True):
    """A convolution and its norm, as they are at inference."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8)).double().eval()
    model[1].running_mean.copy_(draw(8))
    model[1].running_var.copy_(draw(8).abs() + 0.5)
    return model


@odd("fuse_conv_bn_eval of an adapted convolution", raises=Unsupported, match="0: .*merge_")
def _():
    model = normed()
    inject(model, "0", 8, 4, 3, 3)
    fuse_conv_bn_eval(model[0], model[1])(draw(2, 4, 6, 6))


@odd("fuse_conv_bn_eval of an adapted convolution without a bias", raises=Unsupported, match="merge_")
def _():
    model = normed(bias=False)
    inject(copy.deepcopy(model), "0", 8, 4, 3, 3)  # The hook of another copy must not count for this one.
    inject(model, "0", 8, 4, 3, 3)
    model = copy.deepcopy(model)
    fuse_conv_bn_eval(model[0], model[1])(draw(2, 4, 6, 6))


@odd("fuse_linear_bn_eval of an adapted layer", raises=Unsupported, match="merge_")
def _():
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)).double().eval()
    inject(model)
    fuse_linear_bn_eval(model[0], model[1])(X)


@odd("torch.fx's fusion of an adapted convolution and its norm", raises=Unsupported, match="merge_")
def _():
    from torch.fx.experimental import optimization  # It warns of torch.jit when it is imported.

    model = normed()
    inject(model, "0", 8, 4, 3, 3)
    optimization.fuse(model)(draw(2, 4, 6, 6))


@odd("fuse_conv_bn_eval after the adapter is merged")
def _():
    model, x = normed(), draw(2, 4, 6, 6)
    wanted = model[1](functional.conv2d(x, changed(model[0].weight), model[0].bias))
    inject(model, "0", 8, 4, 3, 3).merge_()
    return fuse_conv_bn_eval(model[0], model[1])(x), wanted


@odd("a copied model takes a checkpoint by assign=True")
def _():
    model = two()
    inject(model)
    other = copy.deepcopy(model)
    other.load_state_dict({name: tensor.clone() * 2 for name, tensor in model.state_dict().items()}, assign=True)
    W, b = model[0].weight * 2, model[0].bias * 2
    hidden = functional.linear(X, changed(W), b)
    return other(X), functional.linear(hidden, model[1].weight * 2, model[1].bias * 2)


def test_there_are_ten():
    assert len(SITUATIONS) >= 10


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    function, raises, match = SITUATIONS[name]
    if raises is not None:
        with pytest.raises(raises, match=match):
            function()
        return
    got, wanted = function()
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.detach().double(), wanted.detach().double(), rtol=1e-6, atol=1e-6)

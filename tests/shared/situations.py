"""The list of situations, a small model, and a LoRA with a known change, for the tests of odd situations."""

import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.methods import METHODS


class Situations(dict):
    """Situations by name: functions that return the output of a model and that of the formula, or raise."""

    def odd(self, name, raises=None, match=""):
        """List a situation, with the error that it must raise if it is not supported."""

        def take(function):
            assert name not in self
            self[name] = (function, raises, match)
            return function

        return take

    def check(self, name):
        """Run a situation: the output must be right within one millionth, or the listed error must be raised."""
        function, raises, match = self[name]
        if raises is not None:
            with pytest.raises(raises, match=match):
                function()
            return
        got, wanted = function()
        assert got.shape == wanted.shape
        torch.testing.assert_close(got.detach().double(), wanted.detach().double(), rtol=1e-6, atol=1e-6)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(out, into, *kernel, seed=0, rank=2):
    return METHODS["lora"](A=draw(rank, into, *kernel, seed=seed), B=draw(out, rank, seed=seed + 50), scaling=0.25)


def adapter(target="0", out=8, into=16, *kernel, seed=0):
    return Adapter({Target(target): (lora(out, into, *kernel, seed=seed),)})


def inject(model, target="0", out=8, into=16, *kernel, seed=0, **rest):
    return ak.torch.inject(model, adapter(target, out, into, *kernel, seed=seed), **rest)


def changed(W, seed=0):
    """Return W + D for the LoRA that `inject` attaches."""
    update = lora(W.shape[0], W.shape[1], *W.shape[2:], seed=seed)
    return W + update.delta(tuple(W.shape)).to(W)


def one():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8)).double()


X = draw(3, 16, seed=7)

"""A module computes with exchanged values and has its own again afterwards, also in the hands of a compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.methods.replacement import Replacement
from adapterkit.torch.weights import exchanged


class Doubled(nn.Module):
    """A layer with a forward of its own, whose bias may be None."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        self.register_parameter("bias", nn.Parameter(torch.ones(4)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_layer_has_its_own_values_again(bias: bool) -> None:
    module, x = Doubled(bias), torch.randn(2, 3)
    weight, new = module.weight, {"weight": torch.ones(4, 3), "bias": torch.full((4,), 3.0)}

    def run(x: Tensor) -> Tensor:
        with exchanged(module, new):
            return module(x)

    compiled = torch.compile(run, backend="eager")
    for function in (run, compiled, compiled):
        torch.testing.assert_close(function(x), 2 * functional.linear(x, new["weight"], new["bias"]))
        assert module.weight is weight
        assert (module.bias is None) is not bias
        assert list(module._parameters) == ["weight", "bias"]
    torch.testing.assert_close(module(x), 2 * functional.linear(x, weight, module.bias))


def test_a_compiled_layer_with_a_forward_of_its_own_computes_with_an_adapters_bias() -> None:
    model, x = nn.Sequential(Doubled(bias=True)), torch.randn(2, 3)
    own, plain, bias = model[0].bias, model(x), torch.arange(4.0)
    handle = ak.torch.inject(model, Adapter({Target("0"): (Replacement(bias=bias),)}))
    compiled = torch.compile(model, backend="eager")
    for function in (model, compiled, compiled, model):
        torch.testing.assert_close(function(x), plain + 2 * (bias - 1))
    handle.remove()
    assert model[0].bias is own
    torch.testing.assert_close(model(x), plain)


def test_values_come_back_after_an_error() -> None:
    module = Doubled(bias=True)
    before = module.weight
    with pytest.raises(RuntimeError, match="shape"), exchanged(module, {"weight": torch.ones(7, 7)}):
        module(torch.randn(2, 3))
    assert module.weight is before
    assert "weight" not in module.__dict__

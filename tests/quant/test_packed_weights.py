"""Layers of quantization libraries, told by what they have in common; small modules of the same make stand for them.

`tools/foreign/check_quantized_live.py` runs the libraries themselves, `check_quantized_models.py` whole models.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported
from adapterkit.methods import METHODS

LEVELS = 7.0


def rounded(W):
    """Numbers of three bits and a scale for each output."""
    scale = W.abs().amax(1, keepdim=True) / LEVELS
    return (W / scale).round().clamp(-LEVELS, LEVELS), scale


class PackedTensor(torch.Tensor):
    """torchao's make: a subclass that knows products and `dequantize`, and nothing else."""

    @staticmethod
    def __new__(cls, whole, scale):
        made = torch.Tensor._make_wrapper_subclass(cls, scale.expand(whole.shape).shape, dtype=scale.dtype)
        made.whole, made.scale = whole, scale
        return made

    def dequantize(self, dtype=None):
        return self.whole.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is functional.linear:
            x, W, *b = args
            return functional.linear(x, W.dequantize(), *b, **(kwargs or {}))
        if getattr(function, "__name__", "") in (
            "__get__",
            "detach",
            "requires_grad_",
            "is_floating_point",
            "data_ptr",
        ):
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(f"{function} of a packed tensor")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return PackedTensor(args[0].whole, args[0].scale)
        raise NotImplementedError(f"{function} of a packed tensor")


def by_tensor(layer):
    layer.weight = nn.Parameter(PackedTensor(*rounded(layer.weight.detach())), requires_grad=False)
    return layer


class Buffers(nn.Module):
    """GPTQ's and AWQ's make: integers and scales as buffers, no weight, and no method in common that unpacks."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        whole, scale = rounded(layer.weight.detach())
        self.register_buffer("qweight", whole.to(torch.int32).T.contiguous())
        self.register_buffer("scales", scale.T.contiguous())

    def forward(self, x):
        return functional.linear(x, (self.qweight * self.scales).T, self.bias)


class InForward(nn.Linear):
    """quanto's make before it is frozen: a float weight that each forward quantizes."""

    @property
    def qweight(self):
        return PackedTensor(*rounded(self.weight.detach()))

    def forward(self, x):
        return functional.linear(x, self.qweight.dequantize(), self.bias)


def in_forward(layer):
    made = InForward(layer.in_features, layer.out_features).to(layer.weight.dtype)
    made.load_state_dict(layer.state_dict())
    return made


class ByMethod(nn.Module):
    """HQQ's make: the packed numbers in a parameter of integers, a method that unpacks them."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        whole, self.scale = rounded(layer.weight.detach())
        self.W_q = nn.Parameter(whole.to(torch.int8), requires_grad=False)

    def dequantize(self):
        return self.W_q.to(self.scale.dtype) * self.scale

    def forward(self, x):
        return functional.linear(x, self.dequantize(), self.bias)


MAKES = {"tensor": by_tensor, "buffers": Buffers, "in forward": in_forward, "method": ByMethod}


def packed(make):
    """A model of one packed layer, what its weight stands for, and its bias."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16).double()
    whole, scale = rounded(layer.weight.detach())
    bias = layer.bias.detach().clone()
    return nn.ModuleDict({"fc": MAKES[make](layer)}), whole * scale, bias


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


UPDATES = {
    "lora": METHODS["lora"](A=draw(2, 32, seed=1), B=draw(16, 2, seed=2), scaling=0.01),
    "loha": METHODS["loha"](
        w1_a=draw(16, 2, seed=1), w1_b=draw(2, 32, seed=2), w2_a=draw(16, 2, seed=3), w2_b=draw(2, 32, seed=4)
    ),
    "dora": METHODS["dora"](A=draw(2, 32, seed=1), B=draw(16, 2, seed=2), magnitude=draw(16, seed=3).abs()),
    "ia3": METHODS["ia3"](l=draw(16, seed=3)),
}
X = draw(5, 32, seed=9)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("method", UPDATES)
@pytest.mark.parametrize("make", MAKES)
def test_forward_is_that_of_the_weight_it_stands_for(make, method, weight, close):
    """A change of a hundredth of a level is not rounded away: it stands beside the packed weight."""
    model, W, b = packed(make)
    plain, update = model["fc"](X), UPDATES[method]
    close(plain, functional.linear(X, W, b), tolerance=1e-12)
    handle = ak.torch.inject(model, Adapter({Target("fc"): (update,)}), weight=weight)
    V, c = update.new_weight(W), update.new_bias(b)
    close(model["fc"](X), functional.linear(X, W + weight * (V - W), b + weight * (c - b)), tolerance=1e-10)
    handle.remove()
    assert torch.equal(model["fc"](X), plain)


@pytest.mark.parametrize("make", MAKES)
def test_training_and_routes(make, close):
    model, W, b = packed(make)
    created = ak.torch.create(model, "dora", targets="fc", rank=2)
    ((_, update),) = created
    close(update.magnitude.double(), W.norm(dim=1), tolerance=1e-6)
    created = ak.torch.create(model, "lora", rank=2).map(lambda leaf: leaf.double() + 0.1)
    handle = ak.torch.inject(model, created, trainable=True, name="a")
    model["fc"](X).square().sum().backward()
    A, B = handle.parameters()
    y = functional.linear(X, W + B @ A, b).detach()
    close(B.grad, 2 * y.T @ (X @ A.T), tolerance=1e-10)
    close(A.grad, 2 * (y @ B).T @ X, tolerance=1e-10)
    ak.torch.inject(model, Adapter({Target("fc"): (UPDATES["lora"],)}), name="b")
    with ak.torch.route(model, ["a", None, "b", "b", "a"]):
        got = model["fc"](X)
    for row, V in enumerate([W + B @ A, W, UPDATES["lora"].new_weight(W), UPDATES["lora"].new_weight(W), W + B @ A]):
        close(got[row], functional.linear(X[row], V, b), tolerance=1e-10)


@pytest.mark.parametrize("make", MAKES)
def test_what_is_refused_changes_nothing(make):
    model, _, _ = packed(make)
    plain = model["fc"](X)
    handle = ak.torch.inject(model, Adapter({Target("fc"): (UPDATES["lora"],)}))
    y = model["fc"](X)
    with pytest.raises(NotMergeable, match="fc: the weight is quantized, and would have to be quantized again"):
        handle.merge_()
    assert torch.equal(model["fc"](X), y)
    handle.remove()
    with pytest.raises(Unsupported, match=r"fc\[0:8\]: only a part of the packed weight"):
        ak.torch.inject(model, Adapter({Target("fc", rows=(0, 8)): (METHODS["lora"](A=draw(2, 32), B=draw(8, 2)),)}))
    assert torch.equal(model["fc"](X), plain)

"""Adapters beside bitsandbytes' packed weights, which stay as they are; where that library is installed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported
from adapterkit.methods import METHODS

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "nf4": lambda: bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4"),
    "fp4": lambda: bnb.nn.LinearFP4(64, 32, compute_dtype=torch.float32),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(kind):
    """A model of one layer, the weight it stands for by the library's own forward of unit vectors, and its bias."""
    torch.manual_seed(0)
    layer = KINDS[kind]()
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    model = nn.ModuleDict({"fc": layer}).to("cpu")
    b = model["fc"].bias.detach()
    return model, (model["fc"](torch.eye(64)) - b).T.detach(), b


def updates():
    A, B, v = draw(2, 64, seed=1), draw(32, 2, seed=2), draw(32, seed=3).abs()
    dora = METHODS["dora"](A=A, B=B, magnitude=v)
    return {
        "lora": (METHODS["lora"](A=A, B=B, scaling=0.5), lambda W, b: (W + 0.5 * B @ A, b)),
        "ia3": (METHODS["ia3"](l=v), lambda W, b: (W * v[:, None], b * v)),
        "dora": (dora, lambda W, b: (functional.normalize(W + B @ A, dim=1) * v[:, None], b)),
    }


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("method", ["lora", "ia3", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, method, weight, close):
    model, W, b = quantized(kind)
    update, formula = updates()[method]
    x = draw(5, 64, seed=4)
    packed = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    plain = model["fc"](x)
    handle = ak.torch.inject(model, Adapter({Target("fc"): (update,)}), weight=weight)
    V, c = formula(W, b)
    # The library multiplies in 8 bits, or rounds on the way: its own error beside the weight that it stands for.
    own = float((plain - functional.linear(x, W, b)).abs().max() / plain.abs().max())
    close(model["fc"](x), functional.linear(x, W + weight * (V - W), b + weight * (c - b)), plain, tolerance=own + 1e-5)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in packed.items())
    handle.remove()
    assert torch.equal(model["fc"](x), plain)


def test_training_reaches_the_handle_alone(close):
    model, W, b = quantized("nf4")
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=2), trainable=True)
    x = draw(5, 64, seed=4)
    torch.testing.assert_close(model["fc"](x), functional.linear(x, W, b), rtol=1e-4, atol=1e-4)
    model["fc"](x).square().sum().backward()
    A, B = handle.parameters()
    y = functional.linear(x, W, b).detach()
    close(B.grad, 2 * y.T @ (x @ A.T), tolerance=1e-4)


def test_what_a_packed_weight_cannot_take():
    model, _, _ = quantized("nf4")
    lora, _ = updates()["lora"]
    with pytest.raises(Unsupported, match=r"fc\[0:32\]: only a part of the packed weight of a Linear4bit.*unquantized"):
        ak.torch.inject(model, Adapter({Target("fc", rows=(0, 32)): (lora,)}))
    handle = ak.torch.inject(model, Adapter({Target("fc"): (lora,)}))
    with pytest.raises(
        NotMergeable, match=r"fc: the weight is quantized, and would have to be quantized again. Keep the adapter"
    ):
        handle.merge_()

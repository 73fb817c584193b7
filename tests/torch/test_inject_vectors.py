"""Every method of weights live at every layout of its vector, against the outputs that float64 numpy gives there.

The modules compute by a forward of their own, so that it is the weight that is exchanged: experts, rows of fused
weights, transposed convolutions, norms. Formulas over layers that have them are in test_inject.py.
"""

import pytest
import torch
from method_vectors import CASES, opened
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.naming.binding import view


class Plain(nn.Module):
    """What torch does with a weight that is stored in some layout."""

    def __init__(self, layout, weight, bias):
        super().__init__()
        self.layout, self.weight = layout, nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x):
        W, b = self.weight, self.bias
        if not x.is_floating_point():
            return functional.embedding(x, W)
        if self.layout.startswith("e "):
            y = x @ view(W, Target("", self.layout)).mT
            return y if b is None else y + b[:, None]
        if W.ndim == 1:
            return x * W if b is None else x * W + b
        if self.layout == "in out *k":
            return functional.linear(x, W.T, b) if W.ndim == 2 else functional.conv_transpose2d(x, W, b)
        return (functional.linear, functional.conv1d, functional.conv2d)[W.ndim - 2](x, W, b)


@torch.no_grad()
@pytest.mark.parametrize(("method", "path"), CASES)
def test_a_live_module_gives_the_vectors_output(method, path):
    _, base, sites = opened(method)
    site, wanted = sites[path], base.tensors[f"{path}.y"].torch()
    held = {name: base.tensors[f"{path}.{name}"].torch() for name in ("weight", "x")}
    bias = None if site.bias is None else base.tensors[site.bias].torch()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = nn.ModuleDict({"m": Plain(site.target.layout, held["weight"], bias)}).to(dtype)
        x = held["x"].to(dtype) if held["x"].is_floating_point() else held["x"]
        y, target = model["m"](x), Target("m", site.target.layout, site.target.rows)
        handle = ak.torch.inject(model, Adapter({target: site.updates}), weight=1.0)
        got = model["m"](x)
        handle.weight = 0.5
        half = model["m"](x)
        handle.remove()
        assert torch.equal(model["m"](x), y)
        size = max(1.0, float(wanted.abs().max()), float(y.abs().max()))
        assert got.dtype == dtype
        assert float((got.double() - wanted).abs().max()) <= tolerance * size
        assert float((half.double() - (y.double() + wanted) / 2).abs().max()) <= tolerance * size

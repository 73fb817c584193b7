"""Odd situations of models that a tool rewrites or differentiates: scripts, fused norms, copies, autocast.

Each gives what the formula gives, or a typed error, as in test_odd_situations.py, which lists those of single modules.
"""

import copy
import functools

import pytest
import torch
from situations import Situations, X, changed, draw, inject, one
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Unsupported
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8)).double()


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


def linear(layer):
    return functional.linear(X.to(layer.weight.dtype), changed(layer.weight), layer.bias)


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


@odd("a copied layer in another dtype, with parameters made anew")
def _():
    model = one()
    inject(model)
    layer = copy.deepcopy(model[0])
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        layer.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    return layer(X.float()), linear(model[0].float())


@odd("a copied model takes a checkpoint by assign=True")
def _():
    model = two()
    inject(model)
    other = copy.deepcopy(model)
    other.load_state_dict({name: tensor.clone() * 2 for name, tensor in model.state_dict().items()}, assign=True)
    W, b = model[0].weight * 2, model[0].bias * 2
    hidden = functional.linear(X, changed(W), b)
    return other(X), functional.linear(hidden, model[1].weight * 2, model[1].bias * 2)


# Differentiation and precision.


def single(method="lora", **rest):
    """A layer in float32 with a trained adapter, and its formula over the adapter's own tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    fields = {"A": draw(2, 16).float(), "B": draw(8, 2, seed=50).float(), "scaling": 0.25}
    if method == "dora":
        fields["magnitude"] = draw(8, seed=9).float().abs() + 0.5
    adapter = Adapter({Target("0"): (METHODS[method](**fields),)})
    handle = ak.torch.inject(model, adapter, trainable=True, **rest)

    def formula(x, A, B, magnitude=None):
        V = model[0].weight + 0.25 * B @ A
        if magnitude is not None:
            V = V * (magnitude / V.detach().norm(dim=1)).unsqueeze(1)
        return functional.linear(x, V, model[0].bias)

    return model, handle, formula


def wide():
    """An input beyond which the functions that keep no activations are used."""
    return torch.randn(600, 16, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 20).reshape(-1, 16)


for method in ("lora", "dora"):

    @odd(f"forward-mode differentiation of an input, {method}")
    def _(method=method):
        model, handle, formula = single(method)
        t = draw(3, 16, seed=3).float()
        _, got = torch.func.jvp(model, (X.float(),), (t,))
        _, wanted = torch.func.jvp(lambda x: formula(x, *handle.parameters()), (X.float(),), (t,))
        return got, wanted

    @odd(f"forward-mode differentiation of the adapter, {method}")
    def _(method=method):
        model, handle, formula = single(method)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        values = {name: p.detach() for name, p in zip(names, handle.parameters(), strict=True)}
        along = {name: draw(*p.shape, seed=4).float() for name, p in values.items()}
        _, got = torch.func.jvp(lambda d: torch.func.functional_call(model, d, (X.float(),)), (values,), (along,))
        _, wanted = torch.func.jvp(lambda d: formula(X.float(), *d.values()), (values,), (along,))
        return got, wanted

    @odd(f"gradients of a gradient's length, {method}")
    def _(method=method):
        model, handle, formula = single(method)

        def of(run):
            x = X.float().requires_grad_()
            (slope,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad(slope.square().sum(), list(handle.parameters()))]
            )

        got, wanted = of(model), of(lambda x: formula(x, *handle.parameters()))
        scale = wanted.abs().max()
        return got / scale, wanted / scale

    @odd(f"selective checkpointing that keeps products, {method}")
    def _(method=method):
        model, handle, formula = single(method)
        model.double()
        keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        contexts = functools.partial(create_selective_checkpoint_contexts, keep)
        x = wide().double()
        y = checkpoint(model, x.requires_grad_(), use_reentrant=False, context_fn=contexts)
        got = torch.autograd.grad(y.square().mean(), list(handle.parameters()))
        wanted = torch.autograd.grad(formula(x, *handle.parameters()).square().mean(), list(handle.parameters()))
        scale = max(float(g.abs().max()) for g in wanted)
        return torch.cat([g.flatten() / scale for g in got]), torch.cat([g.flatten() / scale for g in wanted])

    @odd(f"an input written over between forward and backward, {method}", raises=RuntimeError, match="inplace")
    def _(method=method):
        model, _, _ = single(method)
        x = X.float().clone()
        y = model(x)
        x.mul_(2)
        y.sum().backward()


@odd("factors written over between forward and backward, DoRA's keep what they were")
def _():
    model, handle, formula = single("dora")
    A, B, magnitude = handle.parameters()
    wanted = torch.autograd.grad(formula(X.float(), A, B, magnitude).sum(), [A, B, magnitude])
    y = model(X.float())
    with torch.no_grad():
        B.mul_(2)
    got = torch.autograd.grad(y.sum(), [A, B, magnitude])
    return torch.cat([g.flatten() for g in got]), torch.cat([g.flatten() for g in wanted])


OF_OTHER_LAYERS = ("bottleneck", "compacter")
"""Methods whose update is one of the output."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [False, True])
def test_autocast_gives_what_the_layer_itself_gives(dtype, train):
    """Attention kernels refuse queries of another dtype than the keys."""
    seen = []
    for method in sorted(METHODS):
        model = nn.Sequential(nn.Linear(16, 16))
        try:
            adapter = ak.torch.create(model, method, targets=["0"])
            ak.torch.inject(model, adapter, trainable=True)
        except AdapterkitError:
            continue
        if method == "poly":  # It asks the call for task_ids.
            continue
        model.train(train)
        with torch.autocast("cpu", dtype):
            assert model(X.float()).dtype == dtype, method
        seen.append(method)
    assert {"dora", "ia3", "oft", "boft", "hira", "glora", *OF_OTHER_LAYERS} <= set(seen)


def test_autocast_leaves_layers_that_it_does_not_narrow():
    model = nn.Sequential(nn.Embedding(7, 16))
    ak.torch.inject(model, ak.torch.create(model, "dora", targets=["0"]), trainable=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.tensor([1, 2])).dtype == torch.float32


def test_there_are_twenty():
    assert len(SITUATIONS) >= 20


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

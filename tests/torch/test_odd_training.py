"""Odd situations of training loops and transforms: optimizers in the backward pass, averages, scalers, conversions.

Each gives what the formula, or the same loop without the oddity, gives, as in test_odd_situations.py.
"""

import io
import pickle

import pytest
import torch
from situations import Situations, X, changed, inject, lora, one
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import adapterkit as ak

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd


def wanted():
    layer = one()[0]
    return functional.linear(X, changed(layer.weight), layer.bias)


def trained():
    model = one()
    return model, inject(model, trainable=True)


@odd("functional_call and vmap over stacked tensors")
def _():
    model, _ = trained()
    stacked = {name: torch.stack([value, value]) for name, value in model.named_parameters()}
    call = torch.func.vmap(lambda p, x: torch.func.functional_call(model, p, (x,)), in_dims=(0, None))
    return call(stacked, X)[1], wanted()


@odd("a gradient for each sample")
def _():
    model, _ = trained()
    held = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    one_by_one = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(model, p, (x[None],)).sum()), in_dims=(None, 0)
    )(held, X)
    model(X).sum().backward()
    name = next(iter(held))
    return one_by_one[name].sum(0), dict(model.named_parameters())[name].grad


@odd("optimizers that step in the backward pass")
def _():
    (model, handle), (plain, other) = trained(), trained()
    each = {parameter: torch.optim.AdamW([parameter], lr=0.1) for parameter in handle.parameters()}

    def step(parameter):
        each[parameter].step()
        each[parameter].zero_grad()

    for parameter in handle.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1)
    for _ in range(3):
        model(X).pow(2).sum().backward()
        optimizer.zero_grad()
        plain(X).pow(2).sum().backward()
        optimizer.step()
    return model(X), plain(X)


@odd("a fused optimizer")
def _():
    found = []
    for fused in (True, False):
        model, handle = trained()
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).pow(2).sum().backward()
            optimizer.step()
        found.append(model(X))
    return found


@odd("an average of the model's weights")
def _():
    model, handle = trained()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    before = next(handle.parameters()).detach().clone()
    with torch.no_grad():
        next(handle.parameters()).add_(1)
    average.update_parameters(model)
    (copied,) = ak.torch.handles(average).values()
    return next(copied.parameters()), before + 0.5


@odd("checkpoints of both kinds inside each other")
def _():
    found = []
    for outer, inner in ((True, False), (False, True)):
        model, handle = trained()
        x = X.clone().requires_grad_()
        y = checkpoint(lambda z, m=model, i=inner: checkpoint(m, z, use_reentrant=i), x, use_reentrant=outer)
        y.pow(2).sum().backward()
        found.append(next(handle.parameters()).grad)
    model, handle = trained()
    model(X).pow(2).sum().backward()
    torch.testing.assert_close(found[0], found[1])
    return found[0], next(handle.parameters()).grad


@odd("activations kept elsewhere")
def _():
    found = []
    for saved in (torch.autograd.graph.save_on_cpu(), torch.enable_grad()):
        model, handle = trained()
        with saved:
            y = model(X)
        y.sum().backward()
        found.append(next(handle.parameters()).grad)
    return found


def converted(switch):
    model, _ = trained()
    switch(True)
    try:
        model.float().double()
    finally:
        switch(False)
    return model(X).float(), wanted().float()


@odd("conversions that make new parameters")
def _():
    return converted(torch.__future__.set_overwrite_module_params_on_conversion)


@odd("conversions that swap parameters")
def _():
    return converted(torch.__future__.set_swap_module_params_on_conversion)


@odd("a weight that is pruned after the injection")
def _():
    model = one()
    inject(model)
    prune.l1_unstructured(model[0], "weight", 0.5)
    W = model[0].weight
    return model(X), functional.linear(X, W + lora(8, 16).delta((8, 16)).to(W), model[0].bias)


@odd("adapters of two dtypes at one layer")
def _():
    model = one().float()
    inject(model, name="half", seed=3)
    inject(model, trainable=True)
    W = changed(changed(one()[0].weight), 3)
    return model(X.float()).float(), functional.linear(X, W, one()[0].bias).float()


@odd("handles of a part and of the whole")
def _():
    outer = nn.ModuleDict({"inner": one()})
    inject(outer["inner"])
    inject(outer, "inner.0", name="whole", seed=5)
    W = changed(changed(one()[0].weight), 5)
    return outer["inner"](X), functional.linear(X, W, one()[0].bias)


@odd("a whole model saved and loaded by torch.save")
def _():
    model, _ = trained()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)(X), pickle.loads(pickle.dumps(model))(X)


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

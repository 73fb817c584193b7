"""What a layer works out once is thrown away when anything changes: each step is compared with the plain formula."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, ShapeMismatch
from adapterkit.methods import METHODS
from adapterkit.torch import lean
from adapterkit.torch.forward_hook import hooks_of

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(3))


def lora(rank=2, seed=0, out=8, into=16):
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return METHODS["lora"](A=A, B=B, scaling=0.25)


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8))


def attach(model, seed=0, **more):
    return ak.torch.inject(model, Adapter({Target("0"): (lora(seed=seed),)}), **more)


def formula(model, *handles, x=X):
    """y + weight * scaling * x A^T B^T, from what the handles say they hold."""
    y = nn.functional.linear(x, model[0].weight, model[0].bias)
    for handle in handles:
        ((_, update),) = handle.adapter()
        y = y + handle.weight * update.scaling * (x @ update.A.to(x).mT @ update.B.to(x).mT)
    return y


def has_plan(model):
    (hook,) = hooks_of(model)
    return hook.kept.plan is not None and hook.kept.plan.usable


@pytest.mark.parametrize("trainable", [True, False])
def test_a_plan_follows_the_layer_and_the_adapter(trainable, close):
    model = plain()
    handle = attach(model, trainable=trainable, freeze=False)

    def check(*handles, x=X):
        for _ in range(2):  # The second forward has the first one's plan.
            close(model(x), formula(model, *handles, x=x), tolerance=1e-6)

    check(handle)
    assert has_plan(model)
    handle.weight = 0.5
    check(handle)
    handle.set_active(False)
    check()
    handle.set_active(True)
    check(handle)
    with handle.disable():
        check()
    with ak.torch.route(model, ["default"] * 3):
        check(handle)
        with handle.disable():
            check()
        check(handle)
    check(handle)
    other = attach(model, seed=5, name="other")
    check(handle, other)
    other.remove()
    check(handle)
    with torch.no_grad():
        handle._leaves[0].tensor.mul_(2)
        model[0].weight.mul_(3)
    check(handle)
    handle._leaves[0].tensor.data = handle._leaves[0].tensor.data * 2
    model[0].bias = nn.Parameter(model[0].bias.detach() + 1)
    check(handle)
    leaf = handle._leaves[0]
    held = leaf.module._parameters if trainable else leaf.module._buffers
    held[leaf.name] = type(held[leaf.name])(held[leaf.name].detach() * 2)
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    check(handle)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
    check(handle)
    model.double()
    check(handle, x=X.double())
    model.bfloat16()
    with torch.no_grad():
        y, wanted = model(X.bfloat16()).float(), formula(model.float(), handle)
        close(y, wanted, tolerance=3e-2)
        check(handle)
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    model[0].parametrizations.weight.original.data.mul_(2)
    check(handle)


def test_copies_have_plans_of_their_own(close):
    model = plain()
    attach(model)
    model(X)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not has_plan(twin)
        (handle,) = ak.torch.handles(twin).values()
        with torch.no_grad():
            twin[0].weight.mul_(2)
            handle._leaves[0].tensor.mul_(3)
        handle.weight = 2.0
        close(twin(X), formula(twin, handle), tolerance=1e-6)
    close(model(X), formula(model, *ak.torch.handles(model).values()), tolerance=1e-6)


def test_a_layer_of_another_size_is_refused():
    model = plain()
    attach(model)
    model(X)
    model[0].weight = nn.Parameter(torch.randn(9, 16))
    with pytest.raises(ShapeMismatch, match="weight's shape is"):
        model(X)


def test_transforms_and_autocast_see_the_formula(close):
    model = plain()
    handle = attach(model, trainable=True)
    model(X)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(X, 2 * X))).tangent
    close(tangent, formula(model, handle, x=2 * X) - model[0].bias, tolerance=1e-6)
    close(torch.func.vmap(model)(X), formula(model, handle), tolerance=1e-6)
    values = {name: 2 * value for name, value in model.named_parameters()}
    close(
        torch.func.functional_call(model, values, (X,)),
        nn.functional.linear(X, 2 * model[0].weight, 2 * model[0].bias)
        + 4 * (formula(model, handle) - nn.functional.linear(X, model[0].weight, model[0].bias)),
        tolerance=1e-5,
    )
    close(torch.jit.trace(model, (X,), check_trace=False)(2 * X), formula(model, handle, x=2 * X), tolerance=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_thin_method_has_the_fused_functions_values_and_gradients(dtype, monkeypatch, close):
    """Few numbers take the plain formula by autograd, many the fused functions: both are the same function."""
    x, seen = torch.randn(2, 3, 24).to(dtype).requires_grad_(), []
    for method, cls in METHODS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24)).to(dtype)
        try:
            adapter = ak.torch.create(model, method, targets="0", rank=1, seed=1)
        except AdapterkitError:
            continue
        if cls.kind != "additive":
            continue
        handle = ak.torch.inject(model, adapter, trainable=True)
        for parameter in handle.parameters():
            nn.init.normal_(parameter, std=0.3)
        results = []
        for size in (1 << 16, 0):
            monkeypatch.setattr(lean, "SMALL", size)
            y = model(x)
            leaves = [x, *handle.parameters()]
            results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves, allow_unused=True)))
            seen += [method] if has_plan(model) else []
        for one, other in zip(*results, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                close(one, other, tolerance=6e-2 if dtype == torch.bfloat16 else 2e-6)
    assert {"lora", "vera", "adalora", "lora_xs"} <= set(seen)


def test_a_stack_of_inference_mode_serves_training(close):
    model = plain()
    handles = [attach(model, seed=seed, name=name) for seed, name in enumerate("ab")]
    with torch.inference_mode(), ak.torch.route(model, ["b", "a", None]):
        model(X)
        y = model(X)
    x = X.clone().requires_grad_()
    with ak.torch.route(model, ["b", "a", None]):
        again = model(x)
    again.sum().backward()
    wanted = torch.stack([formula(model, handles[1])[0], formula(model, handles[0])[1], formula(model)[2]])
    close(y, wanted.detach(), tolerance=1e-6)
    close(again, wanted, tolerance=1e-6)
    assert x.grad is not None


def test_one_name_twice_in_a_model_is_two_switches(close):
    """Adapters of one name in two parts of a model share a route's rows, and each has its own switch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(8, 8)))
    first, second = attach(model[0]), ak.torch.inject(model[1], Adapter({Target("0"): (lora(out=8, into=8),)}))
    names = ["default", None, "default"]
    for off in (None, first, second):
        with ak.torch.route(model, names), off.disable() if off is not None else torch.no_grad():
            got = [model(X) for _ in range(2)][1]
        hidden = formula(model[0], *([] if off is first else [first]))[[0, 2]]
        close(got[[0, 2]], formula(model[1], *([] if off is second else [second]), x=hidden), tolerance=1e-6)
        close(got[1], formula(model[1], x=formula(model[0]))[1], tolerance=1e-6)


@pytest.mark.parametrize("shape", [(3, 16), (3, 1, 16)])
def test_one_token_of_few_adapters_has_values_and_gradients_and_takes_autocast(shape, close):
    model, x = plain(), X[:, 0].reshape(shape)
    a, b = (attach(model, seed=seed, name=name) for seed, name in enumerate("ab"))
    with ak.torch.route(model, ["a", None, "b"]):
        wanted = torch.stack([formula(model, *own, x=x)[row] for row, own in enumerate(([a], [], [b]))])
        for _ in range(2):
            close(model(x), wanted, tolerance=1e-6)
            with torch.inference_mode():
                close(model(x).clone(), wanted, tolerance=1e-6)
            with torch.autocast("cpu", torch.bfloat16):
                close(model(x).float(), wanted, tolerance=3e-2)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf)
        other = x.clone().requires_grad_()
        rows = [formula(model, *own, x=other)[row] for row, own in enumerate(([a], [], [b]))]
        close(gradient, torch.autograd.grad(torch.stack(rows).sum(), other)[0], tolerance=1e-6)

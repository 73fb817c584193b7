"""Odd situations of fused kernels: forwards that compute with a module's weight and never call the module.

Liger's loss, Unsloth's decoding and multilayer perceptrons and kernels of a hub do that; the functions here read what
theirs read. Each situation gives what the formula gives, a typed error or a warning, as in test_odd_situations.py.
"""

import copy
import pickle
import threading
import types
import warnings

import accelerate
import pytest
import torch
from situations import Situations, adapter, changed, draw, inject, lora
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Unsupported
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd

X = draw(3, 8, seed=7)
READ = "computed with the module's weight but did not call the module"


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """As Liger's: the head's weight goes to a fused loss while the model trains."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.head = MLP(), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        h = self.mlp(x)
        return fused_loss(self.head, h) if self.training else self.head(h)


def fused_loss(head, h):
    return functional.linear(h, head.weight)


def fused_mlp(self, x):
    gate, up = (functional.linear(x, *weights_of(each)) for each in (self.gate, self.up))
    return functional.linear(functional.silu(gate) * up, *weights_of(self.down))


def weights_of(layer):
    """As Unsloth's `get_lora_parameters_bias` finds them where a layer is none of PEFT's."""
    base = getattr(layer, "base_layer", layer)
    return base.weight, base.bias


def model():
    return Model().double().eval()


def wanted(path):
    """The model with the change folded into the weight, by a formula of its own."""
    twin = model()
    layer = twin.get_submodule(path)
    layer.weight.data = changed(layer.weight.data)
    return twin(X)


def at(path, given=None, out=16, into=8):
    given = model() if given is None else given
    inject(given, path, out, into)
    return given


@odd("a loss reads the head's weight while the model trains", Unsupported, READ)
def _():
    at("head", out=8).train()(X)


@odd("the same model without its loss")
def _():
    return at("head", out=8)(X), wanted("head")


@odd("the same model after it was noticed once")
def _():
    given = at("head", out=8)
    with pytest.raises(Unsupported, match=READ):
        given.train()(X)
    return given.eval()(X), wanted("head")


@odd("a loss reads the weight of a head without an adapter")
def _():
    given = at("mlp.up")
    return given.train()(X), wanted("mlp.up")


@odd("a fused block from before the injection", Unsupported, READ)
def _():
    given = model()
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    at("mlp.up", given)(X)


@odd("a fused block from after the injection", Unsupported, READ)
def _():
    given = at("mlp.up")
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    given(X)


@odd("a fused block from after a forward", Unsupported, READ)
def _():
    given = at("mlp.up")
    given(X)
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    given(X)


@odd("a class that was patched after the injection", Unsupported, READ)
def _():
    given = at("mlp.up")
    before = MLP.forward
    MLP.forward = fused_mlp
    try:
        given(X)
    finally:
        MLP.forward = before


@odd("a fused block around an adapter of a weight", Unsupported, READ)
def _():
    given = model()
    ak.torch.inject(given, Adapter({Target("mlp.up"): (METHODS["ia3"](l=1 + draw(16, seed=3)),)}))
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    given(X)


@odd("a fused block in a copy of the model", Unsupported, READ)
def _():
    given = copy.deepcopy(at("mlp.up"))
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    given(X)


@odd("a loss in an unpickled model", Unsupported, READ)
def _():
    pickle.loads(pickle.dumps(at("head", out=8))).train()(X)


@odd("a fused block after the adapter was removed")
def _():
    given = model()
    handle = inject(given, "mlp.up", 16, 8)
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    handle.remove()
    return given(X), model()(X)


@odd("a fused block after the adapter was merged")
def _():
    given = model()
    inject(given, "mlp.up", 16, 8).merge_()
    given.mlp.forward = types.MethodType(fused_mlp, given.mlp)
    return given(X), wanted("mlp.up")


@odd("a forward of a copy of the weights")
def _():
    given = at("mlp.up")
    up, gate, down = (copy.deepcopy(each.weight.detach()) for each in (given.mlp.up, given.mlp.gate, given.mlp.down))
    given.mlp.forward = lambda x: (functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT
    with pytest.warns(UserWarning, match=r"calls none of mlp\.up"):
        first = given(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return given(X), first


@odd("a forward around that of a block")
def _():
    given = at("mlp.up")
    own = given.mlp.forward
    given.mlp.forward = lambda x: own(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return given(X), wanted("mlp.up")


class Routed(nn.Module):
    """A mixture that calls one of its experts, and asks the others for their dtype."""

    def __init__(self, which):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.which = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), which

    def forward(self, x):
        y = torch.zeros_like(x)
        for each in self.experts:
            y = y.to(each.weight.dtype)
            if each.weight is not None and each.bias is not None and each.weight.shape[0] == 8:
                x = x.to(each.weight.device)
        return y + self.experts[self.which](x)


@odd("experts that no token reaches are asked for their dtype")
def _():
    given = Routed(0).double()
    for number in range(3):
        inject(given, f"experts.{number}", 8, 8, name=str(number))
    layer = given.experts[0]
    return given(X), functional.linear(X, changed(layer.weight), layer.bias)


@odd("accelerate loads experts that are not called")
def _():
    given = Routed(1).double()
    hook = accelerate.hooks.AlignDevicesHook("cpu", offload=True, place_submodules=True)
    whole = nn.Sequential(given)
    accelerate.hooks.add_hook_to_module(given, hook)
    for number in range(3):
        inject(whole, f"0.experts.{number}", 8, 8, name=str(number))
    layer = Routed(1).double().experts[1]
    return whole(X), functional.linear(X, changed(layer.weight), layer.bias)


class Stacked(nn.Module):
    """Experts in one tensor, whose weights a fused forward of the block around them reads."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.weight.mT


@odd("a fused forward around a module of a kind of its own", Unsupported, READ)
def _():
    given = Stacked().double()
    inject(given, "experts", 8, 8)
    given.forward = lambda x: x @ given.experts.weight.mT
    given(X)


@odd("a functional head over an embedding's weight")
def _():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(12, 8)

        def forward(self, ids):
            return functional.linear(self.embedding(ids), self.embedding.weight)

    given, ids = Tied().double(), torch.tensor([3, 5, 3])
    inject(given, "embedding", 12, 8)
    W = given.embedding.weight.detach()
    update = lora(12, 8)
    # PEFT's embedding with a LoRA is read by such a head in the same way.
    return given(ids), functional.linear((W + update.delta((12, 8)))[ids], W)


@odd("a forward that raises halfway")
def _():
    given = at("head", out=8)
    cut = given.mlp.register_forward_hook(lambda _, __, y: y[:, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            given.train()(X)
    cut.remove()
    return given.eval()(X), wanted("head")


@odd("a loss in a part with a handle of its own, inside a model with one", Unsupported, READ)
def _():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = model(), nn.Linear(8, 8).double()

        def forward(self, x):
            return self.last(self.inner(x))

    given = Outer()
    inject(given.inner, "head", 8, 8)
    inject(given, "last", 8, 8, seed=1, name="last")
    given.train()(X)


@odd("two threads, one with the loss", Unsupported, READ)
def _():
    given = at("head", out=8)
    given.training = True  # The model alone takes its loss; its layers do not change.
    found = []

    def run(path):
        try:
            path()
        except Unsupported as error:
            found.append(error)

    # A call of the head by another thread must not hide that a forward only reads its weight.
    rounds = 20
    for _ in range(rounds):
        others = [threading.Thread(target=run, args=(lambda: given(X),)) for _ in range(2)]
        others.append(threading.Thread(target=run, args=(lambda: [given.head(X) for _ in range(50)],)))
        for each in others:
            each.start()
        for each in others:
            each.join()
    assert len(found) == 2 * rounds
    raise found[0]


@odd("a kernel that takes an adapter's norm over", Unsupported, "bypasses the adapter")
def _():
    given = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)).double()
    ak.torch.inject(given, Adapter({Target("0"): (METHODS["ia3"](l=1 + draw(8, seed=3)),)}))
    # kernels' `kernelize` does so, and puts the class's own forward there where it knows no kernel.
    given[0].forward = types.MethodType(nn.RMSNorm.forward, given[0])
    given(X)


def test_a_module_has_its_own_dictionary_back():
    given = model()
    before = {name: dict(module.__dict__) for name, module in given.named_modules()}
    handle = inject(given, "mlp.up", 16, 8)
    given(X)
    handle.remove()
    for name, module in given.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(type(value) is type(before[name][key]) for key, value in module.__dict__.items())
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


def test_an_injection_that_fails_leaves_the_dictionaries(monkeypatch):
    given = model()
    kinds = [type(module._parameters) for module in given.modules()]
    monkeypatch.setattr("adapterkit.torch.handle.Watch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ak.torch.inject(given, adapter("mlp.up", 16, 8))
    assert [type(module._parameters) for module in given.modules()] == kinds


def test_there_are_twenty():
    assert len(SITUATIONS) >= 20


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)


class Mixer(nn.Module):
    """As Mamba's: the step's projection is a product with its weight, and the module is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.step = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x) @ self.step.weight.T


def test_a_model_whose_own_class_reads_the_weight_goes_on_as_in_peft():
    model = nn.Sequential(Mixer()).double()
    base = model(X)
    layers = {Target("0.step"): lora(8, 8), Target("0.inner"): lora(8, 8)}
    ak.torch.inject(model, Adapter({target: (update,) for target, update in layers.items()}))
    with pytest.warns(UserWarning, match=READ):
        first = model(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(X), first), "told once"
    inner = layers[Target("0.inner")]
    change = functional.linear(X, inner.scaling * inner.B @ inner.A)
    assert torch.allclose(first, base + change @ model[0].step.weight.T, atol=1e-9)


def told(run):
    """The texts of the warnings that a call gives; code of another test is not taken over."""
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "compiled code runs" in str(each.message)]


def test_compiled_code_that_goes_past_an_adapter_is_told_once():
    model = Model().double().train()
    inject(model, "head", 8, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (text,) = told(lambda: (compiled(X), compiled(X[:2])))
    assert "calls none of head" in text
    assert "merge_" in text


@pytest.mark.parametrize("target", ["head", "mlp.up"])
def test_compiled_code_that_calls_its_adapters_is_not_told(target):
    model = Model().double().eval()
    inject(model, target, *model.get_submodule(target).weight.shape)
    assert not told(lambda: torch.compile(model, backend="aot_eager", fullgraph=True)(X))


def test_compiled_code_of_a_fused_block_is_told():
    model = Model().double().eval()
    model.mlp.forward = types.MethodType(fused_mlp, model.mlp)
    inject(model, "mlp.up", 16, 8)
    (text,) = told(lambda: torch.compile(model, backend="aot_eager", fullgraph=True)(X))
    assert "a MLP that calls none of mlp.up" in text


def test_a_module_that_ran_before_is_not_told():
    model = Model().double().eval()
    inject(model, "head", 8, 8)
    model(X)
    model.train()
    assert not told(lambda: torch.compile(model, backend="aot_eager")(X))

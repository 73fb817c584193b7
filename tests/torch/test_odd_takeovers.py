"""Odd situations in which another tool takes an adapter out of play, or its numbers: graphs, merges, casts, freezing.

Each gives what the formula gives, a typed error, or a warning, as in test_odd_situations.py.
"""

import copy
import pickle
import types
import warnings

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from situations import Situations, X, adapter, changed, draw, inject, one
from torch import nn
from torch.ao import quantization
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx, prepare_qat_fx
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported, UsageError
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd

EIGHT = torch.float8_e4m3fn


class Block(nn.Module):
    def __init__(self, relu=False):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(16, 16), nn.ReLU() if relu else nn.Tanh(), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Model(nn.Module):
    def __init__(self, **rest):
        super().__init__()
        torch.manual_seed(0)
        self.block = Block(**rest)

    def forward(self, x):
        return self.block(x)


UP = "block.up"


def model(**rest):
    return Model(**rest).double()


def with_up(base):
    """The model with the LoRA's change in the weight of its first layer."""
    twin = copy.deepcopy(base)
    twin.block.up.weight.data = changed(twin.block.up.weight.data)
    return twin


def linear(layer, x=X, seed=0):
    return functional.linear(x, changed(layer.weight, seed), layer.bias)


# torch.fx copies a model into a graph, and torch.ao's quantization exchanges the modules of that copy.


def quantized(made, config, prepare=prepare_fx):
    prepared = prepare(made, quantization.QConfigMapping().set_global(config), (X.float(),))
    prepared(X.float())
    return convert_fx(prepared.eval())


@odd("FX quantization to int8", raises=Unsupported, match=r"up: .*has an adapter.*merge_")
def _():
    made = model().float().eval()
    inject(made, UP, 16, 16)
    quantized(made, quantization.get_default_qconfig("x86"))


@odd("FX quantization to int8, by dynamic ranges", raises=Unsupported, match="has an adapter")
def _():
    made = model().float().eval()
    inject(made, UP, 16, 16)
    mapping = quantization.QConfigMapping().set_global(quantization.default_dynamic_qconfig)
    convert_fx(prepare_fx(made, mapping, (X.float(),)))  # No forward in between.


@odd("FX quantization of a fused activation", raises=Unsupported, match="has an adapter")
def _():
    made = model(relu=True).float().eval()
    inject(made, UP, 16, 16)
    quantized(made, quantization.get_default_qconfig("x86"))


@odd("FX quantization of a model without blocks", raises=Unsupported, match="has an adapter")
def _():
    made = one().float().eval()
    inject(made)
    quantized(made, quantization.get_default_qconfig("x86"))


@odd("FX quantization of a layer between adapters, switched off", raises=Unsupported, match="has an adapter")
def _():
    made = model().float().eval()
    inject(made, UP, 16, 16, active=False)
    quantized(made, quantization.get_default_qconfig("x86"))


@odd("FX quantization-aware training", raises=Unsupported, match="takes over the weight of a module")
def _():
    made = model().float().train()
    inject(made, UP, 16, 16)
    quantized(made, quantization.get_default_qat_qconfig("x86"), prepare_qat_fx)


@odd("FX quantization after the adapter is merged")
def _():
    made, plain = model().float().eval(), with_up(model()).float().eval()
    inject(made, UP, 16, 16).merge_()
    config = quantization.get_default_qconfig("x86")
    return quantized(made, config)(X.float()), quantized(plain, config)(X.float())


@odd("FX quantization after the adapter is removed")
def _():
    made, plain = model().float().eval(), model().float().eval()
    inject(made, UP, 16, 16).remove()
    config = quantization.get_default_qconfig("x86")
    return quantized(made, config)(X.float()), quantized(plain, config)(X.float())


@odd("FX quantization of other layers alone")
def _():
    made, plain = model().float().eval(), with_up(model()).float().eval()
    inject(made, UP, 16, 16)
    config = quantization.QConfigMapping().set_module_name("block.down", quantization.get_default_qconfig("x86"))
    found = []
    for each in (made, plain):
        prepared = prepare_fx(each, config, (X.float(),))
        prepared(X.float())
        found.append(convert_fx(prepared)(X.float()))
    return found[0], found[1]


@odd("FX quantization is prepared, calibrated and not converted")
def _():
    made = model().float().eval()
    wanted = with_up(made)(X.float())
    inject(made, UP, 16, 16)
    mapping = quantization.QConfigMapping().set_global(quantization.get_default_qconfig("x86"))
    return prepare_fx(made, mapping, (X.float(),))(X.float()), wanted


@odd("FX fusion of layers that have no adapter")
def _():
    made = nn.Sequential(one()[0], nn.Linear(8, 8).double(), nn.ReLU()).eval()
    wanted = functional.relu(made[1](linear(made[0])))
    inject(made)
    return fuse_fx(made)(X), wanted


@odd("a module of a traced graph is exchanged by hand", raises=Unsupported, match="has an adapter")
def _():
    made = one()
    inject(made)
    traced = torch.fx.symbolic_trace(made)
    setattr(traced, "0", nn.Linear(16, 8).double())


@odd("a module of a traced graph is wrapped by hand")
def _():
    made = one()
    inject(made)
    traced = torch.fx.symbolic_trace(made)
    setattr(traced, "0", nn.Sequential(getattr(traced, "0")))
    return traced(X), linear(one()[0])


@odd("FX quantization of a copied model", raises=Unsupported, match="has an adapter")
def _():
    made = one().float().eval()
    inject(made)
    quantized(copy.deepcopy(made), quantization.get_default_qconfig("x86"))


# to_empty() is for models that are loaded afterwards; nothing loads the adapter.


@odd("to_empty() and the base loaded again, a frozen adapter")
def _():
    made = model()
    inject(made, UP, 16, 16)
    made.to_empty(device="cpu")
    made.load_state_dict(model().state_dict())
    return made(X), with_up(model())(X)


@odd("to_empty() of a block and the base loaded again, a trained adapter")
def _():
    made = model()
    handle = inject(made, UP, 16, 16, trainable=True)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.1)
    made.block.to_empty(device="cpu")
    made.load_state_dict(model().state_dict())
    other = model()
    same = inject(other, UP, 16, 16, trainable=True)
    found = []
    for each, own in ((made, optimizer), (other, torch.optim.SGD(same.parameters(), lr=0.1))):
        each(X).square().sum().backward()
        own.step()
        found.append(each(X))
    return found[0], found[1]


@odd("to_empty() of a model with a DoRA, an IA3 and shared projections")
def _():
    made, other = one(), one()
    for each in (made, other):
        for seed, name in enumerate(("dora", "ia3", "vera")):
            torch.manual_seed(seed)
            fresh = ak.torch.create(one(), name, targets="0", **({} if name == "ia3" else {"rank": 2}))
            ak.torch.inject(each, fresh, name=name)
    made.to_empty(device="cpu")
    made.load_state_dict(one().state_dict())
    return made(X), other(X)


@odd("to meta, then to_empty()", raises=Unsupported, match="to_empty.*handle.remove")
def _():
    made = one()
    inject(made)
    made.to("meta").to_empty(device="cpu")


@odd("to meta and removed, then to_empty() and injected again")
def _():
    made = one()
    handle = inject(made)
    kept = handle.adapter()
    handle.remove()
    made.to("meta").to_empty(device="cpu")
    made.load_state_dict(one().state_dict())
    ak.torch.inject(made, kept)
    return made(X), linear(one()[0])


@odd("an adapter that goes leaves no conversion of its own behind")
def _():
    made = one()
    first, second = inject(made, name="a"), inject(made, name="b", trainable=True)
    first.remove()
    made.to_empty(device="cpu")
    made.load_state_dict(one().state_dict())
    kept = made(X)
    second.remove()
    assert made[0].__dict__.keys() == one()[0].__dict__.keys()
    return kept, linear(one()[0])


@odd("converted after a copy and a pickle")
def _():
    made = one()
    inject(made)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    copied.to_empty(device="cpu")
    copied.load_state_dict(one().state_dict())
    made[0].weight.data.zero_()
    return copied(X), linear(one()[0])


# Weights stored in 8 bits and cast for each forward: diffusers' layerwise casting, trainers with an fp8 base.


def moved(method, **more):
    """A fresh adapter of a method, moved away from where it changes nothing."""
    ((target, update),) = ak.torch.create(one().float(), method, targets="0", **more)
    tensors = {name: torch.as_tensor(value) for name, value in update.tensors.items()}
    floats = {n: t for n, t in tensors.items() if n not in update.frozen and t.is_floating_point()}
    return Adapter({target: (update.replace(**{n: t + 0.1 * draw(*t.shape).float() for n, t in floats.items()}),)})


def rounded(weight):
    return weight.detach().to(EIGHT).float()


def over_eight(made):
    """What an adapter gives over weights and biases that were rounded to 8 bits."""
    base = one().float()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(rounded(parameter))
    ak.torch.inject(base, made)
    return base(X.float())


for _method, _more in (("lora", {"rank": 2}), ("dora", {"rank": 2}), ("ia3", {}), ("oft", {"rank": 2})):
    for _first in (True, False):

        @odd(f"layerwise casting {'after' if _first else 'before'} injecting, {_method}")
        def _(first=_first, method=_method, more=_more):
            base, made = one().float(), moved(method, **more)
            if first:
                ak.torch.inject(base, made)
            apply_layerwise_casting(base, EIGHT, torch.float32)
            if not first:
                ak.torch.inject(base, made)
            found = torch.stack([base(X.float()), base(X.float())])
            assert base[0].weight.dtype is EIGHT
            return found, over_eight(made).expand(2, -1, -1)


@odd("layerwise casting of a convolution, after injecting")
def _():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3))
    x = draw(2, 4, 5, 5).float()
    ak.torch.inject(base, adapter("0", 6, 4, 3, 3))
    twin = changed(rounded(base[0].weight)), rounded(base[0].bias)
    apply_layerwise_casting(base, EIGHT, torch.float32)
    base(x)
    return base(x), functional.conv2d(x, *twin)


@odd("layerwise casting and a route")
def _():
    base = one().float()
    for seed, name in enumerate("ab"):
        inject(base, name=name, seed=seed)
    apply_layerwise_casting(base, EIGHT, torch.float32)
    with torch.no_grad(), ak.torch.route(base, ["b", None, "a"]):
        base(X.float())
        got = base(X.float())
    W, b = rounded(one()[0].weight.float()), rounded(one()[0].bias.float())
    rows = [functional.linear(x, w, b) for x, w in zip(X.float(), (changed(W, 1), W, changed(W)), strict=True)]
    return got, torch.stack(rows)


@odd("layerwise casting, and the adapter read back with the bits it came with")
def _():
    base = one().float()
    handle = inject(base)
    apply_layerwise_casting(base, EIGHT, torch.bfloat16)
    base(X.bfloat16())
    ((_, update),) = handle.adapter()
    assert torch.equal(update.A, adapter().updates[Target("0")][0].A)
    return update.A, draw(2, 16)


@odd("layerwise casting, merged", raises=NotMergeable, match="float8.*Merge before")
def _():
    base = one().float()
    handle = inject(base)
    apply_layerwise_casting(base, EIGHT, torch.float32)
    handle.merge_()


@odd("layerwise casting before injecting, merged", raises=NotMergeable, match="float8.*Merge before")
def _():
    base = one().float()
    apply_layerwise_casting(base, EIGHT, torch.float32)
    inject(base).merge_()


def patched(layer, scale):
    """Store a layer's weight in 8 bits with a scale, and put a forward on it that computes with both."""
    layer.weight = nn.Parameter((layer.weight / scale).detach().to(EIGHT), requires_grad=False)

    def forward(self, x):
        return functional.linear(x, self.weight.to(x.dtype) * scale, self.bias)

    layer.forward = types.MethodType(forward, layer)
    return layer.weight.float() * scale


for _method, _more in (("lora", {"rank": 2}), ("dora", {"rank": 2}), ("ia3", {}), ("oft", {"rank": 2})):

    @odd(f"an fp8 base with a scale under a patched forward, {_method}")
    def _(method=_method, more=_more):
        base, plain, made = one().float(), one().float(), moved(method, **more)
        with torch.no_grad():
            plain[0].weight.copy_(patched(base[0], 0.01))
        for each in (base, plain):
            ak.torch.inject(each, made)
        return base(X.float()), plain(X.float())


@odd("an fp8 base under a patched forward, trained")
def _():
    base, plain = one().float(), one().float()
    with torch.no_grad():
        plain[0].weight.copy_(patched(base[0], 0.01))
    found = []
    for each in (base, plain):
        handle = inject(each, trainable=True)
        each(X.float()).square().sum().backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in handle.parameters()]))
    return found[0], found[1]


@odd("a forward patched after injecting that goes past the adapter", raises=Unsupported, match="bypasses the adapter")
def _():
    base = one().float()
    inject(base)
    patched(base[0], 0.01)
    base(X.float())


@odd("a forward patched after injecting that goes past the adapter, taken off again")
def _():
    base = one()
    inject(base)
    ours = base[0].forward
    base[0].forward = lambda x: functional.linear(x, base[0].weight)
    with pytest.raises(Unsupported):
        base(X)
    base[0].forward = ours
    got = base(X)
    assert not base[0]._forward_hooks
    return torch.stack([got, base(X)]), linear(one()[0]).expand(2, -1, -1)


@odd("a forward patched after injecting that calls the adapter is looked at once")
def _():
    base = one()
    inject(base)
    ours = base[0].forward
    base[0].forward = lambda x: 2 * ours(x)
    base(X)
    assert not base[0]._forward_hooks
    return base(X), 2 * linear(one()[0])


@odd("a patched forward of a layer that is not called, and the adapter removed")
def _():
    base = model()
    handle = inject(base, UP, 16, 16)
    ours = base.block.up.forward
    base.block.up.forward = lambda x: 2 * ours(x)
    block, base.block.forward = base.block.forward, lambda x: x[:, :8]
    base(X)
    base.block.forward = block
    handle.remove()
    assert not base.block.up._forward_hooks
    return base.block.up(X), 2 * model().block.up(X)


# PEFT around an adapter of ours.


class Twofold(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def dora():
    return METHODS["dora"](A=draw(2, 16, seed=1), B=draw(16, 2, seed=2), magnitude=draw(16, seed=3).abs() + 1)


CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(target_modules=["a"], r=2, init_lora_weights=False),
    "LoHa": lambda: peft.LoHaConfig(target_modules=["a"], r=2, init_weights=False),
    "VeRA": lambda: peft.VeraConfig(target_modules=["a"], r=2, init_weights=False),
    "DoRA": lambda: peft.LoraConfig(target_modules=["a"], r=2, init_lora_weights=False, use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=["a"], feedforward_modules=[], init_ia3_weights=False),
    "OFT": lambda: peft.OFTConfig(target_modules=["a"], r=0, oft_block_size=4, init_weights=False),
}
SUMS = ("LoRA", "LoHa", "VeRA")


@pytest.mark.parametrize("unloaded", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("ours", ["lora", "dora"])
def test_peft_merges_its_adapter_below_ours(ours, kind, unloaded):
    base = Twofold().double()
    update = dora() if ours == "dora" else adapter("a", 16, 16).updates[Target("a")][0]
    ak.torch.inject(base, Adapter({Target("a"): (update,)}))
    around = peft.get_peft_model(base, CONFIGS[kind]()).double().eval()
    with torch.no_grad():
        for name, parameter in around.named_parameters():
            if "magnitude" in name:
                parameter *= 1.3
    wanted = around(X)

    def merged():
        if unloaded:
            return around.merge_and_unload()(X)
        around.merge_adapter()
        return around(X)

    if kind in SUMS and ours == "lora":
        torch.testing.assert_close(merged(), wanted)
        return
    with pytest.raises(Unsupported, match=r"PEFT merged its .* into the weight that"):
        merged()


def test_peft_unloads_its_adapter_around_ours():
    base = Twofold().double()
    ak.torch.inject(base, Adapter({Target("a"): (dora(),)}))
    wanted = base(X)
    around = peft.get_peft_model(base, CONFIGS["IA3"]()).double().eval()
    torch.testing.assert_close(around.unload()(X), wanted)


def test_peft_merges_and_unmerges_its_adapter_below_ours():
    base = Twofold().double()
    ak.torch.inject(base, Adapter({Target("a"): (dora(),)}))
    around = peft.get_peft_model(base, CONFIGS["LoRA"]()).double().eval()
    wanted = around(X)
    around.merge_adapter()
    with pytest.raises(Unsupported):
        around(X)
    around.unmerge_adapter()
    torch.testing.assert_close(around(X), wanted)


@odd("unmerged after PEFT merged its adapter into the weight", raises=UsageError, match="changed after the merge")
def _():
    base = Twofold().double()
    handle = inject(base, "a", 16, 16)
    handle.merge_(keep=True)
    peft.get_peft_model(base, CONFIGS["LoRA"]()).double().merge_and_unload()
    handle.unmerge_()


@odd("unmerged after a change through weight.data", raises=UsageError, match="changed after the merge")
def _():
    base = one()
    handle = inject(base)
    handle.merge_(keep="copy")
    base[0].weight.data.add_(1)
    handle.unmerge_()


# Others freeze what was to be trained.


def frozen_by_peft(**rest):
    base = Twofold().double().train()
    handle = inject(base, "a", 16, 16, trainable=True)
    around = peft.get_peft_model(base, peft.LoraConfig(target_modules=["b"], r=2, **rest)).double()
    return around, handle


def test_peft_freezes_an_adapter_of_ours_with_a_warning():
    around, _ = frozen_by_peft()
    with pytest.warns(UserWarning, match=r"a: the adapter 'default' .*get_peft_model.*frozen.*requires_grad_\(True\)"):
        around(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Once is enough.
        around(X)


def test_a_frozen_adapter_of_ours_can_be_trained_again():
    around, handle = frozen_by_peft()
    for parameter in handle.parameters():
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        around(X).sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())


@pytest.mark.parametrize("way", ["eval", "no_grad", "trainable=False", "a part"])
def test_nothing_is_said_where_nothing_was_lost(way):
    base = Twofold().double().train(way != "eval")
    handle = inject(base, "a", 16, 16, trainable=way != "trainable=False")
    for parameter in list(handle.parameters())[: 1 if way == "a part" else None]:
        parameter.requires_grad_(False)
    with warnings.catch_warnings(), torch.set_grad_enabled(way != "no_grad"):
        warnings.simplefilter("error")
        base(X)


# Layers that were copied inside the model.


@odd("a copied layer is trained by an optimizer of the handle's parameters")
def _():
    found = []
    for by_handle in (True, False):
        base = nn.Sequential(Block(), nn.Linear(8, 16), Block()).double()
        torch.manual_seed(1)
        for parameter in base.parameters():
            parameter.data.normal_(std=0.3)
        handle = inject(base, "0.up", 16, 16, trainable=True)
        base[2] = copy.deepcopy(base[0])
        held = list(handle.parameters() if by_handle else (p for p in base.parameters() if p.requires_grad))
        assert len(held) == 4
        optimizer = torch.optim.SGD(held, lr=0.1)
        base(X).square().sum().backward()
        optimizer.step()
        found.append(base(X))
    return found[0], found[1]


def test_the_state_of_copied_layers_is_saved_under_their_names():
    base = nn.Sequential(Block(), nn.Linear(8, 16), Block()).double()
    handle = inject(base, "0.up", 16, 16, trainable=True)
    base[2] = copy.deepcopy(base[0])
    state = {name: value.clone() for name, value in handle.state_dict().items()}
    assert sorted(state) == ["0.up.lora.A", "0.up.lora.B", "2.up.lora.A", "2.up.lora.B"]
    before = base(X)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    handle.load_state_dict(state)
    torch.testing.assert_close(base(X), before)


@odd("a module that accelerate offloads is moved by to_empty()")
def _():
    base = one()
    inject(base)
    accelerate.hooks.add_hook_to_module(base[0], accelerate.hooks.ModelHook())
    base.to_empty(device="cpu")
    base.load_state_dict(one().state_dict())
    return base(X), linear(one()[0])


def test_there_are_forty():
    assert len(SITUATIONS) >= 40


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

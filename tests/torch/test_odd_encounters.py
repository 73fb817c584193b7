"""Odd situations of live models that other tools meet halfway: parts called alone, merges undone late, early traces.

Each gives what the formula gives, or a typed error, as in test_odd_situations.py. torch.compile wraps our error in one
of its own, which carries the text.
"""

import copy
import itertools
import tempfile

import accelerate
import peft
import pytest
import torch
import transformers
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from situations import Situations, X, adapter, changed, inject, one
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn import functional

import adapterkit as ak
from adapterkit.errors import Unsupported, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
SITUATIONS = Situations()
odd = SITUATIONS.odd
GONE = "no longer acts"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.run(x))

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return x


UP = "blocks.0.up"


def stack(**rest):
    """A model of blocks with a LoRA in the first, its handle, and the same model with the change in its weight."""
    model = Stack().double()
    twin = copy.deepcopy(model)
    twin.blocks[0].up.weight.data = changed(twin.blocks[0].up.weight.data)
    return model, inject(model, UP, 16, 16, **rest), twin


def linear(layer, seed=0):
    return functional.linear(X, changed(layer.weight, seed), layer.bias)


# A part of the model is called by itself.


@odd("a block called by itself")
def _():
    model, _, twin = stack()
    return model.blocks[0](X), twin.blocks[0](X)


@odd("a block called by itself after its layer was replaced", raises=Unsupported, match=GONE)
def _():
    model, _, _ = stack()
    model.blocks[0].up = nn.Linear(16, 16).double()
    model.blocks[0](X)


@odd("a block called by itself after quantize_dynamic", raises=Unsupported, match=GONE)
def _():
    model, _, _ = stack()
    torch.ao.quantization.quantize_dynamic(model.blocks[0].float(), {nn.Linear}, inplace=True)
    model.blocks[0](X.float())


class Nested(nn.Module):
    """A model whose inner stack is called without it."""

    def __init__(self):
        super().__init__()
        self.inner = Stack()

    def forward(self, x):
        return self.inner(x)


@odd("a stack called by itself after a block of its list was replaced", raises=Unsupported, match=GONE)
def _():
    model = Nested().double()
    inject(model, f"inner.{UP}", 16, 16)
    model.inner.blocks[0] = Block().double()
    model.inner(X)


@odd("a model whose block was replaced as a whole", raises=Unsupported, match=GONE)
def _():
    model, _, _ = stack()
    model.blocks[0] = Block().double()
    model(X)


@odd("merged after its block was replaced as a whole", raises=Unsupported, match=GONE)
def _():
    model, handle, _ = stack()
    model.blocks[0] = Block().double()
    handle.merge_()


@odd("a block called by itself after its layer was wrapped")
def _():
    model, _, twin = stack()
    model.blocks[0].up = nn.Sequential(model.blocks[0].up)
    return torch.cat([model.blocks[0](X), model.blocks[0](X)]), torch.cat([twin.blocks[0](X)] * 2)


@odd("layers that two blocks exchanged, each block called by itself")
def _():
    model, _, twin = stack()
    for each in (model, twin):
        first, second = each.blocks
        first.up, second.up = second.up, first.up
    return model.blocks[0](model.blocks[1](X)), twin.blocks[0](twin.blocks[1](X))


@odd("a copy of one block alone, its layer replaced", raises=Unsupported, match=GONE)
def _():
    model, _, twin = stack()
    block = copy.deepcopy(model.blocks[0])
    torch.testing.assert_close(block(X), twin.blocks[0](X))
    assert not any(isinstance(each, Stack) for each in _reached(block))  # A copied block does not copy the model.
    block.up = nn.Linear(16, 16).double()
    block(X)


def _reached(module):
    """What the hooks of a module and of those inside it hold."""
    for each in module.modules():
        for hook in each._forward_pre_hooks.values():
            yield from (place[0] for place in hook.places)


@odd("a copy of the whole model, a layer of one block replaced", raises=Unsupported, match=GONE)
def _():
    model = copy.deepcopy(stack()[0])
    model.blocks[0].up = nn.Linear(16, 16).double()
    model.blocks[0](X)


@odd("removed while another adapter stays in the block")
def _():
    model, handle, _ = stack()
    inject(model, "blocks.0.down", 16, 16, name="other", seed=3)
    handle.remove()
    twin = Stack().double()
    twin.blocks[0].down.weight.data = changed(twin.blocks[0].down.weight.data, 3)
    got = model.blocks[0](X)
    ak.torch.handles(model)["other"].remove()
    assert not any(module._forward_pre_hooks for module in model.modules())
    return got, twin.blocks[0](X)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("part", ["the model", "a block", "a block in place"])
def test_compiled_code_notices_a_replaced_module(full, part):
    torch._dynamo.reset()
    model, _, twin = stack()
    called, same = (model, twin) if part == "the model" else (model.blocks[0], twin.blocks[0])
    if part == "a block in place":
        called.compile(backend="eager", fullgraph=full)
        run = called
    else:
        run = torch.compile(called, backend="eager", fullgraph=full)
    torch.testing.assert_close(run(X), same(X))
    model.blocks[0].up = nn.Linear(16, 16).double()
    with pytest.raises((Unsupported, torch._dynamo.exc.InternalTorchDynamoError), match=GONE):
        run(X)


@odd("a replica of one block by nn.DataParallel, on one of several devices", raises=Unsupported, match="torchrun")
def _():
    model, _, _ = stack()
    replica = model.blocks[0]._replicate_for_data_parallel()
    replica(X)


# A layer is copied inside the model, as depth upscaling does.


def upscaled(model):
    """Put a copy of the first block behind it."""
    first, second = model.blocks
    model.blocks = nn.ModuleList([first, copy.deepcopy(first), second])
    return model


@odd("a copied layer in the same model, switched off, weighed and removed")
def _():
    model, handle, twin = stack(trainable=True)
    base = upscaled(Stack().double())
    upscaled(model)
    torch.testing.assert_close(model(X), upscaled(twin)(X))
    with handle.disable():
        torch.testing.assert_close(model(X), base(X))
    handle.set_active(False)
    torch.testing.assert_close(model(X), base(X))
    handle.set_active(True)
    handle.weight = 0
    torch.testing.assert_close(model(X), base(X))
    handle.remove()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
    model.blocks[1].up = copy.deepcopy(model.blocks[1].up)  # Nothing is watched there any more.
    return model(X), base(X)


@odd("a copied layer in the same model, the adapter read", raises=UsageError, match=r"blocks\.1\.up: a copied layer")
def _():
    model, handle, _ = stack()
    upscaled(model)
    handle.adapter()


@odd("a copied layer in the same model, merged", raises=UsageError, match="a copied layer")
def _():
    model, handle, _ = stack()
    upscaled(model)
    handle.merge_()


@odd("a block copied out of the model is on its own")
def _():
    model, handle, twin = stack()
    block = copy.deepcopy(model.blocks[0])
    handle.set_active(False)
    handle.remove()
    return block(X), twin.blocks[0](X)


# Merges undone after something else has happened.


@odd("unmerged after another adapter came to the layer")
def _():
    model = one()
    first = inject(model, name="first")
    first.merge_(keep=True)
    second = inject(model, name="second", seed=3)
    first.unmerge_()
    both = model(X)
    second.remove()
    torch.testing.assert_close(model(X), linear(one()[0]))
    layer = one()[0]
    return both, functional.linear(X, changed(changed(layer.weight), 3), layer.bias)


@odd("unmerged after another tool patched the layer's forward", raises=UsageError, match="replaced the layer's forward")
def _():
    model = one()
    handle = inject(model)
    handle.merge_(keep=True)
    doubled(model[0])
    handle.unmerge_()


@odd("merged and unmerged under a forward that another tool patched")
def _():
    model = one()
    handle = inject(model)
    doubled(model[0])
    handle.merge_(keep=True)
    merged = model(X)
    handle.unmerge_()
    handle.set_active(False)
    torch.testing.assert_close(model(X), one()(X) * 2)
    handle.set_active(True)
    return torch.cat([merged, model(X)]), torch.cat([linear(one()[0]) * 2] * 2)


@odd("merged and unmerged under hooks of accelerate")
def _():
    model = one()
    handle = inject(model)
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    handle.merge_(keep=True)
    merged = model(X)
    accelerate.hooks.remove_hook_from_module(model[0])
    handle.unmerge_()
    return torch.cat([merged, model(X)]), torch.cat([linear(one()[0])] * 2)


def doubled(module):
    """Patch the module's forward on the instance."""
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


@odd("a second adapter after another tool patched the layer's forward")
def _():
    model = one()
    inject(model)
    doubled(model[0])
    inject(model, name="second", seed=3)
    layer = one()[0]
    return model(X), functional.linear(X, changed(changed(layer.weight), 3), layer.bias) * 2


@odd("one of two adapters removed after another tool patched the layer's forward")
def _():
    model = one()
    inject(model)
    second = inject(model, name="second", seed=3)
    doubled(model[0])
    second.remove()
    return model(X), linear(one()[0]) * 2


@odd("unmerged after its name was taken", raises=UsageError, match="name")
def _():
    model = one()
    handle = inject(model)
    handle.merge_(keep=True)
    inject(model, seed=3)
    handle.unmerge_()


@odd("unmerged after load_state_dict(assign=True)", raises=UsageError, match="replaced after the merge")
def _():
    model = one()
    handle = inject(model)
    handle.merge_(keep=True)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    handle.unmerge_()


@odd("unmerged after its module was replaced", raises=UsageError, match="replaced after the merge")
def _():
    model = one()
    handle = inject(model)
    handle.merge_(keep=True)
    model[0] = nn.Linear(16, 8).double()
    handle.unmerge_()


@odd("unmerged in another dtype, from the bits kept")
def _():
    model = one()
    handle = inject(model)
    handle.merge_(keep=True)
    model.float()
    handle.unmerge_()
    assert torch.equal(model[0].weight, one()[0].weight.float())
    return model(X.float()), linear(one()[0]).float()


@odd("unmerged in another dtype, recomputed", raises=UsageError, match='keep="copy"')
def _():
    model = one()
    handle = inject(model)
    handle.merge_(keep="recompute")
    model.float()
    handle.unmerge_()


@odd("a copied model unmerged by the copied handle")
def _():
    results = []
    for keep in ("copy", "recompute"):
        model = one()
        handles = [inject(model, name=name, seed=seed) for seed, name in enumerate("ab")]
        for handle in handles:
            handle.merge_(keep=keep)
        model, handles = copy.deepcopy((model, handles))
        with pytest.raises(UsageError, match="in reverse order"):
            handles[0].unmerge_()
        for handle in reversed(handles):
            handle.unmerge_()
        assert torch.equal(model[0].weight, one()[0].weight)
        results.append(model(X))
    layer = one()[0]
    return torch.cat(results), torch.cat([functional.linear(X, changed(changed(layer.weight), 1), layer.bias)] * 2)


# Traces, and what torch makes under its modes.


@pytest.mark.parametrize(("trainable", "gradients"), list(itertools.product([False, True], repeat=2)))
def test_a_trace_before_any_forward(trainable, gradients):
    model, _, twin = stack(trainable=trainable)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (X,))  # Traces twice and compares the graphs.
    torch.testing.assert_close(traced(2 * X), twin(2 * X))


@odd("a trace that is frozen and optimized")
def _():
    model, _, twin = stack()
    return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model.eval(), (X,))))(2 * X), twin(2 * X)


@odd("injected under inference_mode to be trained")
def _():
    gradients = []
    for mode in (True, False):
        model = one()
        with torch.inference_mode(mode):
            handle = inject(model, trainable=True)
        model(X).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in handle.parameters()]))
    return gradients[0], gradients[1]


@pytest.mark.parametrize("targets", [["0"], "all-linear"])
def test_a_lazy_module_has_no_adapter_yet(targets):
    model = nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.Linear(16, 8)).double()
    with pytest.raises(Unsupported, match=r"0: this LazyLinear has no weight yet\. Call the model once"):
        ak.torch.create(model, "lora", targets=targets, rank=2)
    model(X)
    assert ak.torch.create(model, "lora", targets=targets, rank=2).updates


@odd("diffusers' layerwise casting of other layers")
def _():
    model = nn.Sequential(one()[0].float(), nn.Linear(8, 8))
    inject(model)
    apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["^0$"])
    model(X.float())
    W, b = model[1].weight.float(), model[1].bias.float()
    return model(X.float()), functional.linear(linear(one()[0]).float(), W, b)


@odd("diffusers' group offloading to disk, before and after")
def _():
    results = []
    for first in (True, False):
        model, twin = Stack().double(), stack()[2]
        with tempfile.TemporaryDirectory() as folder:
            if first:
                inject(model, UP, 16, 16)
            apply_group_offloading(
                model, onload_device=torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=folder
            )
            if not first:
                inject(model, UP, 16, 16)
            model(X)
            results.append(model(X))
    return torch.cat(results), torch.cat([twin(X)] * 2)


@odd("torch.distributed.checkpoint's state dicts of the model")
def _():
    model, handle, _ = stack(trainable=True)
    assert set(get_model_state_dict(model)) == set(Stack().state_dict())
    handle.checkpoint = "adapter"
    optimizer = torch.optim.AdamW(handle.parameters())
    model(X).sum().backward()
    optimizer.step()
    wanted, state = model(X), copy.deepcopy(get_model_state_dict(model))
    assert len(state) == 2
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    set_model_state_dict(model, state)
    return model(X), wanted


# Adapters that transformers itself manages, through PEFT.


IDS = torch.tensor([[5, 9, 2, 7, 7, 1]])
Q = "model.layers.0.self_attn.q_proj"


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def theirs(**more):
    torch.manual_seed(5)
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, **more)


def with_change(model, path=Q):
    layer = model.get_submodule(path)
    layer.weight.data = changed(layer.weight.data)
    return model


@pytest.mark.parametrize("first", [True, False])
def test_adapters_that_transformers_manages(first, monkeypatch, tmp_path):
    # transformers 5.24 asks for a newer PEFT than the tests have; what it calls is there.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model, twin = llama(), with_change(llama())
    twin.add_adapter(theirs())
    wanted = twin(IDS).logits
    handle = ak.torch.inject(model, adapter(Q, 16, 16)) if first else None
    model.add_adapter(theirs())
    handle = handle or ak.torch.inject(model, adapter(Q, 16, 16))
    assert [target.path for target in handle.adapter().updates] == [Q]

    def check(got, wanted):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)

    check(model(IDS).logits, wanted)
    model.save_pretrained(tmp_path)
    other = llama()
    ak.torch.inject(other, adapter(Q, 16, 16))
    other.load_adapter(str(tmp_path))
    check(other(IDS).logits, wanted)
    handle.merge_(keep=True)
    check(model(IDS).logits, wanted)
    handle.unmerge_()
    check(model(IDS).logits, wanted)
    model.disable_adapters()
    check(model(IDS).logits, with_change(llama())(IDS).logits)
    model.enable_adapters()
    model.delete_adapter("default")
    check(model(IDS).logits, with_change(llama())(IDS).logits)
    handle.remove()
    check(model(IDS).logits, llama()(IDS).logits)


KINDS = {
    "lora": theirs,
    "dora": lambda: theirs(use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False),
    "saved": lambda: theirs(modules_to_save=["lm_head"]),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_around_ours(kind, tmp_path):
    models = []
    for path in (Q, "lm_head"):
        model, base = llama(), with_change(llama(), path)
        weight = base.get_submodule(path).weight
        ak.torch.inject(model, adapter(path, *weight.shape))
        for each in (model, base):
            config = KINDS[kind]()
            torch.manual_seed(6)
            models.append(peft.get_peft_model(each, config).double().eval())
        torch.testing.assert_close(models[-2](IDS).logits, models[-1](IDS).logits, rtol=1e-9, atol=1e-9)
    model = models[0]
    model.save_pretrained(tmp_path)
    again = llama()
    ak.torch.inject(again, adapter(Q, 16, 16))
    again = peft.PeftModel.from_pretrained(again, tmp_path).double().eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    if kind == "lora":
        wanted = model(IDS).logits
        torch.testing.assert_close(model.merge_and_unload()(IDS).logits, wanted, rtol=1e-9, atol=1e-9)
    elif kind in ("dora", "ia3"):  # They scale the base's weight alone.
        with pytest.raises(Unsupported, match=r"PEFT merged its (LORA|IA3) into the weight that lora changes"):
            model.merge_and_unload()


def test_there_are_thirty():
    assert len(SITUATIONS) >= 30


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

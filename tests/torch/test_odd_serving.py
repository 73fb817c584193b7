"""Odd situations of serving and editing: layers that move, vocabularies that grow, ways to decode, other processes.

Each situation gives what the formula, or the same model in a plainer way, gives, or a typed error, as in
test_odd_situations.py.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import multiprocessing

import pytest
import torch
import transformers
from situations import Situations, X, adapter, changed, inject, one
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import ShapeMismatch, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd

IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 4]])
WORDS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def stack():
    torch.manual_seed(0)
    return Stack().double()


def llama():
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def t5():
    torch.manual_seed(5)
    config = transformers.T5Config(
        vocab_size=20, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=19,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


def fresh(model, method, seed=1):
    """A fresh adapter with other numbers than those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    made = ak.torch.create(model, method, rank=3, seed=seed)
    return made.map(lambda leaf: leaf + 0.5 * torch.randn(leaf.shape, generator=generator))


# Layers that move.


@odd("a block inserted in front of a layer with an adapter, its forward")
def _():
    model = stack()
    inject(model, "layers.1", 16, 16)
    model.layers.insert(0, nn.Linear(16, 16).double())
    first, second, third, last = model.layers
    h = second(first(X).tanh()).tanh()
    h = functional.linear(h, changed(third.weight), third.bias).tanh()
    return model(X), last(h).tanh()


@odd("a block inserted in front of a layer with an adapter, read back", UsageError, r"layers.1 is at layers.2 now")
def _():
    model = stack()
    handle = inject(model, "layers.1", 16, 16)
    model.layers.insert(0, nn.Linear(16, 16).double())
    handle.adapter()


@odd("an attention with a prefix that another block was put before", UsageError, "is at model.layers.1.self_attn")
def _():
    model = llama()
    handle = ak.torch.inject(model, fresh(model, "gated_prefix"))
    model.model.layers.insert(0, llama().model.layers[0])
    handle.adapter()


@odd("blocks behind a layer with an adapter cut off")
def _():
    model = stack()
    handle = inject(model, "layers.1", 16, 16)
    model.layers = model.layers[:2]
    again = stack()
    again.layers = again.layers[:2]
    ak.torch.inject(again, handle.adapter())
    return again(X), model(X)


@odd("a wrapper of one's own around a block, read back")
def _():
    model = nn.Sequential(stack(), nn.Tanh())
    handle = inject(model, "0.layers.1", 16, 16)
    model[0].layers[1] = Wrapper(model[0].layers[1])
    model[0] = Wrapper(model[0])
    again = nn.Sequential(stack(), nn.Tanh())
    ak.torch.inject(again, handle.adapter())
    return again(X), model(X)


@odd("parameters of modules that hold others, read back")
def _():
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(16, 2), "attention": nn.MultiheadAttention(16, 2)}).double()
    made = Adapter({Target("lstm.weight_ih_l0"): adapter("x").updates[Target("x")]})
    ak.torch.inject(model, made)
    inject(model, "attention.out_proj", 16, 16, name="other")
    found = [update for each in ak.torch.handles(model).values() for _, update in each.adapter()]
    wanted = [update for made in (adapter("x"), adapter("x", 16, 16)) for _, update in made]
    return tuple(
        torch.cat([each.delta(shape).flatten() for each, shape in zip(updates, [(8, 16), (16, 16)], strict=True)])
        for updates in (found, wanted)
    )


@odd("new tokens of an embedding that grew since", ShapeMismatch, "start at 20, but the embedding has 24 rows now")
def _():
    model = llama()
    ak.torch.inject(model, fresh(model, "textual_inversion"))
    model.resize_token_embeddings(24)
    model(IDS)


@odd("a prompt in a model whose vocabulary grew since")
def _():
    model = llama()
    ak.torch.inject(model, fresh(model, "prompt"))
    y = model(IDS).logits
    model.resize_token_embeddings(24)
    return model(IDS).logits[..., :20], y


# Ways to train.


@odd("a difference to the model without its adapter, in one graph")
def _():
    model = one()
    handle = inject(model, trainable=True)
    y = model(X)
    with handle.disable():
        reference = model(X)
    (y - reference).square().sum().backward()
    A, B = (parameter.detach().clone().requires_grad_() for parameter in handle.parameters())
    (0.25 * X @ A.mT @ B.mT).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in handle.parameters()]), torch.cat([A.grad.flatten(), B.grad.flatten()])


@odd("the gradient of a gradient's length")
def _():
    model = nn.Sequential(one(), nn.Tanh())
    handle = inject(model, "0.0", trainable=True)
    A, B = (parameter.detach().clone().requires_grad_() for parameter in handle.parameters())
    layer = model[0][0]
    for forward in (model, lambda x: functional.linear(x, layer.weight + 0.25 * B @ A, layer.bias).tanh()):
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(forward(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in handle.parameters()]), torch.cat([A.grad.flatten(), B.grad.flatten()])


@odd("saved tensors on the CPU and a jagged batch")
def _():
    model = one()
    handle = inject(model, trainable=True)
    with torch.autograd.graph.save_on_cpu():
        y = model(torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged))
    y.values().square().sum().backward()
    jagged = torch.cat([p.grad.flatten() for p in handle.parameters()])
    model.zero_grad()
    model(torch.cat((X, X[:2]))).square().sum().backward()
    return jagged, torch.cat([p.grad.flatten() for p in handle.parameters()])


# Ways to decode.


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_ways_to_decode_give_the_same_tokens(method):
    model, assistant = llama(), llama()
    ak.torch.inject(model, fresh(model, method))
    ak.torch.inject(assistant, fresh(assistant, method, seed=2))
    first = IDS[:1]
    wanted = model.generate(first, **WORDS)
    for more in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}):
        assert torch.equal(model.generate(first, **WORDS, **more), wanted)
    embeds = model.get_input_embeddings()(first)
    assert torch.equal(model.generate(inputs_embeds=embeds, **WORDS), wanted[:, 4:])


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "gated_prefix"])
def test_beams_of_an_encoder_decoder_with_a_cache(method):
    model = t5()
    ak.torch.inject(model, fresh(model, method))
    cached, anew = (model.generate(IDS, **WORDS, num_beams=3, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached, anew)


@pytest.mark.parametrize(
    "methods", [("prompt", "prefix"), ("prefix", "prefix"), ("adaption_prompt", "prefix"), ("lora", "prompt")]
)
def test_two_adapters_of_context_come_and_go(methods):
    model, twin = llama(), llama()
    first, second = (fresh(model, method, seed) for seed, method in enumerate(methods))
    handles = [ak.torch.inject(model, each, name=name) for each, name in ((first, "a"), (second, "b"))]
    assert torch.equal(model.generate(IDS, **WORDS), model.generate(IDS, **WORDS, use_cache=False))
    handles[0].remove()
    alone = ak.torch.inject(twin, second)
    assert torch.equal(model(IDS).logits, twin(IDS).logits)
    handles[1].remove()
    alone.remove()
    assert torch.equal(model(IDS).logits, llama()(IDS).logits)


# Other processes.


def _raise_by_one(model, x, out):
    """Run in a spawned process: what the model gives, and its adapter's tensors plus one, in shared memory."""
    out.copy_(model(x).detach())
    with torch.no_grad():
        for parameter in ak.torch.handles(model)["default"].parameters():
            parameter.add_(1)


@odd("share_memory, and a spawned process that changes the adapter")
def _():
    model = one()
    handle = inject(model, trainable=True)
    out, y = torch.zeros(3, 8).double().share_memory_(), model(X).detach()
    before = torch.cat([p.detach().flatten() for p in handle.parameters()])
    model.share_memory()
    process = multiprocessing.get_context("spawn").Process(target=_raise_by_one, args=(model, X, out))
    process.start()
    process.join(120)
    after = torch.cat([p.detach().flatten() for p in handle.parameters()])
    return torch.cat([out.flatten(), after]), torch.cat([y.flatten(), before + 1])


def test_there_are_ten():
    assert len(SITUATIONS) >= 10


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

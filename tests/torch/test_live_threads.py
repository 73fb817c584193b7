"""Many threads with one model: routes and switches of their own, and no thread sees another's weights."""

import asyncio
import gc
import itertools
import threading
import weakref

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Unsupported
from adapterkit.methods import METHODS
from adapterkit.torch.scopes import current

THREADS, ROUNDS = 8, 5


def example(method):
    """An update of a linear layer of 16 inputs and 8 outputs, near the base; None for methods without a fresh one."""
    try:
        adapter = ak.torch.create(nn.Sequential(nn.Linear(16, 8)), method, targets="0", rank=2)
    except AdapterkitError:
        return None
    generator = torch.Generator().manual_seed(2)
    ((update,),) = adapter.updates.values()
    moved = {
        name: leaf + 0.2 * torch.randn(leaf.shape, generator=generator)
        for name, leaf in update.tensors.items()
        if name not in update.frozen and leaf.is_floating_point()
    }
    return update.replace(**moved)


OF_WEIGHTS = {
    name: update
    for name, cls in METHODS.items()
    if cls.kind in ("additive", "weight") and (update := example(name)) is not None
}


def in_threads(work):
    """Runs `work(number)` in all threads at once; raises what any of them raised."""
    faults, gate = [], threading.Barrier(THREADS)

    def run(number):
        gate.wait()
        try:
            for _ in range(ROUNDS):
                work(number)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def routes(model, x, handle):
    """Each thread's way to call the model, with what it must give: on, off, and two routes."""
    on = model(x)
    with handle.disable():
        off = model(x)
    return [
        (lambda: model(x), on),
        (lambda: _disabled(model, x, handle), off),
        (lambda: _routed(model, x, ["default", None]), torch.cat((on[:1], off[1:]))),
        (lambda: _routed(model, x, [None, "default"]), torch.cat((off[:1], on[1:]))),
    ]


def _disabled(model, x, handle):
    with handle.disable():
        return model(x)


def _routed(model, x, names):
    with ak.torch.route(model, names):
        return model(x)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", OF_WEIGHTS)
def test_every_method_of_weights(method, dtype):
    update = OF_WEIGHTS[method]
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).to(dtype), torch.randn(2, 16, dtype=dtype)
    handle = ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    ways = routes(model, x, handle)

    # In 16 bits batched and single products round apart by two units of the largest term, not of their sum.
    loose = {"rtol": 1.6e-2, "atol": 4e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}

    def work(number):
        run, wanted = ways[number % len(ways)]
        torch.testing.assert_close(run(), wanted, **loose)

    in_threads(work)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attention", "lstm", "bottleneck"])
def test_modules_under_their_own_forward(kind):
    torch.manual_seed(0)
    if kind == "attention":
        model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)}).eval()
        x = torch.randn(2, 3, 16)
        target, shape = Target("attn.in_proj_weight"), (48, 16)
        run = lambda: model["attn"](x, x, x, need_weights=False)[0]  # noqa: E731
    elif kind == "lstm":
        model, x = nn.ModuleDict({"rnn": nn.LSTM(16, 8, batch_first=True)}), torch.randn(2, 3, 16)
        target, shape = Target("rnn.weight_ih_l0"), (32, 16)
        run = lambda: model["rnn"](x)[0]  # noqa: E731
    else:
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
                 "num_attention_heads": 2}  # fmt: skip
        model, x = transformers.BertModel(transformers.BertConfig(**sizes)).eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
        run = lambda: model(x).last_hidden_state  # noqa: E731
    if kind in ("attention", "lstm"):
        update = METHODS["lora"](A=torch.randn(2, shape[1]), B=torch.randn(shape[0], 2))
        handle = ak.torch.inject(model, Adapter({target: (update,)}))
    else:
        generator = torch.Generator().manual_seed(1)
        adapter = ak.torch.create(model, "bottleneck", rank=4, targets="*.output")
        adapter = adapter.map(lambda leaf: leaf + 0.3 * torch.randn(leaf.shape, generator=generator))
        handle = ak.torch.inject(model, adapter)
    on = run()
    with handle.disable():
        off = run()
    assert not torch.allclose(on, off)

    def work(number):
        if number % 2:
            torch.testing.assert_close(run(), on)
        else:
            with handle.disable():
                torch.testing.assert_close(run(), off)

    in_threads(work)


def test_tasks_of_asyncio_have_routes_of_their_own():
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(2, 16)
    update = METHODS["lora"](A=torch.randn(2, 16), B=torch.randn(8, 2))
    handle = ak.torch.inject(model, Adapter({Target("0"): (update,)}))
    ways = routes(model, x, handle)

    async def task(number):
        _, wanted = ways[2 + number % 2]
        with ak.torch.route(model, ["default", None] if number % 2 == 0 else [None, "default"]):
            await asyncio.sleep(0)
            torch.testing.assert_close(model(x), wanted)
            await asyncio.sleep(0)
            torch.testing.assert_close(model(x), wanted)

    async def all_of_them():
        await asyncio.gather(*(task(number) for number in range(8)))

    asyncio.run(all_of_them())
    torch.testing.assert_close(model(x), ways[0][1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(16, 8), reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_block_runs_as_it_ran_first(reentrant):
    """Gradients with backward() outside the `with` are those without checkpointing."""
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant), torch.randn(2, 16, requires_grad=True)
    update = METHODS["lora"](A=torch.randn(2, 16), B=torch.randn(8, 2))
    adapter = Adapter({Target("layer"): (update,)})
    handle = ak.torch.inject(model, adapter, trainable=True)
    with ak.torch.route(model, ["default", None]):
        plain = model.layer(x).square().sum()
    wanted = torch.autograd.grad(plain, list(handle.parameters()))
    with ak.torch.route(model, ["default", None]):
        loss = model(x).square().sum()
    loss.backward()
    for parameter, gradient in zip(handle.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    with handle.disable(), torch.no_grad():  # As a reference model is run in DPO.
        reference = model(x)
    wanted = torch.autograd.grad((model.layer(x) - reference).square().sum(), list(handle.parameters()))
    for parameter in handle.parameters():
        parameter.grad = None
    (model(x) - reference).square().sum().backward()
    for parameter, gradient in zip(handle.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    with ak.torch.route(model, ["default", None]):
        one = model(x).sum()
    with ak.torch.route(model, [None, "default"]):
        other = model(x).sum()
    with pytest.raises(Unsupported, match="recomputed"):
        (one + other).backward()


@pytest.mark.parametrize("gradients", [True, False])
def test_routes_of_earlier_steps_are_freed(gradients):
    """A training with another route in each step keeps few routes, and its steps do not become slower."""
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(6, 16)
    adapter = ak.torch.create(model, "lora", targets=["0"], rank=2)
    for name in ("a", "b"):
        ak.torch.inject(model, adapter, name=name, trainable=True)
    seen = []
    with torch.set_grad_enabled(gradients):
        for names in itertools.product("ab", repeat=6):
            with ak.torch.route(model, names):
                seen += map(weakref.ref, current().routes.values())
                y = model(x).sum()
            if gradients:
                y.backward()
    assert len(seen) == 64
    gc.collect()
    assert sum(each() is not None for each in seen) < 20


@torch.no_grad()
@pytest.mark.parametrize("method", ["gated_prefix", "adaption_prompt", "prefix", "prompt", "rows", "alora"])
def test_threads_with_and_without_what_a_route_cannot_send_by_rows(method):
    """Each thread has inputs of its own, and the adapter on or off."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(intermediate_size=24, use_cache=False, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    options = {
        "rows": {"targets": ["embed_tokens"], "index": [1]},
        "alora": {"targets": ["q_proj"], "invocation": [3], "rank": 2},
    }
    adapter = ak.torch.create(model, method, **options.get(method, {"rank": 2}))
    updates = {
        target: tuple(
            u.replace(**{n: t + 0.3 * torch.randn(t.shape) for n, t in u.tensors.items() if torch.is_floating_point(t)})
            for u in us
        )
        for target, us in adapter.updates.items()
    }
    handle = ak.torch.inject(model, adapter.replace(updates=updates))
    inputs = torch.randint(1, 4, (THREADS, 1, 6))
    on = [model(x).logits for x in inputs]
    with handle.disable():
        off = [model(x).logits for x in inputs]
    assert on[0].shape != off[0].shape or not torch.allclose(on[0], off[0])

    def work(number):
        for _ in range(20):
            if number % 2:
                torch.testing.assert_close(model(inputs[number]).logits, on[number])
            else:
                with handle.disable():
                    torch.testing.assert_close(model(inputs[number]).logits, off[number])

    in_threads(work)

"""Odd situations in what stands around a live model: other libraries, torch's modes, processes, threads, caches.

Each gives what the formula gives, or a typed error, as in test_odd_situations.py, which lists those of single modules.
"""

import copy
import functools
import io
import multiprocessing
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import accelerate
import peft
import pytest
import torch
import torch.distributed.pipelining
import transformers
from peft import LoraConfig, get_peft_model
from situations import Situations, X, adapter, changed, draw, inject, lora, one
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, ShapeMismatch, Unsupported, UsageError
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd


def linear(layer, x=None, seed=0):
    return functional.linear((X if x is None else x).to(layer.weight.dtype), changed(layer.weight, seed), layer.bias)


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8)).double()


IDS = torch.tensor([[5, 9, 2, 7, 7, 1]])


@functools.cache
def _llama(tied):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def llama(tied=False):
    return copy.deepcopy(_llama(tied))


Q = "model.layers.0.self_attn.q_proj"


def with_q(model, seed=0):
    """The same model with the LoRA's change of q_proj in its weight."""
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(Q)
    layer.weight.data = changed(layer.weight.data, seed)
    return twin


# PEFT beside it.


def peft_model(model=None, targets="0"):
    torch.manual_seed(3)
    config = LoraConfig(target_modules=[targets], r=2, init_lora_weights=False)
    return get_peft_model(one() if model is None else model, config)


def sum_of_peft(layer):
    """PEFT's layer and the LoRA of `inject`, by their weights."""
    W = layer.base_layer.weight
    W = W + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    return functional.linear(X, W + lora(8, 16).delta((8, 16)), layer.base_layer.bias)


@odd("beside PEFT's own LoRA")
def _():
    model = peft_model()
    inject(model)
    return model(X), sum_of_peft(model.base_model.model[0])


@odd("PEFT's LoRA put around the adapted module afterwards")
def _():
    model = one()
    inject(model)
    around = peft_model(model)
    return around(X), sum_of_peft(around.base_model.model[0])


@odd("PEFT merges and unmerges its adapter beside ours")
def _():
    model = peft_model()
    inject(model)
    wanted = sum_of_peft(model.base_model.model[0])
    model.merge_adapter()
    torch.testing.assert_close(model(X), wanted)
    model.unmerge_adapter()
    return model(X), wanted


@odd("PEFT's adapter unloaded beside ours")
def _():
    model = one()
    inject(model)
    plain = peft_model(model).unload()
    return plain(X), linear(plain[0])


@odd("PEFT's disable_adapter beside ours")
def _():
    model = peft_model()
    inject(model)
    with model.disable_adapter():
        return model(X), linear(model.base_model.model[0].base_layer)


@odd("PEFT's inject_adapter_in_model after ours")
def _():
    model = llama()
    inject(model, Q, 16, 16)
    wanted = with_q(llama())(IDS).logits
    peft.inject_adapter_in_model(LoraConfig(target_modules=["v_proj"], r=2), model)  # Its B is zero.
    return model(IDS).logits, wanted


# torch.compile, export, pipelining.


@odd("compiled, with changes of mode and dropout")
def _():
    model = one()
    inject(model, trainable=True, dropout=0.5)
    fast = torch.compile(model, backend="eager")
    outputs = [fast.train()(X) for _ in range(3)]
    assert not torch.allclose(outputs[0], outputs[1])
    return fast.eval()(X), linear(model[0])


@odd("the module compiled in place before injecting")
def _():
    model = one()
    model[0].compile(backend="eager")
    model(X)
    inject(model)
    return model(X), linear(model[0])


@odd("the model compiled in place after injecting, then switched off")
def _():
    model = one()
    handle = inject(model)
    model.compile(backend="eager")
    torch.testing.assert_close(model(X), linear(model[0]))
    handle.set_active(False)
    return model(X), functional.linear(X, model[0].weight, model[0].bias)


@odd("compiled for any size, with a graph for each")
def _():
    model = one()
    inject(model)
    fast = torch.compile(model, backend="eager", dynamic=True)
    for rows in (2, 5, 9):
        x = draw(rows, 16, seed=rows)
        torch.testing.assert_close(fast(x), linear(model[0], x))
    return fast(X), linear(model[0])


@odd("an exported program saved and loaded")
def _():
    model = one()
    inject(model)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,)), file)
    file.seek(0)
    return torch.export.load(file).module()(X), linear(model[0])


@odd("an exported program of a trained adapter, with other values")
def _():
    model = one()
    handle = inject(model, trainable=True)
    program = torch.export.export(model, (X,)).module()
    for parameter in program.parameters():
        parameter.data *= 2
    with torch.no_grad():
        model[0].weight *= 2
        model[0].bias *= 2
        for parameter in handle.parameters():
            parameter *= 2
    return program(X), model(X)


@odd("a pipeline split at its second module")
def _():
    model = two()
    inject(model)
    inject(model, "2", 8, 8, name="other")
    split = {"2": torch.distributed.pipelining.SplitPoint.BEGINNING}
    pipe = torch.distributed.pipelining.pipeline(model, (X,), split_spec=split)
    h = pipe.get_stage_module(0)(X)
    return pipe.get_stage_module(1)(h), linear(model[2], linear(model[0]).tanh())


@odd("a pipeline of trained adapters, stage by stage")
def _():
    model, twin = two(), two()
    handles = []
    for each in (model, twin):
        own = [inject(each, trainable=True), inject(each, "2", 8, 8, name="other", trainable=True)]
        handles.append([parameter for handle in own for parameter in handle.parameters()])
    split = {"2": torch.distributed.pipelining.SplitPoint.BEGINNING}
    pipe = torch.distributed.pipelining.pipeline(model, (X,), split_spec=split)
    pipe.get_stage_module(1)(pipe.get_stage_module(0)(X)).square().sum().backward()
    twin(X).square().sum().backward()
    assert not any("adapterkit" in key for key in model.state_dict(keep_vars=True))
    return tuple(torch.cat([parameter.grad.flatten() for parameter in each]) for each in handles)


# torch stumbles over the first object that is no function, a hook of ours.
# Copies and averages.


@odd("an average by torch.optim.swa_utils")
def _():
    model = one()
    handle = inject(model, trainable=True)
    average = swa_utils.AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter *= 3
    average.update_parameters(model)
    A, B = lora(8, 16).A * 2, lora(8, 16).B * 2  # The mean of 1 and 3.
    return average(X), functional.linear(X, model[0].weight + 0.25 * B @ A, model[0].bias)


@odd("an exponential average by torch.optim.swa_utils, of buffers too")
def _():
    model = one()
    inject(model)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average(X), linear(model[0])


def _elsewhere(data, queue):
    model, x = pickle.loads(data)
    with torch.no_grad():
        queue.put(model(x).numpy())


@odd("pickled to another process")
def _():
    model = one()
    inject(model)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_elsewhere, args=(pickle.dumps((model, X)), queue))
    process.start()
    got = torch.from_numpy(queue.get(timeout=300))
    process.join()
    return got, linear(model[0])


@odd("deepcopy inside a route and a switch")
def _():
    model = one()
    inject(model, name="a")
    inject(model, seed=1, name="b")
    with ak.torch.route(model, ["a", "b", None]):
        twin = copy.deepcopy(model)
        model(X)
    return twin(X), linear(model[0]) + functional.linear(X, lora(8, 16, seed=1).delta((8, 16)))


# Hugging Face's habits.


@odd("tie_weights() again after injecting at the embedding and the head")
def _():
    model = llama(tied=True)
    A, B = draw(2, 64), draw(16, 2, seed=1)
    ak.torch.inject(
        model, Adapter({Target("model.embed_tokens", "in out *k"): (METHODS["lora"](A=A, B=B, scaling=0.25),)})
    )
    before = model(IDS).logits
    model.tie_weights()
    return model(IDS).logits, before


@odd("untied after injecting at a tied head")
def _():
    model = llama(tied=True)
    ak.torch.inject(model, adapter("lm_head", 64, 16))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone() * 2)
    h = model.model(IDS).last_hidden_state
    return model(IDS).logits, functional.linear(h, changed(model.lm_head.weight))


@odd("resize_token_embeddings after injecting elsewhere")
def _():
    model = llama()
    inject(model, Q, 16, 16)
    model.resize_token_embeddings(70, mean_resizing=False)
    return model(IDS).logits, with_q(without(model))(IDS).logits


def without(model):
    twin = copy.deepcopy(model)
    for handle in ak.torch.handles(twin).values():
        handle.remove()
    return twin


@odd("resize_token_embeddings under an adapter of the embedding", raises=(ShapeMismatch, Unsupported))
def _():
    model = llama()
    update = METHODS["lora"](A=draw(2, 64), B=draw(16, 2, seed=1), scaling=0.25)
    ak.torch.inject(model, Adapter({Target("model.embed_tokens", "in out *k"): (update,)}))
    model.resize_token_embeddings(70, mean_resizing=False)
    return model(IDS).logits, model(IDS).logits


@odd("resize_token_embeddings under an adapter of the head", raises=(ShapeMismatch, Unsupported))
def _():
    model = llama()
    ak.torch.inject(model, adapter("lm_head", 64, 16))
    model.resize_token_embeddings(70, mean_resizing=False)
    return model(IDS).logits, model(IDS).logits


@odd("save_pretrained with an adapter attached")
def _():
    import tempfile

    model = llama()
    inject(model, Q, 16, 16, trainable=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return again(IDS).logits, llama()(IDS).logits


@odd("generate with beams and a cache")
def _():
    model = llama()
    inject(model, Q, 16, 16)
    told = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    return model.generate(IDS, **told), with_q(llama()).generate(IDS, **told)


@odd("generate with a cache of fixed size")
def _():
    model = llama()
    inject(model, Q, 16, 16)
    told = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    return model.generate(IDS, **told), with_q(llama()).generate(IDS, **told)


@odd("generate with an assistant model, each with an adapter")
def _():
    model, assistant = llama(), llama()
    inject(model, Q, 16, 16)
    inject(assistant, Q, 16, 16, seed=4)
    told = {"max_new_tokens": 8, "do_sample": False}
    return model.generate(IDS, assistant_model=assistant, **told), with_q(llama()).generate(IDS, **told)


@odd("generate with an assistant that is the model with its adapter off")
def _():
    model = llama()
    handle = inject(model, Q, 16, 16)
    draft = copy.deepcopy(model)
    ak.torch.handles(draft)["default"].set_active(False)
    assert handle.name == "default"
    told = {"max_new_tokens": 8, "do_sample": False}
    return model.generate(IDS, assistant_model=draft, **told), with_q(llama()).generate(IDS, **told)


@odd("generate with beams in a route of rows alone", raises=ShapeMismatch, match="flattened=True")
def _():
    model = llama()
    inject(model, Q, 16, 16)
    with ak.torch.route(model, ["default", None]):
        model.generate(IDS.expand(2, -1), max_new_tokens=3, num_beams=2, do_sample=False)


@odd("generate with beams in a flattened route")
def _():
    model = llama()
    inject(model, Q, 16, 16)
    told = {"max_new_tokens": 6, "num_beams": 2, "do_sample": False}
    with ak.torch.route(model, ["default", None], flattened=True):
        got = model.generate(IDS.expand(2, -1), **told)
    return got, torch.cat([with_q(llama()).generate(IDS, **told), llama().generate(IDS, **told)])


@odd("transformers' gradient checkpointing with gradients of inputs")
def _():
    gradients = []
    for checkpointed in (False, True):
        model = llama()
        handle = inject(model, Q, 16, 16, trainable=True)
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in handle.parameters()]))
    return gradients[1], gradients[0]


@odd("accelerate's dispatch_model after injecting")
def _():
    import tempfile

    model = two()
    inject(model)
    inject(model, "2", 8, 8, name="other")
    wanted = linear(model[2], linear(model[0]).tanh()).detach()
    with tempfile.TemporaryDirectory() as folder:
        places = {"0": "cpu", "1": "cpu", "2": "disk"}
        around = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        return around(X), wanted


@odd("accelerate's dispatch_model before injecting")
def _():
    import tempfile

    model = two()
    wanted = linear(model[2], linear(model[0]).tanh()).detach()
    with tempfile.TemporaryDirectory() as folder:
        places = {"0": "disk", "1": "cpu", "2": "cpu"}
        model = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        inject(model)
        inject(model, "2", 8, 8, name="other")
        return model(X), wanted


# Checkpointing, routes and autograd.


@odd("non-reentrant checkpointing inside a route, backward outside of it")
def _():
    gradients = []
    for checkpointed in (False, True):
        model = two()
        handles = [inject(model, name="a", trainable=True), inject(model, seed=1, name="b", trainable=True)]
        model.train()
        x = X.clone().requires_grad_()
        with ak.torch.route(model, ["b", "a", "b"]):
            y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for h in handles for p in h.parameters()] + [x.grad.flatten()]))
    return gradients[1], gradients[0]


@odd("two routes checkpointed, then one backward", raises=Unsupported, match="several routes")
def _():
    model = two()
    inject(model, name="a", trainable=True)
    inject(model, seed=1, name="b", trainable=True)
    model.train()
    x, total = X.clone().requires_grad_(), 0.0
    for names in (["a", "b", "a"], ["b", "b", "a"]):
        with ak.torch.route(model, names):
            total = total + checkpoint(model, x, use_reentrant=False).square().sum()
    total.backward()
    return x, x


@odd("tensors saved for the backward pass are packed by hooks")
def _():
    model = one()
    handle = inject(model, trainable=True)
    x = draw(64, 2048 // 16, 16, seed=1)
    with torch.autograd.graph.save_on_cpu():
        y = model(x)
    y.sum().backward()
    got = torch.cat([p.grad.flatten() for p in handle.parameters()])
    for p in handle.parameters():
        p.grad = None
    model(x).sum().backward()
    return got, torch.cat([p.grad.flatten() for p in handle.parameters()])


@odd(
    "an input written over between forward and backward", raises=RuntimeError, match="modified by an inplace operation"
)
def _():
    model = nn.Sequential(nn.Linear(16, 8)).double()
    inject(model, trainable=True)
    x = draw(8192, 16)
    y = model(x)
    x.mul_(2)
    y.sum().backward()


@odd(
    "the adapter written over between forward and backward",
    raises=RuntimeError,
    match="modified by an inplace operation",
)
def _():
    model = one()
    handle = inject(model, trainable=True)
    y = model(draw(8192, 16).requires_grad_())
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.mul_(2)
    y.sum().backward()


def _step(optimizers, parameter):
    optimizers[parameter].step()
    optimizers[parameter].zero_grad()


@odd("an optimizer step inside the backward pass")
def _():
    values = []
    for inside in (True, False):
        model = two()
        handle = inject(model, trainable=True)
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in handle.parameters()}
        if inside:
            for p in handle.parameters():
                p.register_post_accumulate_grad_hook(partial(_step, optimizers))
        model(X).sum().backward()
        if not inside:
            for optimizer in optimizers.values():
                optimizer.step()
        values.append(torch.cat([p.detach().flatten() for p in handle.parameters()]))
    return values[0], values[1]


@odd("anomaly detection and deterministic algorithms")
def _():
    model = one()
    inject(model, trainable=True)
    x = draw(8192, 16).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.set_detect_anomaly(True):
            model(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    return x.grad, changed(model[0].weight).sum(0).expand(8192, 16)


# Modes of torch around a forward.


@odd("under a TorchFunctionMode that counts")
def _():
    class Count(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model = one()
    inject(model)
    with Count():
        return model(X), linear(model[0])


@odd("under a TorchDispatchMode that logs")
def _():
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model = one()
    handle = inject(model, trainable=True)
    with Log():
        model(draw(8192, 16)).sum().backward()
    assert all(p.grad is not None for p in handle.parameters())
    return model(X), linear(model[0])


@odd("a fake forward for shapes, then a real one in a route")
def _():
    model = one()
    inject(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        for _ in range(3):
            with ak.torch.route(model, ["default"] * 3):
                assert model(mode.from_tensor(X)).shape == (3, 8)
    with ak.torch.route(model, ["default"] * 3), torch.no_grad():
        return model(X), linear(model[0])


@odd("injected and routed under another default device")
def _():
    model, update = one(), adapter()
    with torch.device("meta"):
        ak.torch.inject(model, update)
        with ak.torch.route(model, ["default"] * 3), torch.no_grad():
            for _ in range(3):
                got = model(X)
    return got, linear(model[0])


@odd("injected under another default dtype")
def _():
    model = one().float()
    torch.set_default_dtype(torch.float64)
    try:
        inject(model)
        got = model(X.float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    return got, linear(model[0])


@odd("an input of another dtype", raises=(RuntimeError, AdapterkitError))
def _():
    model = one()
    inject(model)
    return model(X.float()), X


@odd("an input of another dtype in a route", raises=(RuntimeError, AdapterkitError))
def _():
    model = one()
    inject(model)
    with ak.torch.route(model, ["default"] * 3), torch.no_grad():
        for _ in range(3):
            model(X)
        model(X.float())


@odd("a nested tensor as input")
def _():
    model = one()
    inject(model)
    parts = [draw(2, 16), draw(5, 16, seed=1)]
    got = model(torch.nested.nested_tensor(parts, layout=torch.jagged))
    return torch.cat(list(got.unbind())), linear(model[0], torch.cat(parts))


# Hooks and errors on the way.


@odd("a hook that raises inside a route")
def _():
    model = two()
    inject(model, name="a")
    inject(model, seed=1, name="b")

    def fail(*_):
        raise ValueError

    hook = model[1].register_forward_hook(fail)
    with pytest.raises(ValueError), ak.torch.route(model, ["a", "b", "a"]):  # noqa: PT011 - the hook's own
        model(X)
    hook.remove()
    h = linear(model[0]) + functional.linear(X, lora(8, 16, seed=1).delta((8, 16)))
    return model(X), functional.linear(h.tanh(), model[2].weight, model[2].bias)


@odd("an error in the forward while parameters are exchanged")
def _():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(16, 8, batch_first=True)).double()
    update = METHODS["lora"](A=draw(2, 16), B=draw(32, 2, seed=1), scaling=0.25)
    ak.torch.inject(model, Adapter({Target("0.weight_ih_l0"): (update,)}))
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.zeros(1, 2, 3, 4, 16, dtype=torch.float64))
    twin = nn.LSTM(16, 8, batch_first=True).double()
    twin.load_state_dict(model[0].state_dict())
    twin.weight_ih_l0.data += update.delta((32, 16))
    x = draw(2, 5, 16)
    return model(x)[0], twin(x)[0]


@odd("another tool deletes the instance's forward", raises=Unsupported, match="forward")
def _():
    model = one()
    inject(model)
    del model[0].forward
    return model(X), linear(model[0])


@odd("the forward of the module's class is patched afterwards", raises=Unsupported, match="class")
def _():
    class Twice(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(Twice(16, 8)).double()
    inject(model)
    Twice.forward = lambda self, x: 2 * nn.Linear.forward(self, x)
    return model(X), linear(model[0])


@odd("the module's class is exchanged for one with another forward", raises=Unsupported, match="class")
def _():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = one()
    inject(model)
    model[0].__class__ = Twice
    return model(X), linear(model[0])


@odd("the weight becomes a buffer")
def _():
    model = one()
    inject(model)
    W = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", W)
    return model(X), linear(model[0])


@odd("weight_norm taken off before injecting")
def _():
    model = one()
    parametrizations.weight_norm(model[0])
    parametrize.remove_parametrizations(model[0], "weight")
    inject(model)
    return model(X), linear(model[0])


@odd("weight_norm put on and taken off after injecting")
def _():
    model = one()
    handle = inject(model)
    before = model(X)
    parametrizations.weight_norm(model[0])
    torch.testing.assert_close(model(X), before)
    parametrize.remove_parametrizations(model[0], "weight")
    torch.testing.assert_close(model(X), before)
    handle.merge_()
    return model(X), before


@odd("a parametrized bias of the same module")
def _():
    class Half(nn.Module):
        def forward(self, b):
            return b / 2

    model = one()
    inject(model)
    parametrize.register_parametrization(model[0], "bias", Half())
    return model(X), linear(model[0])


@odd("a parametrized bias of the same module, in a route")
def _():
    class Half(nn.Module):
        def forward(self, b):
            return b / 2

    model = one()
    inject(model)
    parametrize.register_parametrization(model[0], "bias", Half())
    with ak.torch.route(model, ["default"] * 3), torch.no_grad():
        for _ in range(4):
            got = model(X)
    return got, linear(model[0])


@odd("a pruned bias of the same module")
def _():
    model = one()
    inject(model)
    prune.l1_unstructured(model[0], "bias", amount=3)
    return model(X), linear(model[0])


@odd("pruned globally, the adapter's own tensors too")
def _():
    model = two()
    handle = inject(model, trainable=True)
    tensors = [(m, name) for m in model.modules() for name, _ in m.named_parameters(recurse=False)]
    prune.global_unstructured([each for each in tensors if "weight" in each[1]], prune.L1Unstructured, amount=0.3)
    ((_, update),) = handle.adapter()
    h = functional.linear(X, model[0].weight + update.delta((8, 16)), model[0].bias).tanh()
    return model(X), functional.linear(h, model[2].weight, model[2].bias)


@odd("quantization-aware training prepared afterwards", raises=Unsupported, match="takes over the weight of a module")
def _():
    model = one().float()
    inject(model)
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(model.train(), inplace=True)
    return model(X.float()), X


# Handles, names and state.


@odd("load_state_dict(assign=True) of a checkpoint of the adapter alone")
def _():
    model = one()
    handle = inject(model, trainable=True)
    handle.checkpoint = "adapter"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    model.load_state_dict(state, assign=True)
    return model(X), linear(model[0])


@odd("named_parameters(remove_duplicate=False) of shared tensors")
def _():
    model = two()
    fresh = ak.torch.create(model, "vera", targets=["0", "2"], rank=2)
    handle = ak.torch.inject(model, fresh, trainable=True)
    every = dict(model.named_parameters(remove_duplicate=False))
    assert {id(p) for p in handle.parameters()} <= {id(p) for p in every.values()}
    optimizer = torch.optim.SGD(list({id(p): p for p in every.values() if p.requires_grad}.values()), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    twin = two()
    ak.torch.inject(twin, handle.adapter())
    return model(X), twin(X)


@odd("one of two handles merged and unmerged while the other is removed")
def _():
    model = one()
    first, second = inject(model, name="a"), inject(model, seed=1, name="b")
    first.merge_(keep=True)
    second.remove()
    first.unmerge_()
    return model(X), linear(model[0])


@odd("a LoRA merged under a DoRA, which looks at the weight")
def _():
    model, twin = one(), one()
    size = draw(8, seed=9).abs() + 0.5
    dora = METHODS["dora"](A=draw(2, 16, seed=3), B=draw(8, 2, seed=4), magnitude=size, scaling=0.25)
    handle = inject(model, name="a")
    ak.torch.inject(model, Adapter({Target("0"): (dora,)}), name="b")
    handle.merge_()
    W = changed(twin[0].weight)
    return model(X), functional.linear(X, dora.new_weight(W), twin[0].bias)


@odd("removed inside its own route")
def _():
    model = one()
    handle = inject(model, name="a")
    inject(model, seed=1, name="b")
    with ak.torch.route(model, ["b", "b", None]):
        handle.remove()
        got = model(X)
    return got[:2], linear(model[0], seed=1)[:2]


@odd("an adapter removed that its route names", raises=UsageError, match="Exit the `with route")
def _():
    model = one()
    handle = inject(model, name="a")
    inject(model, seed=1, name="b")
    with ak.torch.route(model, ["a", "b", None]):
        handle.remove()
        model(X)


@odd("another thread removes an adapter that a route names", raises=UsageError, match="was removed")
def _():
    model = one()
    handle = inject(model, name="a")
    inject(model, seed=1, name="b")
    with ak.torch.route(model, ["a", "b", None]), ThreadPoolExecutor(1) as pool:
        model(X)
        pool.submit(handle.remove).result()
        model(X)


@odd("injected inside a route")
def _():
    model = one()
    inject(model, name="a")
    with ak.torch.route(model, ["a", None, "a"]):
        model(X)
        inject(model, seed=1, name="b")
        got = model(X)
    wanted = linear(model[0])
    return got[::2], wanted[::2]


@odd("an adapter of the same name on a part of the model", raises=UsageError, match="name")
def _():
    model = nn.ModuleDict({"encoder": one()})
    inject(model["encoder"])
    ak.torch.inject(model, adapter("encoder.0"))


@odd("adapters on a part and on the whole, routed through the whole")
def _():
    model = nn.Sequential(one(), nn.Identity())
    inject(model[0], name="part")
    inject(model, "0.0", seed=1, name="whole")
    with ak.torch.route(model, ["part", "whole", None]):
        got = model(X)
    rows = linear(model[0][0]), linear(model[0][0], seed=1), functional.linear(X, model[0][0].weight, model[0][0].bias)
    return got, torch.stack([row[i] for i, row in enumerate(rows)])


@odd("parameters as one vector and back")
def _():
    model = one()
    handle = inject(model, trainable=True)
    vector = nn.utils.parameters_to_vector(handle.parameters())
    nn.utils.vector_to_parameters(vector * 1, handle.parameters())
    return model(X), linear(model[0])


# Threads.


@odd("threads that inject and remove while others run")
def _():
    model = one()
    inject(model, name="stays")
    wanted, base = linear(model[0]), functional.linear(X, lora(8, 16, seed=1).delta((8, 16)))
    stop, wrong = threading.Event(), []

    def serve():
        while not stop.is_set():
            with torch.no_grad():
                got = model(X)
            if not (torch.allclose(got, wanted) or torch.allclose(got, wanted + base)):
                wrong.append(got)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(serve) for _ in range(3)]
        try:
            for _ in range(60):
                inject(model, seed=1, name="comes").remove()
        finally:
            stop.set()
        for each in running:
            each.result()
    assert not wrong
    return model(X), wanted


@odd("threads that route while another injects and removes")
def _():
    model = one()
    inject(model, name="a")
    wanted = linear(model[0])
    stop, wrong = threading.Event(), []

    def serve():
        while not stop.is_set():
            with ak.torch.route(model, ["a"] * 3), torch.no_grad():
                got = model(X)
            if not torch.allclose(got, wanted):
                wrong.append(got)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(serve) for _ in range(3)]
        try:
            for _ in range(60):
                inject(model, seed=1, name="comes").remove()
        finally:
            stop.set()
        for each in running:
            each.result()
    assert not wrong
    return model(X), wanted


def test_there_are_forty():
    assert len(SITUATIONS) >= 40


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

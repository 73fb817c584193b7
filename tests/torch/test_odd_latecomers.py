"""Odd situations of what comes after injecting: offloading, quantization, replicas, other tools' trainings and modes.

Each gives what the formula gives, or a typed error, as in test_odd_situations.py. tools/foreign/check_quantized_live.py
runs torchao itself.
"""

import copy
import io
import multiprocessing
import tempfile
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
import transformers
from situations import Situations, X, adapter, changed, draw, inject, lora, one
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported, UsageError
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd

IDS = torch.tensor([[5, 9, 2, 7, 7, 1]])
Q = "model.layers.0.self_attn.q_proj"


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8)).double()


def linear(layer, x=X, seed=0):
    return functional.linear(x.to(layer.weight.dtype), changed(layer.weight, seed), layer.bias)


def both(model):
    """Two(), with the LoRA's change in the first weight."""
    return model[2](linear(model[0]).tanh())


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def with_q(model):
    """The same model with the LoRA's change of q_proj in its weight."""
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(Q)
    layer.weight.data = changed(layer.weight.data)
    return twin


def offload(model, **more):
    return accelerate.cpu_offload(model, execution_device="cpu", **more)


def train(model, parameters, steps=3):
    optimizer = torch.optim.SGD(list(parameters), lr=0.1)
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(X)


def trained():
    """What three steps of training give without anything odd."""
    model = two()
    return train(model, inject(model, trainable=True).parameters())


def gradients(handle):
    return torch.cat([parameter.grad.flatten() for parameter in handle.parameters()])


def of_training(model=None):
    """The gradients of one backward pass without anything odd."""
    model = model or two()
    handle = inject(model, trainable=True)
    model(X).square().sum().backward()
    return gradients(handle)


# accelerate offloads the model after an adapter to train was injected.


@odd("offloaded by accelerate after a trained adapter was injected")
def _():
    model = two()
    inject(model, trainable=True)
    wanted = both(model).detach()
    return offload(model)(X), wanted


@odd("offloaded by accelerate, then trained by an optimizer from before")
def _():
    model = two()
    parameters = list(inject(model, trainable=True).parameters())
    return train(offload(model), parameters), trained()


@odd("offloaded by accelerate, then trained by an optimizer of the handle's parameters")
def _():
    model = two()
    handle = inject(model, trainable=True)
    offload(model)
    return train(model, handle.parameters()), trained()


@odd("offloaded by accelerate, then trained by an optimizer of what was left", raises=Unsupported, match="optimizer")
def _():
    model = two()
    inject(model, trainable=True)
    offload(model)
    train(model, [p for p in model.parameters() if p.requires_grad])


@odd("offloaded by accelerate, a DoRA, an IA3 and a route")
def _():
    model = two()
    methods = METHODS["dora"](A=draw(2, 16, seed=1), B=draw(8, 2, seed=2), magnitude=draw(8, seed=3).abs() + 1)
    for name, update in (("dora", methods), ("ia3", METHODS["ia3"](l=draw(8, seed=4)))):
        ak.torch.inject(model, Adapter({Target("0"): (update,)}), name=name, trainable=True)
    with torch.no_grad(), ak.torch.route(model, ["dora", None, "ia3"]):
        wanted = model(X)
        return offload(model)(X), wanted


@odd("offloaded to disk by accelerate after a trained adapter was injected")
def _():
    model = two()
    inject(model, trainable=True)
    wanted = both(model).detach()
    with tempfile.TemporaryDirectory() as folder:
        return accelerate.disk_offload(model, folder, execution_device="cpu")(X), wanted


@odd("dispatched by accelerate after a trained adapter was injected")
def _():
    model = two()
    inject(model, trainable=True)
    wanted = both(model).detach()
    with tempfile.TemporaryDirectory() as folder:
        places = {"0": "disk", "1": "cpu", "2": "cpu"}
        around = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
        return around(X), wanted


@odd("offloaded by accelerate, which loads a whole block at once")
def _():
    class Block(nn.Sequential):
        pass

    model = nn.Sequential(Block(*two()))
    inject(model, "0.0", trainable=True)
    wanted = both(model[0]).detach()
    late = nn.Sequential(Block(*two()))
    offload(late, preload_module_classes=["Block"])
    inject(late, "0.0", trainable=True)
    offload(model, preload_module_classes=["Block"])
    return torch.stack([model(X), late(X)]), wanted.expand(2, 3, 8)


@odd("offloaded by accelerate, which loads the whole model at once", raises=Unsupported, match="preload_module_classes")
def _():
    model = two()
    inject(model, trainable=True)
    offload(model, preload_module_classes=["Sequential"])(X)


@odd("offloaded by accelerate and taken off again, the adapter too")
def _():
    model = two()
    keys = list(model.state_dict())
    handle = inject(model, trainable=True)
    offload(model)(X)
    accelerate.hooks.remove_hook_from_submodules(model)
    found = [model(X).detach()]
    wanted = [both(model).detach(), two()(X)]
    handle.remove()
    assert list(model.state_dict()) == keys
    return torch.stack([*found, model(X)]), torch.stack(wanted)


@odd("a checkpoint of the adapter alone, saved after accelerate offloaded the model")
def _():
    model = two()
    handle = inject(model, trainable=True)
    handle.checkpoint = "adapter"
    wanted = torch.cat([value.flatten() for value in model.state_dict().values()])
    offload(model)
    return torch.cat([value.flatten() for value in model.state_dict().values()]), wanted


@odd("the adapter read back after accelerate offloaded the model")
def _():
    model = two()
    handle = inject(model, trainable=True)
    offload(model)
    ((_, update),) = handle.adapter()
    return update.delta((8, 16)), lora(8, 16).delta((8, 16))


@odd("a copy of a model that accelerate offloaded")
def _():
    model = two()
    inject(model, trainable=True)
    wanted = both(model).detach()
    return copy.deepcopy(offload(model))(X), wanted


@odd("moved by accelerate between forwards")
def _():
    model = two()
    inject(model, trainable=True)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device="cpu")
    model(X)
    hook.offload()
    return model(X), both(model)


@odd("a checkpointed block of a model that accelerate offloaded")
def _():
    found = []
    for frozen in (False, True):
        model, plain = two(), two()
        gradients_of_x = []
        for each in (model, plain):
            inject(each.train().requires_grad_(False), trainable=not frozen)
            x = X.clone().requires_grad_()
            if each is model:
                offload(each)
                each(X)
                y = torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False)
            else:
                y = each(x)
            y.square().sum().backward()
            gradients_of_x.append(x.grad)
        found.append(gradients_of_x)
    return torch.stack([first for first, _ in found]), torch.stack([second for _, second in found])


# A weight that another library packs where it is, as torchao's `quantize_` does.


class Packed(torch.Tensor):
    """A weight in eighths, that only a linear layer and `dequantize` can read."""

    @staticmethod
    def __new__(cls, eighths):
        return torch.Tensor._make_wrapper_subclass(cls, eighths.shape, dtype=torch.float64)

    def __init__(self, eighths):
        self.eighths = eighths

    def dequantize(self):
        return self.eighths.double() / 8

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is functional.linear:
            x, W, *rest = args
            return functional.linear(x, W.dequantize(), *rest)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].eighths)
        raise NotImplementedError(function)


def packed(layer):
    """Pack a layer's weight; return what it stands for."""
    eighths = (layer.weight.detach() * 8).round().to(torch.int8)
    layer.weight = nn.Parameter(Packed(eighths), requires_grad=False)
    return eighths.double() / 8


@odd("a weight packed in its place, LoRA")
def _():
    model = one()
    inject(model, trainable=True)
    W = packed(model[0])
    return model(X), functional.linear(X, changed(W), model[0].bias)


@odd("a weight packed in its place, DoRA in training")
def _():
    model = one()
    update = METHODS["dora"](A=draw(2, 16, seed=1), B=draw(8, 2, seed=2), magnitude=draw(8, seed=3).abs() + 1)
    ak.torch.inject(model, Adapter({Target("0"): (update,)}), trainable=True)
    model(X).sum().backward()
    W = packed(model[0])
    return model(X), functional.linear(X, update.new_weight(W), model[0].bias)


@odd("a weight packed in its place, IA3 and OFT in a route")
def _():
    model = one()
    for name in ("ia3", "oft"):
        options = {"rank": 2} if name == "oft" else {}
        made = ak.torch.create(one(), name, targets="0", **options)
        ((target, update),) = made
        moved = {n: t + 0.1 * draw(*t.shape, seed=5).to(t.dtype) for n, t in update.tensors.items()}
        ak.torch.inject(model, made.replace(updates={target: (update.replace(**moved),)}), name=name)
    wanted = one()
    for handle in ak.torch.handles(model).values():
        ak.torch.inject(wanted, handle.adapter(), name=handle.name)
    W = packed(model[0])
    wanted[0].weight.data.copy_(W)
    names = ["oft", "ia3", None]
    with torch.no_grad(), ak.torch.route(model, names), ak.torch.route(wanted, names):
        return model(X), wanted(X)


@odd("a weight packed in its place, merged", raises=NotMergeable)
def _():
    model = one()
    handle = inject(model)
    packed(model[0])
    handle.merge_()


# Replicas, and trainings that others arrange.


@odd("a replica of nn.DataParallel, on one of several devices", raises=Unsupported, match="torchrun")
def _():
    model = one()
    inject(model)
    model._replicate_for_data_parallel()(X)


@odd("nn.DataParallel on a CPU, trained")
def _():
    model = two()
    handle = inject(model, trainable=True)
    return train(nn.DataParallel(model), handle.parameters()), trained()


@odd("an optimizer that gets the adapter's parameters later")
def _():
    model = two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.add_param_group({"params": list(inject(model, trainable=True).parameters())})
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(X), trained()


@odd("requires_grad_(True) of the whole model by others, and remove")
def _():
    model, plain = two(), two()
    handle = inject(model, trainable=True)
    model.requires_grad_(True)
    model(X).square().sum().backward()
    both(plain).square().sum().backward()
    handle.remove()
    assert all(parameter.requires_grad for parameter in model.parameters())
    return model[0].weight.grad, plain[0].weight.grad


@odd("requires_grad_(False) of the whole model by others", raises=RuntimeError, match="does not require grad")
def _():
    model = two()
    inject(model, trainable=True)
    model.requires_grad_(False)
    model(X).sum().backward()


@odd("LoRA+ groups under a learning rate's schedule")
def _():
    found = []
    for scheduled in (False, True):
        model = two()
        groups = inject(model, trainable=True).parameter_groups(0.1)
        optimizer = torch.optim.SGD(groups)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 2) if scheduled else None
        for step in range(3):
            if schedule is None:
                for group, rate in zip(optimizer.param_groups, (0.1, 1.6), strict=True):
                    group["lr"] = rate * min(0.5 + step / 4, 1.0)
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if schedule is not None:
                schedule.step()
        found.append(model(X))
    return found[1], found[0]


@odd("an average whose batch norms are updated")
def _():
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)).double()
    inject(model, trainable=True)
    mean = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    mean.update_parameters(model)
    torch.optim.swa_utils.update_bn([X], mean)
    return mean.eval().module[1].running_mean, linear(model[0]).mean(0)


@odd("tensors saved for the backward pass are kept on the CPU")
def _():
    model = two()
    handle = inject(model, trainable=True)
    with torch.autograd.graph.save_on_cpu():
        model(X).square().sum().backward()
    return gradients(handle), of_training()


@odd("saved tensors that may be mutated")
def _():
    model = two()
    handle = inject(model, trainable=True)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        model(X).square().sum().backward()
    return gradients(handle), of_training()


@odd("a function of another tool that runs the model inside, under autocast")
def _():
    model = one().float()
    handle = inject(model, trainable=True)

    class Inside(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
        def forward(ctx, x):
            with torch.enable_grad():
                ctx.x = x.detach().requires_grad_()
                ctx.y = model(ctx.x)
            return ctx.y.detach()

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, gradient):
            torch.autograd.backward(ctx.y, gradient)
            return ctx.x.grad

    with torch.autocast("cpu", dtype=torch.bfloat16):
        Inside.apply(X.float().requires_grad_()).square().sum().backward()
    plain = one().float()
    other = inject(plain, trainable=True)
    plain(X.float()).square().sum().backward()
    return gradients(handle), gradients(other)


@odd("transformers' reentrant checkpointing, no gradient for the inputs")
def _():
    found = []
    for reentrant in (False, True):
        model = llama().train()
        handle = inject(model, Q, 16, 16, trainable=True)
        if reentrant:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gradients(handle))
    return found[1], found[0]


def checkpointed(model, between):
    """The gradients of a checkpointed forward, with something done before the backward pass."""
    handle = inject(model.train(), trainable=True)
    y = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
    with torch.no_grad():
        between(handle)
    y.square().sum().backward()
    return gradients(handle)


@odd("a weight set between a checkpointed forward and its backward", raises=Unsupported, match=r"recomputed.*weight")
def _():
    checkpointed(two(), lambda handle: setattr(handle, "weight", 0.5))


@odd("two weights, checkpointed, then one backward", raises=Unsupported, match="recomputed")
def _():
    model = two().train()
    handle = inject(model, trainable=True)
    first = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
    handle.weight = 0.5
    second = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
    (first + second).sum().backward()


@odd(
    "switched off between a checkpointed forward and its backward",
    raises=Unsupported,
    match=r"recomputed.*switch changed",
)
def _():
    checkpointed(two(), lambda handle: handle.set_active(False))


@odd("switched off for a reference between a checkpointed forward and its backward")
def _():
    model = two()

    def reference(handle):
        handle.set_active(False)
        torch.testing.assert_close(model(X), two()(X))
        handle.set_active(True)

    return checkpointed(model, reference), of_training()


@odd("a weight set after each backward of a checkpointed training")
def _():
    found = []
    for keeps in (False, True):
        model = two().train()
        handle = inject(model, trainable=True)
        for weight in (1.0, 0.5, 2.0):
            handle.weight = weight
            y = model(X) if keeps else torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False)
            y.square().sum().backward()
        found.append(gradients(handle))
    return found[0], found[1]


@odd("routes of two generators that take turns", raises=UsageError, match="block overlaps another")
def _():
    model = one()
    inject(model, name="a")
    inject(model, name="b", seed=1)

    def stream(name):
        # No `torch.no_grad()` here: torch would restore it in the wrong order too, for all later tests.
        with ak.torch.route(model, [name] * 3):
            yield model(X)

    first, second = stream("a"), stream("b")
    next(first), next(second)
    next(first, None)


@odd("a route that another thread leaves", raises=UsageError, match="overlaps another, or ends in another thread")
def _():
    model = one()
    inject(model, name="a")

    def stream():
        with ak.torch.route(model, ["a"] * 3):
            yield

    made = stream()
    ThreadPoolExecutor(1).submit(next, made).result()
    next(made, None)


# Modes and functions of torch.


@odd("forward-mode derivatives by the input")
def _():
    model = one()
    inject(model)
    _, tangent = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    return tangent, torch.ones_like(X) @ changed(model[0].weight).T


@odd("forward-mode derivatives by the adapter's tensors")
def _():
    model = one()
    inject(model, trainable=True)
    held = {name: p.detach() for name, p in model.named_parameters() if "adapterkit" in name}
    ones = {name: torch.ones_like(p) for name, p in held.items()}
    _, tangent = torch.func.jvp(lambda p: torch.func.functional_call(model, p, (X,)), (held,), (ones,))
    A, B = (held[name] for name in sorted(held))
    return tangent, 0.25 * (X @ A.T @ torch.ones_like(B).T + X @ torch.ones_like(A).T @ B.T)


@odd("vmap over a route of one adapter")
def _():
    model = one()
    inject(model, name="a")
    with ak.torch.route(model, ["a"]):
        return torch.func.vmap(lambda x: model(x[None])[0])(X), linear(model[0])


@odd("torch.nn.utils.stateless' functional_call")
def _():
    model = one()
    inject(model, trainable=True)
    given = {"0.weight": draw(8, 16, seed=3)}
    made = torch.nn.utils.stateless.functional_call(model, given, (X,))
    return made, functional.linear(X, changed(given["0.weight"]), model[0].bias)


@odd("swap_tensors of the base's weight")
def _():
    model = one()
    inject(model)
    torch.utils.swap_tensors(model[0].weight, nn.Parameter(draw(8, 16, seed=3)))
    return model(X), functional.linear(X, changed(draw(8, 16, seed=3)), model[0].bias)


@odd("swap_tensors of an adapter's factor between two forwards of a route")
def _():
    model = one()
    inject(model, name="a")
    inject(model, name="b", seed=1)
    with torch.no_grad(), ak.torch.route(model, ["a", "b", "a"]):
        model(X)
        name = next(name for name in model[0]._buffers if "a:" in name and name.endswith("A"))
        torch.utils.swap_tensors(model[0]._buffers[name], draw(2, 16, seed=9))
        delta = lora(8, 16).replace(A=draw(2, 16, seed=9)).delta((8, 16))
        return model(X)[0], functional.linear(X[0], model[0].weight + delta, model[0].bias)


@odd("share_memory after injecting, and a forked process")
def _():
    model = one()
    inject(model, trainable=True)
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=lambda: answers.put(model(X).tolist()))
    process.start()
    found = answers.get()
    process.join()
    return torch.tensor(found), linear(model[0])


@odd("the handle's state through torch.save and a weights-only load")
def _():
    model, file = one(), io.BytesIO()
    handle = inject(model, trainable=True)
    torch.save(handle.state_dict(), file)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.zero_()
    file.seek(0)
    handle.load_state_dict(torch.load(file, weights_only=True))
    return model(X), linear(model[0])


@odd("the layer's reset_parameters by others")
def _():
    model = one()
    inject(model)
    model[0].reset_parameters()
    return model(X), linear(model[0])


@odd("a checkpoint of all by assign=True into another adapter of the name")
def _():
    model, other = one(), one()
    inject(model, trainable=True).checkpoint = "all"
    handle = inject(other, seed=4, trainable=True)
    other.load_state_dict(model.state_dict(), assign=True)
    assert all(parameter.requires_grad for parameter in handle.parameters())
    return other(X), linear(model[0])


@odd("a route under another default device")
def _():
    model = one()
    inject(model, name="a")
    with torch.device("meta"), torch.no_grad(), ak.torch.route(model, ["a"] * 3):
        found = model(X)
    return found, linear(model[0])


# Habits around transformers' models.


@odd("generate in every way that a model has")
def _():
    model = llama()
    plain = with_q(model)
    inject(model, Q, 16, 16)
    ways = (
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
    )
    found = []
    for way in ways:
        for each in (model, plain):
            torch.manual_seed(0)
            found.append(each.generate(IDS, max_new_tokens=6, **way).flatten())
    return torch.cat(found[::2]), torch.cat(found[1::2])


@odd("the attention's implementation is exchanged")
def _():
    model = llama()
    plain = with_q(model)
    inject(model, Q, 16, 16)
    for each in (model, plain):
        each.set_attn_implementation("eager")
    return model(IDS).logits, plain(IDS).logits


@odd("a forward that is compiled on the instance, with a static cache")
def _():
    model = llama()
    plain = with_q(model)
    inject(model, Q, 16, 16)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    return model.generate(IDS, max_new_tokens=6, cache_implementation="static"), plain.generate(IDS, max_new_tokens=6)


@odd("an adapter of a name that is taken, after a copy was trained", raises=UsageError, match="attached")
def _():
    model = copy.deepcopy(two())
    inject(model, trainable=True)
    ak.torch.inject(copy.deepcopy(model), adapter())


def test_there_are_forty():
    assert len(SITUATIONS) >= 40


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    SITUATIONS.check(name)

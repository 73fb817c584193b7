"""Odd situations of the tools that people train and serve with: models moved to meta, averages, switches, savers.

Each gives what the formula gives, or a typed error, as in test_odd_situations.py.
"""

import asyncio
import copy
import tempfile
import threading
import types
import warnings
from pathlib import Path

import accelerate
import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
import transformers
from situations import Situations, X, changed, draw, inject, one
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError, Unsupported, UsageError
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

SITUATIONS = Situations()
odd = SITUATIONS.odd

IDS = torch.tensor([[5, 9, 2, 7, 7, 1]])
Q = "model.layers.0.self_attn.q_proj"


def linear(layer, x=X, seed=0):
    return functional.linear(x, changed(layer.weight, seed), layer.bias)


def wanted():
    return linear(one()[0])


def llama(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **more,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def with_change(model, path=Q):
    twin = copy.deepcopy(model)
    layer = twin.get_submodule(path)
    layer.weight.data = changed(layer.weight.data)
    return twin


def pair():
    """A Llama with a LoRA at one projection, and the same with the change in its weight."""
    model = llama()
    twin = with_change(model)
    inject(model, Q, 16, 16)
    return model, twin


def moved(model, method, targets, **options):
    """A fresh adapter of one target, moved away from where it changes nothing."""
    made = ak.torch.create(model, method, targets=targets, **options)
    ((target, (update,)),) = made.updates.items()
    tensors = {name: torch.as_tensor(value) for name, value in update.tensors.items()}
    shifted = {name: t + 0.3 * draw(*t.shape, seed=3).to(t.dtype) for name, t in tensors.items()}
    return made.replace(updates={target: (update.replace(**shifted),)})


def gradients(handle):
    return torch.cat([parameter.grad.flatten() for parameter in handle.parameters()])


# To the meta device and back, with an adapter attached.


@odd("to meta, then the base by load_state_dict(assign=True)", raises=Unsupported, match="lost.*handle.remove")
def _():
    model = one()
    inject(model)
    model.to("meta").load_state_dict(one().state_dict(), assign=True)
    model(X)


for _method in ("dora", "ia3", "oft", "vera", "bottleneck"):

    @odd(f"to meta, then the base by load_state_dict(assign=True), {_method}", raises=Unsupported, match="lost")
    def _(method=_method):
        model = one().float()
        options = {} if method == "ia3" else {"rank": 2}
        ak.torch.inject(model, ak.torch.create(one().float(), method, targets="0", **options), trainable=True)
        model.to("meta").load_state_dict(one().float().state_dict(), assign=True)
        model(X.float())


@odd("to meta, then base and adapter by load_state_dict(assign=True)")
def _():
    model = one()
    inject(model, trainable=True).checkpoint = "all"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").load_state_dict(state, assign=True)
    return model(X), wanted()


@odd("to meta, then the base by assign=True and the adapter by its handle, trained")
def _():
    found = []
    for moves in (True, False):
        model = one()
        handle = inject(model, trainable=True)
        state = {name: value.clone() for name, value in handle.state_dict().items()}
        if moves:
            model.to("meta").load_state_dict(one().state_dict(), assign=True)
            handle.load_state_dict(state)
        optimizer = torch.optim.SGD(handle.parameters(), lr=0.01)
        model(X).square().sum().backward()
        optimizer.step()
        found.append(model(X))
    return found[0], found[1]


@odd("to meta, then the adapter is read", raises=Unsupported, match="meta device.*before the model goes to meta")
def _():
    model = one()
    handle = inject(model)
    model.to("meta")
    handle.adapter()


@odd("to meta, then merged", raises=AdapterkitError)
def _():
    model = one()
    handle = inject(model)
    model.to("meta").load_state_dict(one().state_dict(), assign=True)
    handle.merge_()


@odd("to meta, then removed and loaded")
def _():
    model = one()
    handle = inject(model)
    model.to("meta").load_state_dict(one().state_dict(), assign=True)
    handle.remove()
    return model(X), one()(X)


@odd("layers made by skip_init, then loaded")
def _():
    model = nn.Sequential(nn.utils.skip_init(nn.Linear, 16, 8, dtype=torch.float64))
    inject(model)
    model.load_state_dict(one().state_dict())
    return model(X), wanted()


# Forwards and modules that libraries exchange, as Liger and hub kernels do.


def swiglu(self, x):
    return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


@odd("a block's forward patched with a kernel, adapters in its layers")
def _():
    model = llama()
    path = "model.layers.0.mlp.up_proj"
    twin = with_change(model, path)
    inject(model, path, 24, 16)
    for each in model.model.layers:
        each.mlp.forward = types.MethodType(swiglu, each.mlp)
    return model(IDS).logits, twin(IDS).logits


@odd("a block's forward patched with a kernel, a bottleneck at the block", raises=Unsupported, match="bypasses the")
def _():
    model = llama().float()
    ak.torch.inject(model, ak.torch.create(llama().float(), "bottleneck", targets=["mlp"], rank=4))
    for each in model.model.layers:
        each.mlp.forward = types.MethodType(swiglu, each.mlp)
    model(IDS)


@odd("a norm's forward patched with a kernel before an IA3 is attached to its weight")
def _():
    model, plain = llama(), llama()

    def kernel(self, x):
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    for each in (model, plain):
        each.model.norm.forward = types.MethodType(kernel, each.model.norm)
    update = METHODS["dense"](D=draw(16) * 0.1)
    ak.torch.inject(model, Adapter({Target("model.norm"): (update,)}))
    plain.model.norm.weight.data += draw(16) * 0.1
    return model(IDS).logits, plain(IDS).logits


@odd("the attention's implementation is exchanged between forwards")
def _():
    model, twin = pair()
    found = []
    for name in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(name)
        found.append(model(IDS).logits)
    return torch.stack(found), twin(IDS).logits.expand(3, *[-1] * 3).reshape(3, 1, 6, 64)


@odd("the experts' implementation is exchanged between forwards")
def _():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).float().eval()
    twin = copy.deepcopy(model)
    path = "model.layers.0.mlp.experts.down_proj"
    made = moved(model, "lora", [path], rank=2)
    ak.torch.inject(model, made)
    ak.torch.inject(twin, made).merge_()
    found, plain = [], []
    for name in ("eager", "batched_mm", "grouped_mm"):
        for each, results in ((model, found), (twin, plain)):
            each.set_experts_implementation(name)
            results.append(each(IDS).logits)
    assert not torch.allclose(plain[0], transformers.Qwen3MoeForCausalLM(config).float()(IDS).logits)
    return torch.stack(found) * 1e-1, torch.stack(plain) * 1e-1  # In float32.


@odd("a static cache, compiled without graph breaks")
def _():
    model, twin = pair()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    ways = {"max_new_tokens": 6, "do_sample": False}
    return model.generate(IDS, cache_implementation="static", **ways), twin.generate(IDS, **ways)


@odd("continuous batching")
def _():
    config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # By default, the cache takes most of the machine's free memory.
    small = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    found = []
    for each in pair():
        each.float().set_attn_implementation("paged|sdpa")
        results = each.generate_batch(
            [IDS[0].tolist(), [1, 2, 3]], generation_config=config, continuous_batching_config=small
        )
        found.append(torch.tensor([result.generated_tokens for result in results.values()]))
    return found[0], found[1]


@odd("text streamed from a thread that generates inside the route")
def _():
    model, twin = pair()

    class Tokens:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values += value.flatten().tolist()

        def end(self):
            pass

    seen = Tokens()

    def generate():
        with ak.torch.route(model, ["default"]):
            model.generate(IDS, max_new_tokens=6, do_sample=False, streamer=seen)

    thread = threading.Thread(target=generate)
    thread.start()
    thread.join()
    return torch.tensor(seen.values), twin.generate(IDS, max_new_tokens=6, do_sample=False)[0]


# Offloading, as `from_pretrained` arranges it.


@odd("loaded with a device map of CPU and disk, then trained")
def _():
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        places = {
            "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
            "model.rotary_emb": "cpu", "lm_head": "disk",
        }  # fmt: skip
        found = []
        for places_or_none in (places, None):
            model = transformers.LlamaForCausalLM.from_pretrained(
                folder, device_map=places_or_none, offload_folder=f"{folder}/offload", dtype=torch.float64
            )
            handle = inject(model, Q, 16, 16, trainable=True)
            model(IDS, labels=IDS).loss.backward()
            found.append(gradients(handle))
        return found[0], found[1]


@odd("dispatched to CPU and disk after injecting, with a checkpoint in every block")
def _():
    found = []
    for dispatched in (True, False):
        model = llama().train()
        handle = inject(model, Q, 16, 16, trainable=True)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with tempfile.TemporaryDirectory() as folder:
            if dispatched:
                places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "disk"}
                places["model.rotary_emb"] = "cpu"
                model = accelerate.dispatch_model(
                    model, places, main_device="cpu", offload_dir=folder, force_hooks=True
                )
            model(IDS, labels=IDS).loss.backward()
        found.append(gradients(handle))
    return found[0], found[1]


# Checkpointing, dropout, and optimizers.


@odd("dropout in a block that is recomputed")
def _():
    found = []
    for way in (None, False, True):
        model = one()
        handle = inject(model.train(), trainable=True, dropout=0.5)
        torch.manual_seed(3)
        x = X.clone().requires_grad_()
        y = model(x) if way is None else checkpoint(model, x, use_reentrant=way)
        y.square().sum().backward()
        found.append(gradients(handle))
    return torch.stack(found[1:]), found[0].expand(2, -1)


@odd("gradients gathered over two batches are those of one")
def _():
    found = []
    for parts in ((X,), X.split([1, 2])):
        model = one()
        handle = inject(model, trainable=True)
        for part in parts:
            model(part).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found.append(gradients(handle))
    return found[0], found[1]


@odd("an optimizer of whole matrices (Muon)")
def _():
    model = one()
    handle = inject(model, trainable=True)
    plain = [parameter.detach().clone().requires_grad_() for parameter in handle.parameters()]
    base = one()[0]
    makers = [torch.optim.Muon(list(handle.parameters()), lr=0.1), torch.optim.Muon(plain, lr=0.1)]
    for _ in range(2):
        model(X).square().sum().backward()
        A, B = plain
        functional.linear(X, base.weight + 0.25 * B @ A, base.bias).square().sum().backward()
        for each in makers:
            each.step()
            each.zero_grad()
    return torch.cat([p.flatten() for p in handle.parameters()]), torch.cat([p.flatten() for p in plain])


@odd("a fused optimizer and a gradient scaler")
def _():
    found = []
    for fused in (True, False):
        model = one().float()
        handle = inject(model, trainable=True)
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(3):
            scaler.scale(model(X.float()).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(model(X.float()))
    return found[0], found[1]


@odd("an average that another library copies of the model")
def _():
    model = one()
    handle = inject(model, trainable=True)
    mean = copy.deepcopy(model)  # As ema_pytorch: each parameter and buffer moves towards the model's.
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.01)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for (name, ema), (other, now) in zip(mean.named_parameters(), model.named_parameters(), strict=True):
            assert name == other
            ema.data.lerp_(now.data, 0.5)
    A, B = (leaf.detach() for leaf in ak.torch.handles(mean)["default"].parameters())
    base = one()[0]
    return mean(X), functional.linear(X, base.weight + 0.25 * B @ A, base.bias)


# What others save and load.


@odd("safetensors' save_model and load_model")
def _():
    with tempfile.TemporaryDirectory() as folder:
        model, other = one(), one()
        inject(model)
        other[0].weight.data.zero_()
        inject(other)
        safetensors.torch.save_model(model, f"{folder}/m.safetensors")
        assert sorted(safetensors.torch.load_file(f"{folder}/m.safetensors")) == ["0.bias", "0.weight"]
        assert safetensors.torch.load_model(other, f"{folder}/m.safetensors", strict=True) == (set(), [])
        return other(X), wanted()


@odd("the whole model saved by transformers, the adapter left out")
def _():
    model, _ = pair()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert list(again.state_dict()) == list(llama().state_dict())
        return again(IDS).logits, llama()(IDS).logits


@odd("a merged model saved by transformers")
def _():
    model, twin = pair()
    ak.torch.handles(model)["default"].merge_()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)(IDS).logits, twin(IDS).logits


@odd("a model of the hub's mixin")
def _():
    class Small(nn.Module, huggingface_hub.PyTorchModelHubMixin):
        def __init__(self, width=8):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, width, dtype=torch.float64)

        def forward(self, x):
            return self.layer(x)

    model = Small()
    inject(model, "layer")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = Small.from_pretrained(folder)
    inject(again, "layer")
    return again(X), linear(model.layer)


@odd("accelerate's save_model of a model with an adapter")
def _():
    with tempfile.TemporaryDirectory() as folder:
        model = one()
        inject(model, trainable=True)
        accelerate.Accelerator(cpu=True).save_model(model, folder)
        state = safetensors.torch.load_file(next(Path(folder).glob("*.safetensors")))
        assert sorted(state) == ["0.bias", "0.weight"]
        again = one()
        again.load_state_dict(state)
        inject(again)
        return again(X), wanted()


@odd("accelerate's state with the adapter alone, saved and loaded")
def _():
    with tempfile.TemporaryDirectory() as folder:
        accelerator = accelerate.Accelerator(cpu=True)
        model = one()
        handle = inject(model, trainable=True)
        handle.checkpoint = "adapter"
        optimizer = torch.optim.AdamW(handle.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.backward(model(X).square().sum())
        optimizer.step()
        accelerator.save_state(folder)
        after = model(X).detach()
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.zero_()
        accelerator.load_state(folder)
        return model(X), after


# Names in what is written.


@odd("targets of a model that a library wraps have the base's names")
def _():
    class Transformer(nn.Module):  # As sentence-transformers has it since its version 5.
        __module__ = "sentence_transformers.base.modules.transformer"

        def __init__(self, model):
            super().__init__()
            self.model = model

    class SentenceTransformer(nn.Sequential):
        __module__ = "sentence_transformers.sentence_transformer.model"

    class ValueHead(nn.Module):
        __module__ = "trl.experimental.ppo.modeling_value_head"

        def __init__(self, model):
            super().__init__()
            self.pretrained_model, self.v_head = model, nn.Linear(16, 1)

    class Fabric(nn.Module):
        __module__ = "lightning.fabric.wrappers"

        def __init__(self, model):
            super().__init__()
            self._forward_module = self._original_module = model

    for wrapped in (SentenceTransformer(Transformer(llama())), ValueHead(llama()), Fabric(llama())):
        made = ak.torch.create(wrapped, "lora", targets=["q_proj"], rank=2)
        assert {str(target) for target in made.updates} == {Q, Q.replace("0", "1")}
        handle = ak.torch.inject(wrapped, made, trainable=True)
        assert sorted(handle.state_dict())[0] == f"{Q}.lora.A"
        assert {str(target) for target in handle.adapter().updates} == {Q, Q.replace("0", "1")}
    return torch.ones(1), torch.ones(1)


@odd("PEFT's mixed model around ours")
def _():
    found = []
    for each in pair():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        mixed = peft.get_peft_model(each, config, mixed=True)
        mixed.add_adapter("other", peft.LoHaConfig(target_modules=["q_proj", "k_proj"], init_weights=False))
        mixed.set_adapter(["default", "other"])
        found.append(mixed.double().eval()(IDS).logits)
    return found[0], found[1]


# Layers of every kind, and models cast to 16 bits.


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 7)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(4, 6), None),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(4, 6), None),
    "LSTM": (lambda: nn.LSTM(4, 6, 2, bidirectional=True), (5, 2, 4)),
    "GRU": (lambda: nn.GRU(4, 6), (5, 2, 4)),
}

for _kind in LAYERS:

    @odd(f"a LoRA trained in a {_kind}, then merged")
    def _(kind=_kind):
        make, shape = LAYERS[kind]
        torch.manual_seed(0)
        model = nn.Sequential(make()).double()
        x = torch.tensor([[0, 1, 3], [2, 2, 1]]) if shape is None else draw(*shape)
        target = "0.weight_ih_l0" if kind in ("LSTM", "GRU") else "0"
        handle = ak.torch.inject(model, moved(model, "lora", [target], rank=2), trainable=True)
        first = (lambda y: y[0]) if kind in ("LSTM", "GRU") else (lambda y: y)
        live, plain = first(model(x)), first(nn.Sequential(make()).double()(x))
        live.square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in handle.parameters())
        assert live.shape == plain.shape
        handle.merge_()
        return live, first(model(x))


@odd("model.half() and bfloat16() with a DoRA in training")
def _():
    update = METHODS["dora"](A=draw(2, 16, seed=1), B=draw(8, 2, seed=2), magnitude=draw(8, seed=3).abs() + 1)
    results = []
    for dtype in (torch.float16, torch.bfloat16):
        model = one()
        ak.torch.inject(model, Adapter({Target("0"): (update,)}), trainable=True)
        exact = model(X)
        got = model.to(dtype)(X.to(dtype)).double()
        unit = torch.finfo(dtype).eps
        results.append(((got - exact).abs().max() / exact.abs().max() < 8 * unit).double())
    return torch.stack(results), torch.ones(2)


@odd("tasks that each switch an adapter off while others wait")
def _():
    model = one()
    handles = {name: inject(model, name=name, seed=seed) for seed, name in enumerate("ab")}
    found = {}

    async def run(name, other):
        with handles[other].disable():
            for _ in range(5):
                await asyncio.sleep(0)
                found[name] = model(X)

    async def main():
        await asyncio.gather(run("a", "b"), run("b", "a"))

    asyncio.run(main())
    layer = one()[0]
    return torch.stack([found["a"], found["b"]]), torch.stack([linear(layer), linear(layer, seed=1)])


@odd("work that a task hands to a thread keeps the task's route")
def _():
    model = one()
    for seed, name in enumerate("ab"):
        inject(model, name=name, seed=seed)

    async def main():
        with ak.torch.route(model, ["b"] * 3):
            return await asyncio.to_thread(model, X)

    return asyncio.run(main()), linear(one()[0], seed=1)


@odd("a weight that is no number", raises=UsageError, match="weight: .*finite")
def _():
    inject(one(), weight=float("nan"))


@odd("a weight that is set to no number", raises=UsageError, match="weight: .*finite")
def _():
    inject(one()).weight = float("inf")


@odd("a prompt for a task that there is not", raises=UsageError, match="task_ids: an update has 2 tasks")
def _():
    model = llama()
    ak.torch.inject(model, ak.torch.create(model, "multitask_prompt", rank=2, tasks=2))
    model(IDS, task_ids=torch.tensor([-1]))


@odd("a layer of skills for a task that there is not", raises=UsageError, match="task_ids: an update has 2 tasks")
def _():
    model = one().float()
    ak.torch.inject(model, ak.torch.create(model, "poly", targets="0", rank=2, tasks=2))
    model(X.float(), task_ids=torch.tensor([0, 1, -1]))


@odd("exported to ONNX with an adapter attached")
def _():
    import onnxruntime

    model = one().float().eval()
    inject(model)
    with tempfile.TemporaryDirectory() as folder:
        torch.onnx.export(model, (X.float(),), f"{folder}/m.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(f"{folder}/m.onnx", providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    return torch.from_numpy(got), model(X.float())


def test_there_are_forty():
    assert len(SITUATIONS) >= 40


@pytest.mark.parametrize("name", SITUATIONS)
def test_odd(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SITUATIONS.check(name)

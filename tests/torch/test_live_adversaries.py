"""What people do to a model in training, in any order: it computes what PEFT or one process computes, or is refused."""

import copy
import io

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from two_processes import in_two_processes

import adapterkit as ak
from adapterkit.errors import NotMergeable, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(8 * 6).reshape(8, 6) % 29


def llama(**more):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more))


def fresh(model, method="lora", **more):
    return ak.torch.create(model, method, rank=4, alpha=8, targets=["q_proj", "up_proj"], **more)


def attach(model, method="lora", name="default", **more):
    return ak.torch.inject(model, fresh(model, method, **more), trainable=True, name=name)


def optimizer_of(model, **more):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, **more)


def losses(model, optimizer=None, steps=4, after=lambda: None):
    optimizer = optimizer or optimizer_of(model)
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def expected():
    model = llama()
    attach(model)
    return losses(model, steps=8)


def compiled_layers(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


def checkpointed(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


def within_peft(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"]))


def transparent(model):
    return torch.compile(model, backend="eager")


WRAPPERS = [transparent, compiled_layers, checkpointed, within_peft, nn.DataParallel, AveragedModel]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_of_wrappers_are_not_written(wrap, tmp_path):
    plain = [target.path for target, _ in fresh(llama())]
    model = wrap(llama())
    made = fresh(model)
    assert [target.path for target, _ in made] == plain
    handle = ak.torch.inject(model, made, trainable=True)
    assert [target.path for target, _ in handle.adapter()] == plain
    assert [name for name, _ in handle.named_parameters()] == [f"{p}.lora.{f}" for p in plain for f in "AB"]
    ak.write(handle.adapter(), tmp_path / "peft", format="peft")
    other = llama()
    ak.torch.inject(other, ak.read(tmp_path / "peft"))
    handle.checkpoint = "adapter"
    names = [key.rpartition(".")[2] for key in model.state_dict()]
    assert not any("_orig_mod" in name or "wrapped" in name for name in names)


def test_names_of_sentence_transformers_are_the_encoders():
    modules = {"__module__": "sentence_transformers.models"}
    inner = type("Transformer", (nn.Module,), {**modules, "forward": lambda self, ids: self.auto_model(ids)})()
    inner.auto_model = llama().model
    outer = type("SentenceTransformer", (nn.Sequential,), modules)(inner)
    made = fresh(outer)
    assert {target.path for target, _ in made} == {target.path for target, _ in fresh(llama().model)}
    ak.torch.inject(outer, made)
    ak.torch.inject(llama().model, made)


@pytest.mark.parametrize(
    ("first", "wrap"),
    [("wrap", transparent), ("inject", compiled_layers), ("inject", checkpointed), ("wrap", checkpointed)],
)
def test_wrapping_before_and_after_trains_the_same(first, wrap, expected):
    model = llama()
    if first == "inject":
        attach(model)
        model = wrap(model)
    else:
        model = wrap(model)
        attach(model)
    assert losses(model, steps=2) == pytest.approx(expected[:2], rel=1e-5)


def test_an_average_of_the_model_averages_the_adapter():
    model = llama()
    handle = attach(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    mean = None

    def update():
        nonlocal mean
        average.update_parameters(model)
        now = {name: value.clone() for name, value in handle.state_dict().items()}
        mean = now if mean is None else {name: 0.5 * mean[name] + 0.5 * value for name, value in now.items()}

    losses(model, after=update)
    averaged = ak.torch.handles(average)["default"]
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, mean[name])
    assert not torch.equal(average(IDS).logits, model(IDS).logits)


def test_hooks_on_gradients_and_modules_see_the_adapter(expected):
    model = llama()
    handle = attach(model)
    seen = []
    for parameter in handle.parameters():
        parameter.register_hook(lambda grad: grad * 1.0)
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_full_backward_hook(lambda *_: seen.append("module"))
    assert losses(model, steps=1) == pytest.approx(expected[:1], rel=1e-5)
    assert len(seen) == len(list(handle.parameters())) + 1


def test_an_optimizer_that_steps_in_the_backward_pass(expected):
    model = llama()
    handle = attach(model)
    optimizers = {p: torch.optim.AdamW([p], lr=0.05) for p in handle.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in handle.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    found = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        found.append(loss.item())
    assert found == pytest.approx(expected[:4], rel=1e-5)


def test_two_adapters_at_once_train_as_pefts():
    model = llama()
    reference = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    )
    reference.add_adapter("two", LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    reference.base_model.set_adapter(["default", "two"])
    handles = [
        attach(model, name="one"),
        ak.torch.inject(
            model, ak.torch.create(model, "lora", rank=2, alpha=8, targets=["q_proj", "down_proj"]), trainable=True
        ),
    ]
    for handle, name in zip(handles, ("default", "two"), strict=True):
        for target, update in handle._adapter:
            layer = reference.get_submodule(f"base_model.model.{target.path}")
            with torch.no_grad():
                update.A.copy_(layer.lora_A[name].weight)
                update.B.copy_(layer.lora_B[name].weight)
    assert losses(model) == pytest.approx(losses(reference), rel=1e-5)


def test_tied_embeddings_stay_tied_and_as_they_were():
    model = llama(tie_word_embeddings=True)
    before = model.lm_head.weight.clone()
    handle = attach(model)
    losses(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)
    handle.remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_batch_norm_may_be_frozen_or_not():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    for frozen in (True, False):
        model = net().train()
        reference = get_peft_model(net(), LoraConfig(r=2, lora_alpha=4, target_modules=["0", "3"])).train()
        made = ak.torch.create(model, "lora", rank=2, alpha=4, targets=["0", "3"])
        ak.torch.inject(model, made, trainable=True)
        found = []
        for each, inner in ((model, model), (reference, reference.base_model.model)):
            inner[1].train(not frozen)
            optimizer, mine = optimizer_of(each), []
            if each is reference:
                for target, update in made:
                    layer = inner.get_submodule(target.path)
                    with torch.no_grad():
                        layer.lora_A["default"].weight.copy_(update.A)
            for _ in range(4):
                loss = each(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                mine.append(loss.item())
            found.append((mine, inner[1].running_mean.clone()))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1])


def test_the_optimizers_state_goes_on_with_an_adapter_that_was_taken_off(expected):
    model = llama()
    handle, optimizer = attach(model), optimizer_of(model)
    first = losses(model, optimizer)
    state, adapter = io.BytesIO(), handle.adapter()
    torch.save(optimizer.state_dict(), state)
    handle.remove()
    state.seek(0)
    ak.torch.inject(model, adapter, trainable=True)
    again = optimizer_of(model)
    again.load_state_dict(torch.load(state, weights_only=True))
    assert first + losses(model, again) == pytest.approx(expected, rel=1e-6)


def test_the_model_may_change_its_dtype_in_training():
    model = llama()
    handle = attach(model)
    held = list(handle.parameters())
    optimizer = torch.optim.SGD(held, lr=0.5)  # torch's own AdamW does not take gradients of another dtype.
    losses(model, optimizer, steps=1)
    model.bfloat16()
    first = losses(model, optimizer)
    assert all(one is other for one, other in zip(handle.parameters(), held, strict=True))
    assert {p.dtype for p in held} == {torch.bfloat16}
    model.float()
    last = losses(model, optimizer)
    assert last[-1] < first[0]


def test_an_adapter_may_be_removed_in_the_middle_of_training():
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y = model(IDS).logits
    handle, optimizer = attach(model), optimizer_of(model)
    losses(model, optimizer)
    loss = model(input_ids=IDS, labels=IDS).loss
    handle.remove()
    loss.backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS).logits, y)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("first", ["inject", "prepare"])
def test_accelerate_may_prepare_the_model_before_and_after(first, expected):
    import accelerate

    accelerator, model = accelerate.Accelerator(cpu=True), llama()
    if first == "inject":
        attach(model)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
    else:
        model = accelerator.prepare(model)
        attach(model)
        optimizer = accelerator.prepare(optimizer_of(model))
    assert losses(model, optimizer) == pytest.approx(expected[:4], rel=1e-5)


def _shards(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _two(rank, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    # A sharded base: an adapter is made from it, attached to infer, and merged.
    model = _shards(llama())
    made = fresh(model, "dora", init="pissa")
    found["created"] = {
        str(t): {f: leaf.clone() for f, leaf in u.tensors.items()} for t, u in made if u.method == "dora"
    }
    with pytest.raises(Unsupported, match="fully_shard"):
        ak.torch.inject(model, made, trainable=True)
    for method in ("lora", "dora", "ia3", "oft"):
        model = llama()
        handle = attach(model, method) if method in ("lora", "dora") else ak.torch.inject(
            model, ak.torch.create(model, method, rank=4, targets=["q_proj", "up_proj"]), trainable=True
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        _shards(model)
        before = model(IDS).logits
        model.reshard()
        handle.merge_(keep=True)
        merged = model(IDS).logits
        model.reshard()
        handle.unmerge_()
        found[method] = before.detach(), merged.detach(), model(IDS).logits.detach()
    tied = llama(tie_word_embeddings=True)
    handle = ak.torch.inject(tied, ak.torch.create(tied, "lora", rank=2, targets="lm_head"), trainable=True)
    _shards(tied)
    with pytest.raises(NotMergeable, match="shares its memory"):
        handle.merge_()
    # DDP does not average what it has not met.
    model = llama()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(Unsupported, match="before DistributedDataParallel"):
        attach(wrapped)
    attach(model)
    with pytest.raises(Unsupported, match="after DistributedDataParallel had wrapped"):
        wrapped(IDS)
    # A checkpoint of two processes, for one.
    model = llama()
    handle = attach(model)
    handle.checkpoint = "adapter"
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for _ in range(4):
        some = IDS[4 * rank : 4 * rank + 4]
        loss = wrapped(input_ids=some, labels=some).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found["checkpoint"] = model.state_dict(), optimizer.state_dict()
    # The same under FSDP2, whose whole state goes into a sharded model and into one that is not.
    model = llama()
    handle = attach(model)
    handle.checkpoint = "adapter"
    _shards(model)
    optimizer = optimizer_of(model)
    for _ in range(4):
        loss = model(input_ids=some, labels=some).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found["sharded"] = get_model_state_dict(model, options=options)
    again = llama()
    other = attach(again, seed=5)
    _shards(again)
    again.load_state_dict(found["checkpoint"][0])
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value.full_tensor(), handle.state_dict()[name].full_tensor())
    other.load_state_dict({name: value.full_tensor() for name, value in other.state_dict().items()})
    torch.save(found, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_sharded_bases_late_injection_and_checkpoints_for_another_process_count(tmp_path, expected):
    in_two_processes(_two, tmp_path / "meet", tmp_path / "out")
    for rank in range(2):
        found = torch.load(tmp_path / f"out.{rank}")
        for target, update in fresh(llama(), "dora", init="pissa"):
            if update.method == "dora":
                for field, leaf in update.tensors.items():
                    torch.testing.assert_close(found["created"][str(target)][field], leaf)
        for method in ("lora", "dora", "ia3", "oft"):
            before, merged, after = found[method]
            torch.testing.assert_close(merged, before, rtol=1e-4, atol=1e-5)
            assert torch.equal(after, before)
        model = llama()
        attach(model, seed=5)
        state, optimizer_state = found["checkpoint"]
        if rank == 0:
            model.load_state_dict(found["sharded"])
            for name, value in state.items():
                torch.testing.assert_close(found["sharded"][name], value)
        model.load_state_dict(state)
        optimizer = optimizer_of(model)
        optimizer.load_state_dict(optimizer_state)
        assert losses(model, optimizer) == pytest.approx(expected[4:], rel=1e-4)

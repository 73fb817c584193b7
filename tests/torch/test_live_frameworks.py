"""Adapters in training: what optimizers, Trainers, DDP, FSDP2 and offloading see, against PEFT and one process."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from two_processes import in_two_processes

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, Unsupported, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(8 * 6).reshape(8, 6) % 29


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype)


def attach(model, method="lora", **rest):
    fresh = ak.torch.create(model, method, rank=4, **({"alpha": 8} if method in ("lora", "dora") else {}))
    return ak.torch.inject(model, fresh, trainable=True, **rest)


def moved(handle, by=0.1):
    """The adapter away from its start, where it changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * by)
    return handle


def losses(model, steps=4, ids=IDS):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "ia3", "vera", "boft", "hra", "miss", "prompt", "prefix"])
def test_the_model_has_the_parameters_and_the_base_keeps_its_shape(method):
    model = llama(torch.bfloat16)
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = [p.requires_grad for p in model.parameters()]
    handle = attach(model, method)
    trained = {id(p) for p in handle.parameters()}
    assert trained
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    assert set(handle.frozen) == {name for name, _ in llama().named_parameters()}
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    assert model.dtype == torch.bfloat16, "transformers reports the dtype of the first parameter"
    assert not model.load_state_dict(before).missing_keys
    assert not model.model.load_state_dict(llama(torch.bfloat16).model.state_dict()).unexpected_keys
    losses(model, steps=1)
    handle.remove()
    assert [p.requires_grad for p in model.parameters()] == asked
    assert list(model.state_dict()) == keys
    assert not [key for module in model.modules() for key in vars(module) if "adapterkit" in key]


def like_peft(model, **config):
    """PEFT's adapter on a copy of the model, and ours from the same start."""
    reference = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **config)
    )
    handle = attach(model, "dora" if config.get("use_dora") else "lora")
    fresh = dict(reference.named_parameters())
    for name, parameter in handle.named_parameters():
        target, _, field = name.rsplit(".", 2)
        tensor = "lora_magnitude_vector" if field == "magnitude" else f"lora_{field}"
        with torch.no_grad():
            parameter.copy_(fresh[f"base_model.model.{target}.{tensor}.default.weight"])
    return reference, handle


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_plain_loop_over_the_models_own_parameters_equals_peft(config):
    model = llama()
    reference, _ = like_peft(model, **config)
    expected, got = losses(reference, steps=8), losses(model, steps=8)
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[-1] < got[0]


def test_a_second_adapter_keeps_the_base_frozen_until_the_last_one_goes():
    model = llama()
    one, two = attach(model, name="one"), attach(model, name="two")
    assert {id(p) for p in two.parameters()}.isdisjoint({id(p) for p in one.parameters()})
    assert all(p.requires_grad for p in one.parameters())
    one.remove()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in two.parameters()}
    two.remove()
    assert all(p.requires_grad for p in model.parameters())
    kept = attach(model, freeze=False)
    assert not kept.frozen
    assert all(p.requires_grad for p in model.parameters())


def test_copies_and_pickles_have_adapters_of_their_own():
    model = llama()
    handle = moved(attach(model))
    y = model(IDS).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS).logits, y)
        other = ak.torch.handles(copied)["default"]
        moved(other)
        assert torch.equal(model(IDS).logits, y)
        assert not torch.equal(copied(IDS).logits, y)
        other.remove()
        with handle.disable():
            assert torch.equal(copied(IDS).logits, model(IDS).logits)
    assert pickle.loads(pickle.dumps(handle)).name == "default"
    assert ak.torch.handles(torch.compile(model))["default"] is handle
    assert list(ak.torch.handles(nn.ModuleDict({"tower": model}))) == ["tower:default"]


def test_the_handles_state_is_saved_and_loaded_and_refused_whole():
    model = llama()
    handle = moved(attach(model))
    y, file = model(IDS).logits, io.BytesIO()
    torch.save(handle.state_dict(), file)
    moved(handle)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    handle.load_state_dict(state)
    assert torch.equal(model(IDS).logits, y)
    name = next(iter(state))
    with pytest.raises(UsageError, match="missing"):
        handle.load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(UsageError, match="unknown"):
        handle.load_state_dict(state | {"more": state[name]})
    with pytest.raises(ShapeMismatch):
        handle.load_state_dict({key: value + 1 if key != name else value[:1, :1] for key, value in state.items()})
    assert torch.equal(model(IDS).logits, y)


def test_following_the_model_to_another_dtype_and_functional_calls():
    model = llama()
    handle = moved(attach(model))
    y = model(IDS).logits
    model.to(torch.float64)
    assert {p.dtype for p in handle.parameters()} == {torch.float64}
    torch.testing.assert_close(model(IDS).logits.float(), y, rtol=1e-4, atol=1e-5)
    model.float()
    none = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    with handle.disable():
        base = model(IDS).logits
    torch.testing.assert_close(torch.func.functional_call(model, none, (IDS,)).logits, base)
    torch.testing.assert_close(model(IDS).logits, y)


@pytest.mark.parametrize("inject_first", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_offloaded_weights(method, inject_first):
    import accelerate

    model, plain = llama(), llama()
    other = moved(attach(plain, method)).adapter()
    y = plain(IDS).logits
    if inject_first:
        handle = ak.torch.inject(model, other)
    accelerate.cpu_offload(model, execution_device="cpu")
    if not inject_first:
        handle = ak.torch.inject(model, other)
    torch.testing.assert_close(model(IDS).logits, y)
    with torch.no_grad(), ak.torch.route(model, ["default"] * 4 + [None] * 4):
        routed = model(IDS).logits
    with handle.disable():
        base = model(IDS).logits
    torch.testing.assert_close(routed, torch.cat((y[:4], base[4:])))
    handle.remove()
    torch.testing.assert_close(model(IDS).logits, base)
    assert next(model.model.layers[0].mlp.up_proj.parameters()).device.type == "meta"


def test_training_an_adapter_of_offloaded_weights():
    import accelerate

    model, plain = llama(), llama()
    attach(plain)
    expected = losses(plain)
    accelerate.cpu_offload(model, execution_device="cpu")
    fresh = ak.torch.create(llama(), "lora", rank=4, alpha=8)
    ak.torch.inject(model, fresh, trainable=True)
    assert losses(model) == pytest.approx(expected, rel=1e-5)


def test_a_weight_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 8))
    fresh = ak.torch.create(nn.Sequential(nn.Linear(16, 8)), "lora", rank=2)
    with pytest.raises(Unsupported, match="meta device") as caught:
        ak.torch.inject(model, fresh)
    assert "assign=True" in caught.value.cure


def test_a_wrapper_put_around_the_forward_afterwards_is_left_in_place():
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    y = model(x)
    handle = moved(attach(model))
    calls, ours = [], model[0].forward

    def wrapper(*args):
        calls.append(args)
        return ours(*args)

    model[0].forward = wrapper
    changed = model(x)
    with ak.torch.route(model, ["default", None, None, None]):
        torch.testing.assert_close(model(x), torch.cat((changed[:1], y[1:])))
    handle.remove()
    assert model[0].forward is wrapper
    assert torch.equal(model(x), y)
    assert len(calls) == 3


def test_trainer_trains_the_adapter_as_it_trains_pefts(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in IDS]
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, learning_rate=0.1,
        report_to=[], logging_steps=1, save_strategy="no", seed=3, use_cpu=True, disable_tqdm=True, max_grad_norm=0.5,
    )  # fmt: skip
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reference, _ = like_peft(model)
    logs = []
    for each in (reference, model):
        trainer = transformers.Trainer(each, settings, train_dataset=data)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert logs[1][-1] < logs[1][0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _reduced(rank, way, file, out):
    """One of two processes: half of the batch each, a step of SGD, the adapter written by the first."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = llama()
    handle = attach(model)
    if way == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        run = fully_shard(model)
    optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.5)
    mine = IDS[4 * rank : 4 * rank + 4]
    for _ in range(3):
        loss = run(input_ids=mine, labels=mine).loss
        run.zero_grad()
        loss.backward()
        optimizer.step()
    state = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in handle.state_dict().items()}
    torch.save(state, f"{out}.{rank}")
    ak.write(handle.adapter(), f"{out}.{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_as_one_on_the_joined_batch(way, tmp_path):
    in_two_processes(_reduced, way, tmp_path / "rendezvous", tmp_path / "state")
    one = llama()
    handle = attach(one)
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.5)
    for _ in range(3):
        loss = one(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = handle.state_dict()
    for rank in range(2):
        state = torch.load(tmp_path / f"state.{rank}")
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        written = ak.read(tmp_path / f"state.{rank}.safetensors")
        target = str(next(iter(written.updates)))
        wanted = handle.adapter().delta(target)
        torch.testing.assert_close(
            torch.as_tensor(written.delta(target)), torch.as_tensor(wanted), rtol=1e-4, atol=1e-6
        )


def test_autocast_and_both_kinds_of_checkpointing():
    plain = llama()
    attach(plain)
    expected = losses(plain)
    for reentrant in (False, True):
        model = llama()
        attach(model)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert losses(model.train()) == pytest.approx(expected, rel=1e-5)
    model = llama()
    attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses(model) == pytest.approx(expected, rel=3e-2)

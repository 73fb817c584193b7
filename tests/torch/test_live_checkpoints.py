"""Checkpoints of a trained adapter alone: small, strict both ways; a resumed run equals an unbroken one bit by bit."""

import copy
import io
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import adapterkit as ak
from adapterkit.errors import Unrepresentable, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(8 * 6).reshape(8, 6) % 29
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def attach(model, method="lora", seed=0, **rest):
    return ak.torch.inject(model, ak.torch.create(model, method, rank=4, seed=seed), trainable=True, **rest)


def bits(handle):
    return handle.adapter().digest()


def train(model, optimizer, first, last):
    for step in range(first, last):
        ids = IDS[step % 4 * 2 : step % 4 * 2 + 2]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def test_the_state_dict_holds_what_was_chosen():
    model = llama()
    base = list(model.state_dict())
    handle = attach(model)
    assert handle.checkpoint == "base"
    assert list(model.state_dict()) == base
    handle.checkpoint = "all"
    assert list(model.state_dict())[: len(base)] == base
    assert len(model.state_dict()) == len(base) + len(list(handle.parameters()))
    handle.checkpoint = "adapter"
    assert len(model.state_dict()) == len(list(handle.parameters()))
    assert not model.state_dict().keys() & set(base)
    with pytest.raises(UsageError, match="unknown choice"):
        handle.checkpoint = "adapters"
    handle.remove()
    assert list(model.state_dict()) == base
    assert not model._state_dict_hooks
    assert not model._load_state_dict_pre_hooks


@pytest.mark.parametrize("wrap", [nn.Sequential, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), torch.compile])
def test_checkpoints_pass_through_wrappers_and_copies(wrap):
    model = llama()
    attach(model).checkpoint = "adapter"
    wrapped = wrap(model)
    (handle,) = ak.torch.handles(wrapped).values()
    before, state = bits(handle), {name: value.clone() for name, value in wrapped.state_dict().items()}
    base = [p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad]
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(1)
    assert bits(handle) != before
    assert wrapped.load_state_dict(state) == torch.nn.modules.module._IncompatibleKeys([], [])
    assert bits(handle) == before
    kept = [p for n, p in wrapped.named_parameters() if not p.requires_grad]
    assert all(map(torch.equal, base, kept))


def test_two_adapters_are_saved_together_or_apart():
    model = llama()
    one, two = attach(model, name="one"), attach(model, "vera", name="two")
    one.checkpoint = two.checkpoint = "adapter"
    both = model.state_dict()
    trained = len([*one.parameters(), *two.parameters()])
    assert len(both) == trained + 2, "the two projections that are not trained are saved too"
    two.checkpoint = "base"
    alone = model.state_dict()
    assert 0 < len(alone) < len(both)
    before = bits(two)
    model.load_state_dict({name: value + 1 for name, value in alone.items()})
    assert bits(two) == before
    model.load_state_dict(both)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_adapter_is_refused_whole(strict):
    model = llama()
    handle = attach(model)
    handle.checkpoint = "adapter"
    state = {name: value + 1 for name, value in model.state_dict().items()}
    name = next(iter(state))
    before = bits(handle)
    missing = {key: value for key, value in state.items() if key != name}
    for wrong, why in (
        (missing, "missing"),
        (state | {name: state[name][:1]}, "but the adapter's is"),
        (
            {key.replace(":default:", ":other:"): value for key, value in state.items()},
            "no attached adapter has this tensor",
        ),
    ):
        with pytest.raises(RuntimeError, match=why):
            model.load_state_dict(wrong, strict=strict)
        assert bits(handle) == before


METHODS = ["lora", "dora", "ia3", "loha", "lokr", "vera", "oft", "boft", "fourierft", "bottleneck", "prompt", "prefix"]


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop_resumes_bit_for_bit(method):
    model = llama()
    handle, optimizer = attach(model, method), optimizer_of(model)
    handle.checkpoint = "adapter"
    train(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, 3, 6)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = llama()
    resumed, other = attach(again, method, seed=1), optimizer_of(again)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(again, other, 3, 6)
    assert bits(resumed) == bits(handle)


def settings(folder, **more):
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, learning_rate=0.1,
        report_to=[], logging_steps=1, save_steps=3, seed=3, use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip


def run(folder, seed=0, resume=None, **more):
    model = llama()
    handle = attach(model, seed=seed)
    callback = ak.torch.TrainerCallback(handle, **more)
    trainer = transformers.Trainer(model, settings(folder), train_dataset=DATA, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return handle, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_saves_the_adapter_and_resumes_bit_for_bit(tmp_path):
    unbroken, losses = run(tmp_path / "one", to="peft")
    folder = tmp_path / "one" / "checkpoint-3"
    held = load_file(folder / "model.safetensors")
    assert len(held) == len(list(unbroken.parameters()))
    assert not (folder / "config.json").exists()
    assert ak.read(folder / "adapter", format="peft").methods == ("lora",)
    resumed, again = run(tmp_path / "two", seed=1, resume=str(folder))
    assert again == losses
    assert bits(resumed) == bits(unbroken)
    last = ak.read(tmp_path / "two" / "checkpoint-6" / "adapter")
    target = str(next(iter(last.updates)))
    assert torch.equal(torch.as_tensor(last.delta(target)), torch.as_tensor(unbroken.adapter().delta(target)))


def test_accelerate_saves_the_adapter_and_resumes_bit_for_bit(tmp_path):
    import accelerate

    def loop(first, last, load=None, save=None):
        model = llama()
        handle = attach(model, seed=0 if load is None else 1)
        handle.checkpoint = "adapter"
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer_of(model))
        if load is not None:
            accelerator.load_state(load)
        for step in range(first, last):
            ids = IDS[step % 4 * 2 : step % 4 * 2 + 2]
            optimizer.zero_grad()
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
            if save is not None and step == 2:
                accelerator.save_state(save)
        return handle

    unbroken = loop(0, 6, save=str(tmp_path / "state"))
    assert len(load_file(tmp_path / "state" / "model.safetensors")) == len(list(unbroken.parameters()))
    assert bits(loop(3, 6, load=str(tmp_path / "state"))) == bits(unbroken)


@pytest.mark.parametrize("choice", ["adapter", "all"])
@pytest.mark.parametrize("method", ["lora", "vera"])
def test_torchs_state_without_frozen_parameters_is_the_adapter(method, choice):
    """`ignore_frozen_params=True` takes the frozen parameters out itself, and raised for those that were not there."""
    options = StateDictOptions(ignore_frozen_params=True)
    runs = []
    for _ in range(2):
        model = llama()
        handle = attach(model, method)
        handle.checkpoint = choice
        runs.append((model, handle, optimizer_of(model)))
    (model, handle, optimizer), (other, resumed, fresh) = runs
    train(model, optimizer, 0, 3)
    found, states = get_state_dict(model, optimizer, options=options)
    assert found
    assert all("adapterkit:default:" in key for key in found)
    states = copy.deepcopy(states)  # They are those of the running optimizer.
    set_state_dict(other, fresh, model_state_dict=found, optim_state_dict=states, options=options)
    assert bits(resumed) == bits(handle)
    for each in ((model, optimizer), (other, fresh)):
        train(*each, 3, 6)
    assert bits(resumed) == bits(handle)


def test_torchs_state_without_frozen_parameters_tells_that_it_has_no_adapter():
    model = llama()
    handle = attach(model)
    options = StateDictOptions(ignore_frozen_params=True)
    with pytest.warns(
        UserWarning, match=r"does not contain the trained adapter 'default'.*handle.checkpoint = \"adapter\""
    ):
        get_state_dict(model, optimizer_of(model), options=options)
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    assert not get_state_dict(model, [], options=options)[0]


def test_a_format_that_cannot_hold_the_adapter_is_refused_before_the_training():
    model = llama()
    handle = attach(model, "bottleneck")
    with pytest.raises(Unrepresentable):
        ak.torch.TrainerCallback(handle, to="kohya")
    assert handle.checkpoint == "base"


def test_the_example_of_the_page_on_live_models_runs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "TrainerCallback" in block]
    names = {
        "ak": ak, "torch": torch, "transformers": transformers, "model": llama(), "settings": settings(tmp_path),
        "data": DATA,
    }  # fmt: skip
    exec(example, names)
    assert ak.read(tmp_path / "checkpoint-6" / "adapter", format="peft").methods == ("lora",)
    assert len(names["optimizer"].param_groups) == 2


def told(run):
    """The texts of the warnings that a call gives about state dicts without the adapter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "does not contain the adapter" in str(each.message)]


@pytest.mark.parametrize("choice", ["base", "adapter", "all"])
def test_a_checkpoint_without_a_trained_adapter_is_told_once(choice):
    model = nn.Sequential(nn.Linear(4, 4))
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", targets=["0"], rank=2), trainable=True)
    handle.checkpoint = choice
    state = model.state_dict()
    texts = told(lambda: model.load_state_dict(state))
    assert len(texts) == (choice == "base")
    if texts:
        assert "handle.checkpoint" in texts[0]
        assert "TrainerCallback" in texts[0]
    assert not told(lambda: model.load_state_dict(state))


def test_a_base_is_loaded_under_a_frozen_adapter_without_a_word():
    model = nn.Sequential(nn.Linear(4, 4))
    ak.torch.inject(model, ak.torch.create(model, "lora", targets=["0"], rank=2))
    assert not told(lambda: model.load_state_dict(model.state_dict()))


def test_a_trainer_that_goes_back_to_its_best_checkpoint_tells_that_it_has_no_adapter(tmp_path):
    model = llama()
    handle = attach(model)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=DATA, eval_dataset=DATA)
    (text,) = told(trainer.train)
    assert repr(handle.name) in text

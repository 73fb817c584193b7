"""Twelve methods in the loops that people use: losses are PEFT's; two processes train as one on the joined batch.

The whole matrix, Lightning included, is `tools/foreign/check_training.py`.
"""

import contextlib

import pytest
import torch
from torch import nn
from training_runs import IDS, LOOPS, METHODS, attached, llama, peft_model, trained
from two_processes import in_two_processes

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("starts")


@pytest.fixture
def undone():
    """Makes models with adapters; afterwards the base has its keys, modules, flags and bits again."""
    made = []

    def make(method, folder):
        model, handle = attached(method, folder)
        fresh = llama()
        assert list(model.state_dict()) == list(fresh.state_dict())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
        made.append((model, handle, fresh))
        return model, handle

    yield make
    for model, handle, fresh in made:
        assert not model.load_state_dict(fresh.state_dict()).missing_keys
        assert not fresh.load_state_dict(model.state_dict()).unexpected_keys
        handle.remove()
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
        assert not [key for module in model.modules() for key in vars(module) if "adapterkit" in key]
        assert not model._state_dict_hooks


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop_of_20_steps_equals_peft(method, folder, undone):
    model, _ = undone(method, folder)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = LOOPS["plain"](model, 20, folder)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if METHODS[method] is not None:
        assert losses == pytest.approx(LOOPS["plain"](peft_model(method), 20, folder), rel=1e-5)


@pytest.mark.parametrize("method", ["dora", "vera", "prefix", "bottleneck"])
@pytest.mark.parametrize("loop", ["trainer", "accelerate"])
def test_other_loops_equal_the_plain_one(loop, method, folder, undone, tmp_path):
    model, _ = undone(method, folder)
    losses = LOOPS[loop](model, 5, tmp_path)
    assert losses == pytest.approx(LOOPS["plain"](attached(method, folder)[0], 5, folder), rel=1e-5)


KINDS = {
    "as it is": {},
    "accumulation": {"parts": 2},
    "clipping": {"clip": 0.01},
    "autocast": {"autocast": True},
    "checkpointing": {"reentrant": False},
    "reentrant checkpointing": {"reentrant": True},
}


def steps_of(run, model, ids, parts=1, clip=None, autocast=False, steps=2):
    """Steps of SGD over a batch in parts."""
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    for _ in range(steps):
        for some in ids.chunk(parts):
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = run(input_ids=some, labels=some).loss / parts
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def prepared(method, folder, reentrant=None):
    model, handle = attached(method, folder)
    if reentrant is not None:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model, handle


def cases():
    """(method, kind) of the matrix: every method as it is, LoRA and DoRA in every way."""
    return [(method, "as it is") for method in METHODS] + [
        (method, kind) for method in ("lora", "dora") for kind in KINDS if kind != "as it is"
    ]


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _one_of_two(rank, way, file, folder, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    states = {}
    for method, kind in cases():
        given = dict(KINDS[kind])
        model, handle = prepared(method, folder, given.pop("reentrant", None))
        if way == "ddp":
            run = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer)
            run = fully_shard(model)
        steps_of(run, model, IDS[4 * rank : 4 * rank + 4], **given)
        states[method, kind] = {name: whole(value).clone() for name, value in handle.state_dict().items()}
    torch.save(states, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_train_every_method_as_one_on_the_joined_batch(way, folder, tmp_path):
    expected = {}
    for method, kind in cases():
        given = dict(KINDS[kind])
        model, handle = prepared(method, folder, given.pop("reentrant", None))
        steps_of(model, model, IDS, **given)
        expected[method, kind] = handle.state_dict()
    in_two_processes(_one_of_two, way, tmp_path / "rendezvous", folder, tmp_path / "state")
    for rank in range(2):
        states = torch.load(tmp_path / f"state.{rank}")
        assert states.keys() == expected.keys()
        for (method, kind), state in states.items():
            loose = {"rtol": 2e-2, "atol": 2e-3} if kind == "autocast" else {"rtol": 1e-5, "atol": 1e-6}
            for name, value in state.items():
                torch.testing.assert_close(
                    value,
                    expected[method, kind][name],
                    **loose,
                    msg=lambda m, case=(method, kind, name): f"{case}: {m}",
                )

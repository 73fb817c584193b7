"""Adapters in models that two processes share: tensor parallelism and torch's first FSDP, put on before and after.

Each case is compared with one process that has the whole model: outputs, three steps of training, the adapter that is
read back, `merge_`.
"""

import os
from types import SimpleNamespace

import pytest
import torch
import transformers
from situations import draw
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from two_processes import in_two_processes

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import NotMergeable, Unsupported
from adapterkit.methods.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = ("lora", "dora", "bottleneck", "oft")
X = draw(6, 16, seed=1).float()
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def made(method, seed=4):
    """An adapter of a method on both layers, away from where it begins."""
    found = ak.torch.create(Block(), method, targets=["up", "down"], **{"rank": 2} if "ra" in method else {})
    generator = torch.Generator().manual_seed(seed)
    return found.replace(updates={t: tuple(moved(u, generator) for u in us) for t, us in found.updates.items()})


def moved(update, generator):
    tensors = {name: value for name, value in update.tensors.items() if name not in update.frozen}
    return update.replace(
        **{n: v + 0.2 * torch.randn(v.shape, generator=generator).to(v.dtype) for n, v in tensors.items()}
    )


def parallel(model):
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def flattened(model, whole=False):
    return FullyShardedDataParallel(model, use_orig_params=not whole, device_id=torch.device("cpu"))


def train(model, handle, x=X):
    optimizer = torch.optim.SGD(handle.parameters(), lr=0.05)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(handle):
    return [value for _, update in handle.adapter() for value in update.tensors.values()]


def close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def tensor_parallel(method, trainable, first):
    one, adapter = Block(), made(method)
    alone = ak.torch.inject(one, adapter, trainable=trainable)
    model = parallel(Block()) if first else Block()
    handle = ak.torch.inject(model, adapter, trainable=trainable)
    model = model if first else parallel(model)
    if trainable and method == "oft":
        with pytest.raises(Unsupported, match="cannot train oft in a tensor-parallel layer"):
            model(X)
        return
    close(model(X), one(X))
    if trainable:
        train(model, handle)
        train(one, alone)
        close(model(X), one(X))
        for got, wanted in zip(values(handle), values(alone), strict=True):
            close(got, wanted)
    if method not in ("bottleneck", "oft"):
        wanted = one(X).detach()
        handle.merge_()
        close(model(X), wanted)


def routed(first):
    one, model = Block(), parallel(Block()) if first else Block()
    for each in (one, model):
        ak.torch.inject(each, made("lora"), name="a")
        ak.torch.inject(each, made("lora", seed=5), name="b")
    model = model if first else parallel(model)
    names = ["a", "b", None, "b", "a", None]
    with ak.torch.route(one, names), ak.torch.route(model, names), torch.no_grad():
        close(model(X), one(X))
        with ak.torch.handles(model)["b"].disable():
            assert not torch.allclose(model(X), one(X))


def first_fsdp(method, rank):
    one, adapter = Block(), made(method)
    alone = ak.torch.inject(one, adapter, trainable=True)
    wanted = one(X).detach()
    for whole in (False, True):
        frozen = Block()
        ak.torch.inject(frozen, adapter)
        close(flattened(frozen, whole)(X), wanted)
        for trainable in (False, True):
            with pytest.raises(Unsupported, match=r"FullyShardedDataParallel has flattened.*use_orig_params"):
                ak.torch.inject(flattened(Block(), whole), adapter, trainable=trainable)
    model = Block()
    handle = ak.torch.inject(model, adapter, trainable=True)
    model = flattened(model)
    train(model, handle, X[3 * rank : 3 * rank + 3])
    train(one, alone)
    close(model(X), one(X))


def lora_fa(rank, first):
    """LoRA-FA under FSDP2; accelerate puts sharded parameters into an optimizer that was made before."""
    one, model = Block(), Block()
    alone, handle = (ak.torch.inject(each, made("lora"), trainable=True) for each in (one, model))
    before = dict(model.named_parameters())
    optimizer = ak.torch.LoRAFA(handle, lr=0.05) if first else None
    fully_shard(model)
    if optimizer is None:
        optimizer = ak.torch.LoRAFA(handle, lr=0.05)
    else:
        sharded = {id(parameter): model.get_parameter(name) for name, parameter in before.items()}
        for group in optimizer.param_groups:
            group["params"] = [sharded[id(parameter)] for parameter in group["params"]]
    for each, step, x in (
        (one, ak.torch.LoRAFA(alone, lr=0.05), X),
        (model, optimizer, X[3 * rank : 3 * rank + 3]),
    ):
        for _ in range(3):
            each(x).square().mean().backward()
            step.step()
            step.zero_grad()
    for got, wanted in zip(values(handle), values(alone), strict=True):
        close(got, wanted)


def emptied(rank, method, choice):
    """accelerate's preparation for FSDP2, which empties all parameters and loads them again from the first process."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    one, model = Block(), Block()
    alone, handle = (ak.torch.inject(each, made(method), trainable=True) for each in (one, model))
    handle.checkpoint = choice
    if rank:
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, cpu_ram_efficient_loading=True
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=not rank,
        device=torch.device("cpu"),
    )  # fmt: skip
    model = fsdp2_prepare_model(accelerator, model)
    train(model, handle, X[3 * rank : 3 * rank + 3])
    train(one, alone)
    close(model(X), one(X))
    for got, wanted in zip(values(handle), values(alone), strict=True):
        close(got, wanted)


def units(rank, method):
    """Every block and the embedding are units of FSDP2, as in accelerate; the adapter is used outside of its unit."""
    runs, ids = [], torch.arange(24).reshape(4, 6) % 32
    for sharded in (False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
        fresh = ak.torch.create(model, method, rank=2)
        generator = torch.Generator().manual_seed(4)
        adapter = fresh.replace(updates={t: tuple(moved(u, generator) for u in us) for t, us in fresh.updates.items()})
        handle = ak.torch.inject(model, adapter, trainable=True)
        if sharded:
            for each in (*model.model.layers, model.model.embed_tokens, model):
                fully_shard(each)
        mine = ids[2 * rank : 2 * rank + 2] if sharded else ids
        optimizer = torch.optim.SGD(handle.parameters(), lr=1.0)
        for _ in range(3):
            model(input_ids=mine, labels=mine).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(values(handle))
    for got, wanted in zip(*runs, strict=True):
        close(got, wanted)


def planned(rank, folder):
    """Layers of transformers' `tp_plan`, closures that spread their input: refused by name, and right once merged."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.manual_seed(0)
    one = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    if rank == 0:
        one.save_pretrained(folder)
    torch.distributed.barrier()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    ids = torch.tensor([[5, 9, 2, 7]])
    base = one(ids).logits.detach()
    for method in ("lora", "dora"):
        made = ak.torch.create(one, method, targets=["v_proj", "down_proj"], rank=2)
        generator = torch.Generator().manual_seed(4)
        adapter = made.replace(updates={t: tuple(moved(u, generator) for u in us) for t, us in made.updates.items()})
        alone, handle = ak.torch.inject(one, adapter), ak.torch.inject(model, adapter)
        with pytest.raises(Unsupported, match=r"tp_plan.*merge_"):
            model(ids)
        with handle.disable():
            close(filled(model(ids).logits), base)
        handle.merge_(keep=True)
        close(filled(model(ids).logits), one(ids).logits)
        assert not torch.allclose(one(ids).logits, base, atol=1e-4)
        handle.unmerge_()
        handle.remove()
        alone.remove()
        close(filled(model(ids).logits), base)


def overflowing(spread):
    """The merged row that overflows float16 is in the second process alone; both refuse and keep their weights."""
    model = spread(nn.Sequential(nn.Linear(4, 4, bias=False)).half(), torch.distributed.init_device_mesh("cpu", (2,)))
    B = torch.zeros(4, 1)
    B[3] = 60000.0
    handle = ak.torch.inject(model, Adapter({Target("0"): (LoRA(A=torch.full((1, 4), 2.0), B=B),)}))
    before = filled(model[0].weight).clone()
    with pytest.raises(NotMergeable, match="NaN or an infinity in float16"):
        handle.merge_()
    assert torch.equal(filled(model[0].weight), before)


def filled(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    # Before 2.12, torch cannot solve linear systems in a tensor-parallel layer; OFT needs their solutions.
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)
    for method in (each for each in METHODS if not (old and each == "oft")):
        for trainable in (False, True):
            for first in (False, True):
                tensor_parallel(method, trainable, first)
    for method in ("lora", "bottleneck"):
        first_fsdp(method, rank)
    for first in (False, True):
        routed(first)
        lora_fa(rank, first)
    for method, choice in (("lora", "base"), ("vera", "all"), ("dora", "adapter")):
        emptied(rank, method, choice)
    for method in ("prompt", "prefix", "vblora"):
        units(rank, method)
    planned(rank, file.parent / "model")
    torch.distributed.destroy_process_group()


def test_two_processes_compute_and_train_as_one(tmp_path):
    in_two_processes(work, tmp_path / "meet")


def work_of_overflows(rank, file):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    overflowing(lambda model, mesh: fully_shard(model, mesh=mesh))
    overflowing(lambda model, mesh: parallelize_module(model, mesh, {"0": ColwiseParallel()}))
    torch.distributed.destroy_process_group()


def test_an_overflow_in_one_process_is_refused_in_both(tmp_path):
    in_two_processes(work_of_overflows, tmp_path / "meet")

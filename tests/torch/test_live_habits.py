"""LoftQ's start and LoRA-FA's optimizer, against brute force, bitsandbytes' stored vectors and PEFT."""

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import lorafa
from peft_starts import IDS, llama
from safetensors.numpy import load_file
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import UsageError
from adapterkit.methods.lora import LoRA
from adapterkit.torch.starts import NF4, _to_int8, _to_nf4

pytestmark = pytest.mark.filterwarnings("ignore")
VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "quant"


def nearest(W):
    """nf4 by brute force, in float64: each block of 64 over its largest, each number to the nearest level."""
    levels, flat = np.array(NF4, np.float64), W.double().numpy().reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        largest = np.abs(block).max()
        out[start : start + 64] = levels[np.abs(block[:, None] / largest - levels).argmin(1)] * largest
    return torch.from_numpy(out.reshape(W.shape)).float()


def test_rounding_to_nf4_is_brute_force_and_keeps_what_bitsandbytes_wrote():
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(_to_nf4(W), nearest(W))
    seen = 0
    for folder in sorted(VECTORS.glob("bnb_4bit/nf4_float32")):
        for file in folder.rglob("*expected*.safetensors"):
            for values in load_file(file).values():
                held = torch.from_numpy(np.ascontiguousarray(values, np.float32))
                torch.testing.assert_close(_to_nf4(held), held)
                seen += 1
    assert seen


def test_rounding_to_8_bits_is_that_of_rows():
    W = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    W = W.half().float()  # As bitsandbytes begins.
    W[2] = 0
    Q = _to_int8(W)
    steps = W.abs().amax(1, keepdim=True) / 127
    assert ((W - Q).abs() <= steps / 2 + 1e-7).all()
    assert (((Q / steps.clamp_min(1e-30)) - (Q / steps.clamp_min(1e-30)).round()).abs() < 1e-3).all()


@pytest.mark.parametrize(("init", "rounded"), [("loftq", nearest), ("loftq_iter_3", nearest), ("loftq_int8", None)])
def test_loftq_is_the_best_beside_the_rounded_weight(init, rounded, close):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(40, 24)), torch.randn(5, 40)
    W, b = model[0].weight.detach().clone(), model[0].bias
    adapter = ak.torch.create(model, "lora", targets="0", rank=4, alpha=4, init=init)
    handle = ak.torch.inject(model, adapter, trainable=True)
    ((_, taken), (_, start)) = adapter
    Q, change = W - taken.D, start.B @ start.A
    if rounded is not None and init == "loftq":
        torch.testing.assert_close(Q, rounded(W), rtol=1e-5, atol=1e-6)
    S = torch.linalg.svdvals(W - Q)
    assert float((W - Q - change).norm()) == pytest.approx(float((S[4:] ** 2).sum().sqrt()), rel=1e-4)
    close(model(x), nn.functional.linear(x, Q + change, b), tolerance=1e-6)
    assert torch.equal(model[0].weight, W)
    assert {name.rpartition(".")[2] for name, _ in handle.named_parameters()} == {"A", "B"}
    model(x).sum().backward()
    handle.remove()
    assert torch.equal(model[0].weight, W)


def test_more_steps_of_loftq_are_no_worse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    errors = []
    for init in ("loftq", "loftq_iter_5"):
        ((_, taken), (_, start)) = ak.torch.create(model, "lora", targets="0", rank=8, alpha=8, init=init)
        errors.append(float((taken.D - start.B @ start.A).norm()))
    assert errors[1] < errors[0] < float((model[0].weight - _to_nf4(model[0].weight.detach())).norm())


def test_unknown_starts_are_refused():
    for init in ("loftq_iter_0", "loftq_4", "loftq_iter_"):
        with pytest.raises(UsageError, match="unknown initialiser"):
            ak.torch.create(nn.Sequential(nn.Linear(8, 8)), "lora", targets="0", rank=2, init=init)


def losses(model, optimizer, steps=20):
    found = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_fa_trains_as_pefts_optimizer(decay, monkeypatch):
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # It would compute one product in 16 bits.
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    theirs = get_peft_model(llama(), config)
    model = llama()
    made = ak.torch.create(model, "lora", rank=4, alpha=8, targets=["q_proj", "up_proj"], seed=3)
    handle = ak.torch.inject(model, made, trainable=True)
    with torch.no_grad():
        for target, update in handle._adapter:
            layer = theirs.get_submodule(f"base_model.model.{target.path}")
            update.A.copy_(layer.lora_A["default"].weight)
    before = {name: value.clone() for name, value in handle.state_dict().items()}
    optimizer = ak.torch.LoRAFA(handle, lr=0.01, weight_decay=decay)
    wanted = losses(theirs, lorafa.create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=0.01, weight_decay=decay))
    assert losses(model, optimizer) == pytest.approx(wanted, rel=1e-5)
    for name, value in handle.state_dict().items():
        assert torch.equal(value, before[name]) == name.endswith(".A")
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.ndim != 2] == []


@pytest.mark.parametrize("experts", [2, 3])
def test_lora_fa_corrects_the_gradient_of_each_stacked_expert(experts):
    """With 3 experts of rank 3, the product over the wrong axes has a valid shape too."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(experts, 5, 6))

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.w, x)

    torch.manual_seed(0)
    model = Experts()
    lora = LoRA(A=torch.randn(experts, 3, 6), B=torch.randn(experts, 5, 3), scaling=2.0)
    adapter = Adapter({Target("w", layout="e out *in"): (lora,)})
    handle = ak.torch.inject(model, adapter, trainable=True)
    optimizer = ak.torch.LoRAFA(handle, betas=(0.0, 0.0))
    model(torch.randn(4, 6)).square().sum().backward()
    B = next(p for name, p in handle.named_parameters() if name.endswith(".B"))
    A = lora.A.double()
    wanted = B.grad.double() @ torch.linalg.inv(A @ A.mT) / lora.scaling**2
    optimizer.step()
    torch.testing.assert_close(optimizer.state[B]["mean"].double(), wanted, rtol=1e-4, atol=1e-4)


def test_lora_fa_resumes_bit_for_bit_and_refuses_other_methods():
    runs = []
    for stop in (False, True):
        model = llama()
        handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=4, targets="q_proj"), trainable=True)
        optimizer = ak.torch.LoRAFA(handle, lr=0.01)
        found = losses(model, optimizer, 3)
        if stop:
            file = io.BytesIO()
            torch.save((handle.state_dict(), optimizer.state_dict()), file)
            model = llama()
            handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=4, targets="q_proj"), trainable=True)
            optimizer = ak.torch.LoRAFA(handle, lr=0.5)
            file.seek(0)
            state, inner = torch.load(file, weights_only=True)
            handle.load_state_dict(state)
            optimizer.load_state_dict(inner)
        runs.append(found + losses(model, optimizer, 3))
    assert runs[0] == runs[1]
    model = llama()
    handle = ak.torch.inject(model, ak.torch.create(model, "ia3", targets="q_proj"), trainable=True)
    with pytest.raises(UsageError, match="ia3 is not LoRA"):
        ak.torch.LoRAFA(handle)
    frozen = ak.torch.inject(model, ak.torch.create(model, "lora", rank=2, targets="v_proj"), name="frozen")
    with pytest.raises(UsageError, match="no trained tensors"):
        ak.torch.LoRAFA(frozen)


def test_lora_fa_keeps_no_inputs():
    """At sizes where a LoRA keeps its input for the backward pass, the projected one is kept alone."""
    model, x = nn.Sequential(nn.Linear(256, 256)), torch.randn(600, 256)
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=4, targets="0"), trainable=True)
    held = []
    for _ in range(2):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.data_ptr()), t)[1], lambda t: t):
            model(x).sum().backward()
        held.append(x.data_ptr() in sizes)
        ak.torch.LoRAFA(handle)
    assert held == [True, False]


def test_the_levels_are_those_of_the_stored_vectors():
    maps = [
        values
        for file in VECTORS.glob("bnb_4bit/nf4_float32/**/*.safetensors")
        for name, values in load_file(file).items()
        if name.endswith("quant_map") and "nested" not in name
    ]
    assert maps
    np.testing.assert_allclose(maps[0], NF4)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("fewer", [False, True])
def test_lora_fa_goes_on_after_it_is_copied_or_pickled_with_its_model(again, fewer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    handle = ak.torch.inject(model, ak.torch.create(model, "lora", rank=2, targets=["0", "1"]), trainable=True)
    both = model, ak.torch.LoRAFA(handle, lr=0.1)
    if fewer:  # The user trains only the first layer.
        del both[1].param_groups[0]["params"][1:]

    def steps(net, optimizer):
        for seed in range(3):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return net(torch.ones(1, 4))

    steps(*both)
    twin = again(both)
    before = model(torch.ones(1, 4))
    twins = steps(*twin)
    assert torch.equal(model(torch.ones(1, 4)), before)
    assert torch.equal(steps(*both), twins)

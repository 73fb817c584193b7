"""Projections that all modules share, in PEFT's files and drawn again; LoRA-XS; fresh adapters."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, PveraConfig, RandLoraConfig, VeraConfig, get_peft_model
from peft_cases import Layers, gpt2
from peft_folders import edit, merged, random, train
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.errors import Malformed, ShapeMismatch, Unrepresentable, Unsupported, UsageError
from adapterkit.io.lazy import as_torch
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""


@pytest.fixture
def trained(tmp_path):
    """What PEFT saves, in this test's folder."""
    return partial(train, tmp_path)


@pytest.mark.parametrize("build", [Layers, gpt2])
@pytest.mark.parametrize(("kind", "r"), [(VeraConfig, 5), (PveraConfig, 3)])
def test_projections_are_drawn_again_bit_by_bit(kind, r, build, trained, tmp_path):
    targets = ["q", "up", "head.1"] if build is Layers else ["c_attn", "mlp.c_proj"]
    seed = {"projection_prng_key": 1234567890123}
    model, folder, base = trained(build, kind(r=r, target_modules=targets, save_projection=False, **seed))
    held = get_peft_model(copy.deepcopy(model), kind(r=r, target_modules=targets, **seed)).base_model
    adapter = ak.read(folder, base=base)
    word = "vera" if kind is VeraConfig else "pvera"
    for name in "AB":
        leaves = {id(update.tensors[name]): update.tensors[name] for _, update in adapter}
        assert len(leaves) == 1, "one tensor for all"
        assert torch.equal(as_torch(next(iter(leaves.values()))), getattr(held, f"{word}_{name}")["default"])
    expected = merged(model, folder)
    ak.merge(base, adapter, tmp_path / "out")
    for name, tensor in load_file(tmp_path / "out" / "base.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    ak.write(adapter, tmp_path / "native.safetensors")
    for number, same in enumerate((adapter, ak.read(tmp_path / "native.safetensors"))):
        ak.write(same, tmp_path / f"again {number}", "peft")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / f"again {number}" / file).read_bytes() == (folder / file).read_bytes()
    other = {t: tuple(u.replace(A=2 * as_torch(u.A)) for u in us) for t, us in adapter.updates.items()}
    ak.write(adapter.replace(updates=other), tmp_path / "other", "peft")
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["save_projection"] is True
    ak.write(adapter.replace(foreign=None), tmp_path / "whole", "peft", base=base)
    assert ak.read(tmp_path / "whole").digest() == adapter.digest()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged(model, tmp_path / "whole").items())


def test_what_only_the_base_tells_is_asked_for(trained, tmp_path):
    _, folder, _ = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"], save_projection=False))
    with pytest.raises(UsageError, match=r"only the base shows their sizes.*--base") as raised:
        ak.read(folder)
    assert raised.value.where == "block.0.q"
    names = [f"block.{n}.{module}.weight" for n in (0, 1) for module in ("q", "up")]
    save_file({name: torch.zeros(3, 3) for name in names}, tmp_path / "b.safetensors")
    with pytest.raises(ShapeMismatch, match="the module has 8 outputs, but the base's weight has shape"):
        ak.read(folder, base=tmp_path / "b.safetensors")
    edit(folder, save_projection=True)
    with pytest.raises(Malformed, match="states that the file has the projections, but the file lacks vera_A"):
        ak.read(folder)


def test_projections_beside_a_config_without_are_refused(trained):
    """PEFT would draw its own, whatever is in the file."""
    _, folder, base = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"]))
    edit(folder, save_projection=False)
    with pytest.raises(Malformed, match="save_projection = false, but the file contains the projections"):
        ak.read(folder, base=base)
    edit(folder, save_projection=True, r=4)
    with pytest.raises(ShapeMismatch, match="with r = 4 in the config"):
        ak.read(folder, base=base)


def test_drawing_at_inference_is_no_formula(trained):
    _, folder, _ = trained(Layers, PveraConfig(r=2, target_modules=["q"], sample_at_inference=True))
    with pytest.raises(Unsupported, match="draws random values"):
        ak.read(folder)


def test_projections_that_peft_would_make_smaller_are_not_written(trained, tmp_path):
    _, folder, base = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"]))
    adapter = ak.read(folder)
    small = adapter.replace(updates={t: u for t, u in adapter.updates.items() if t.path.endswith("q")})
    with pytest.raises(Unrepresentable, match="its projections do not have the size that PEFT chooses"):
        ak.write(small, tmp_path / "a", "peft")
    other = {t: tuple(u.replace(A=random(5, 8), B=random(12, 5)) for u in us) for t, us in small.updates.items()}
    with pytest.raises(Unrepresentable, match="all modules share this tensor"):
        ak.write(adapter.replace(updates={**adapter.updates, **other}), tmp_path / "a", "peft", base=base)


def test_bases_of_randlora_are_in_the_file_once_for_all(trained, tmp_path):
    _, folder, _ = trained(Layers, RandLoraConfig(r=3, target_modules=["q", "up"]))
    adapter = ak.read(folder)
    assert len({id(update.B) for _, update in adapter}) == 1
    ak.write(adapter, tmp_path / "a.safetensors")
    copies = sum(name.endswith(".B") for name in load_file(tmp_path / "a.safetensors"))
    assert (copies, sum(k.endswith("randlora_B") for k in load_file(folder / "adapter_model.safetensors"))) == (1, 5)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.block.1.up.randlora_B"] += 1
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(Malformed, match="this copy differs from") as raised:
        ak.read(folder)
    assert raised.value.where == "base_model.model.block.1.up.randlora_B"
    _, folder, _ = trained(Layers, RandLoraConfig(r=3, target_modules=["q"], save_projection=False), "without")
    with pytest.raises(Unsupported, match="the precision in which PEFT draws them depends on"):
        ak.read(folder)


@pytest.mark.parametrize("form", ["{}_lora_latent_mapping.weight", "{}.default_lora_latent_mapping.weight"])
def test_lora_xs_as_its_authors_save_it(form, trained, tmp_path):
    """No PEFT has the formula: float64 numpy has."""
    _, folder, base = trained(Layers, LoraConfig(r=3, lora_alpha=5, target_modules=["q", "up"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {key.partition(".lora_A")[0] for key in tensors if "lora_A" in key}
    tensors |= {form.format(path): random(3, 3, seed=len(path)) for path in paths}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    adapter = ak.read(folder)
    assert {update.method for _, update in adapter} == {"lora_xs"}
    for path in paths:
        A, B = (tensors[f"{path}.lora_{name}.weight"].double().numpy() for name in "AB")
        R = tensors[form.format(path)].double().numpy()
        expected = 5 / 3 * np.einsum("op,pq,qi->oi", B, R, A)
        got = adapter.delta(path.removeprefix("base_model.model."), base).double().numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(Unrepresentable, match="PEFT files cannot store the method lora_xs"):
        ak.write(adapter, tmp_path / "b", "peft")


FRESH = ["adalora", "loha", "lokr", "lora_xs", "miss", "pvera", "randlora", "vera"]
MODULES = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 8)), (16, 12)),
    "conv": (lambda: nn.Sequential(nn.Conv1d(12, 6, 3)), (4, 12, 7)),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("method", FRESH)
def test_a_fresh_adapter_changes_nothing_and_learns(method, kind):
    """Every tensor that is trained has a gradient once the first step has been made, and the loss falls."""
    if kind == "conv" and method in ("miss", "pvera", "randlora", "vera"):
        return
    torch.manual_seed(0)
    build, shape = MODULES[kind]
    model = build().double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64)
    y = model(x)
    goal = y + torch.randn_like(y)
    adapter = ak.torch.create(model, method, targets=type(model[0]), rank=2, seed=5)
    handle = ak.torch.inject(model, adapter, trainable=True)
    assert torch.equal(model(x), y)
    frozen = METHODS[method].frozen
    trained = {n: p for n, p in handle.named_parameters() if n.rpartition(".")[2] not in frozen}
    optimizer = torch.optim.Adam(trained.values(), lr=0.05)
    losses, reached = [], set()
    for _ in range(25):
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), goal)
        loss.backward()
        reached |= {name for name, parameter in trained.items() if bool(parameter.grad.any())}
        optimizer.step()
        losses.append(loss.item())
    assert reached == set(trained)
    assert losses[-1] < 0.99 * losses[0]


@pytest.mark.parametrize("method", ["pvera", "randlora", "vera"])
def test_fresh_adapters_share_their_projections(method, tmp_path):
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 9), nn.Linear(9, 9))
    adapter = ak.torch.create(model, method, rank=2)
    for name in METHODS[method].frozen:
        assert len({id(update.tensors[name]) for _, update in adapter}) == 1
    save_file(model.state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    moved = adapter.replace(
        updates={
            target: tuple(
                u.replace(**{n: t + random(*t.shape) for n, t in u.tensors.items() if n not in u.frozen}) for u in us
            )
            for target, us in adapter.updates.items()
        }
    )
    ak.write(moved, tmp_path / "a", "peft", base=tmp_path / "base.safetensors")
    expected = merged(model.eval(), tmp_path / "a")
    for target in moved.updates:
        W = model[int(target.path)].weight.detach()
        got = moved.delta(target.path, tmp_path / "base.safetensors")
        torch.testing.assert_close(W + got, expected[f"{target.path}.weight"], rtol=1e-5, atol=1e-6)


def test_a_drawn_projection_costs_no_more_than_the_file_says(trained):
    """The rank is that of a tensor in the file, so a config cannot ask for more memory than that."""
    _, folder, base = trained(Layers, VeraConfig(r=5, target_modules=["q"], save_projection=False))
    edit(folder, r=1 << 30)
    with pytest.raises(ShapeMismatch, match="with r = 1073741824 in the config"):
        ak.read(folder, base=base)


def test_a_module_inside_another_adapters_wrapper_is_refused(trained):
    _, folder, _ = trained(Layers, VeraConfig(r=5, target_modules=["q", "up"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    nested = {key.replace("0.q.vera", "0.q.base_layer.vera"): tensor for key, tensor in tensors.items()}
    save_file(nested, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(Malformed, match="nested in another adapter") as raised:
        ak.read(folder)
    assert "block.0.q.base_layer.vera_lambda_" in raised.value.where

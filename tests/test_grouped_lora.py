"""LoRA of convolutions in groups against PEFT, which reads all channels there and never merges."""

import copy
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import Grouped, outputs
from peft_folders import train
from torch import nn

import adapterkit as ak
from adapterkit.errors import NotMergeable, ShapeMismatch, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns that it does not merge these."""


class Volume(nn.Module):
    """Beside those of `Grouped`: three axes, as many groups as channels, padding that repeats, and no groups."""

    def __init__(self):
        super().__init__()
        self.three = nn.Conv3d(4, 8, (1, 2, 2), groups=2, bias=False)
        self.deep = nn.Conv2d(6, 6, 3, groups=6, stride=2, padding=1)
        self.plain = nn.Conv1d(4, 6, 3)


def config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False} | options)


CASES = {
    "groups": (Grouped, config(target_modules=["one", "wide"], r=8)),
    "rank of each": (
        Volume,
        config(target_modules=["three", "deep", "plain"], rank_pattern={"deep": 6}, use_rslora=True),
    ),
    "biased": (Volume, config(target_modules=["deep"], r=12, lora_bias=True)),
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """Plain model, PEFT's folder, file of the base."""
    return train(tmp_path_factory.mktemp("peft"), *CASES[request.param])


def loaded(model, folder):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    assert not [w for w in said if "adapter keys" in str(w.message) or "nexpected" in str(w.message)]
    return found.eval()


@torch.no_grad()
def test_computes_what_peft_computes(made):
    model, folder, _ = made
    mine = copy.deepcopy(model)
    handle = ak.torch.inject(mine, ak.read(folder))
    wanted = outputs(model, loaded(model, folder).base_model.model)
    for got, peft, plain in zip(outputs(model, mine), wanted, outputs(model, model), strict=True):
        torch.testing.assert_close(got, peft, rtol=1e-5, atol=1e-5)
        assert got.shape == plain.shape
    handle.remove()
    for got, plain in zip(outputs(model, mine), outputs(model, model), strict=True):
        assert torch.equal(got, plain)


def test_peft_loads_what_is_written_and_its_own_bytes_come_back(made, tmp_path):
    model, folder, base = made
    adapter = ak.read(folder)
    ak.write(adapter, tmp_path / "again", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    ak.write(adapter.replace(foreign=None), tmp_path / "new", "peft", base=base)
    assert ak.read(tmp_path / "new").digest() == adapter.replace(foreign=None).digest()
    one, other = (loaded(model, path).base_model.model for path in (folder, tmp_path / "new"))
    assert all(map(torch.equal, outputs(model, one), outputs(model, other)))


def test_it_is_not_merged_by_either(made, tmp_path):
    model, folder, base = made
    with pytest.raises(NotImplementedError, match="groups > 1"):
        loaded(model, folder).merge_and_unload()
    with pytest.raises(NotMergeable, match="grouped_lora changes the output by channels of all groups, not weights"):
        ak.merge(base, folder, tmp_path / "out")


def test_dora_in_groups_is_refused_since_peft_divides_by_other_norms(tmp_path):
    """PEFT multiplies B and A after giving B's rows another order, so that its norm is not of what it computes with."""
    model, folder, _ = train(tmp_path, Grouped, config(target_modules=["one"], use_dora=True))
    with pytest.raises(Unsupported, match="DoRA of a convolution in groups: PEFT divides by the norms") as raised:
        ak.read(folder)
    assert raised.value.where == "base_model.model.one.lora_magnitude_vector"
    peft, x = loaded(model, folder).base_model.model.one, torch.randn(2, 8, 6)
    A, B = (getattr(peft, f"lora_{name}")["default"].weight for name in "AB")
    m, s, layer = peft.lora_magnitude_vector["default"].weight.flatten(), peft.scaling["default"], peft.base_layer
    W, D = torch.zeros(2, 12, 8, 3)
    for o in range(12):
        group = o // 6
        W[o, 4 * group : 4 * group + 4] = layer.weight[o]
        D[o] = s * torch.einsum("r,rik->ik", B[o, :, 0], A[2 * group : 2 * group + 2])
    other = layer.weight + s * (B.view(-1, 4) @ A.view(4, -1)).view(12, 4, 3)
    with torch.no_grad():
        for norm_of, same in ((W + D, False), (other, True)):
            V = (W + D) * (m / norm_of.flatten(1).norm(dim=1))[:, None, None]
            y = torch.nn.functional.conv1d(x, V, layer.bias, padding=1)
            assert torch.allclose(peft(x), y, rtol=1e-4, atol=1e-4) == same


def test_trains_from_scratch_and_fits_its_layer_alone():
    model = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2)).requires_grad_(False)
    x = torch.randn(2, 8, 5, 5)
    y = model(x)
    fresh = ak.torch.create(model, "grouped_lora", targets="0", rank=4, groups=2)
    handle = ak.torch.inject(model, fresh, trainable=True)
    assert torch.equal(model(x), y)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in handle.parameters())
    handle.remove()
    with pytest.raises(ShapeMismatch, match=r"made for 8 channels in 2 groups .* the weight is \[4, 8, 3, 3\]"):
        ak.torch.inject(nn.Sequential(nn.Conv2d(8, 4, 3)), fresh)
    # A weight does not tell how many groups it is of: the layer itself does, once it runs.
    for other, channels in ((nn.Conv2d(4, 4, 3), 4), (nn.Conv2d(16, 4, 3, groups=4), 16)):
        alike = nn.Sequential(other)
        ak.torch.inject(alike, fresh)
        with pytest.raises(ShapeMismatch, match=rf"0: made for 8 channels; the layer reads {channels}"):
            alike(torch.randn(1, channels, 5, 5))


def test_other_updates_stand_beside_it():
    """A weight in groups is changed under its own forward, and this comes behind that."""
    model = nn.Sequential(nn.Conv1d(8, 4, 3, groups=2)).double()
    own = ak.METHODS["lora"](A=torch.randn(2, 4, 3).double(), B=torch.randn(4, 2).double())
    wide = ak.METHODS["grouped_lora"](A=torch.randn(2, 8, 3).double(), B=torch.randn(4, 1).double(), scaling=0.5)
    x, target = torch.randn(2, 8, 6).double(), ak.Target("0")
    y, found = model(x), []
    for updates in ((own,), (wide,), (own, wide)):
        handle = ak.torch.inject(model, ak.Adapter({target: updates}))
        found.append(model(x) - y)
        handle.remove()
    torch.testing.assert_close(found[0] + found[1], found[2])


def test_peft_needs_a_rank_that_groups_divide():
    with pytest.raises(ValueError, match="rank is divisible by groups"):
        get_peft_model(Grouped(), config(target_modules=["two"], r=3))

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
from adapterkit.errors import NotMergeable, ShapeMismatch, Unrepresentable

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
    with pytest.raises(
        NotMergeable, match="grouped_lora changes the output, from the channels of all groups, not weights"
    ):
        ak.merge(base, folder, tmp_path / "out")


DORA = {
    "groups": (Grouped, config(target_modules=["one", "wide"], r=8, use_dora=True)),
    "beside plain ones": (
        Volume,
        config(target_modules=["three", "deep", "plain"], rank_pattern={"deep": 6}, use_dora=True, use_rslora=True),
    ),
}


@pytest.mark.parametrize("case", DORA)
@torch.no_grad()
def test_dora_in_groups_divides_by_the_norms_that_pefts_forward_divides_by(case, tmp_path):
    """PEFT reads the numbers of B in another order for the norm than for the change."""
    model, folder, base = train(tmp_path / "peft", *DORA[case])
    adapter = ak.read(folder)
    assert {update.method for found in adapter.updates.values() for update in found} == {"grouped_dora", "dora"}
    wanted = outputs(model, loaded(model, folder).base_model.model)
    for read, same in ((adapter, True), (ak.read(folder, compat="formula"), False)):
        mine = copy.deepcopy(model)
        handle = ak.torch.inject(mine, read)
        close = [torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(outputs(model, mine), wanted, strict=True)]
        assert all(close) == same
        handle.remove()
    ak.write(adapter, tmp_path / "again", "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    ak.write(adapter.replace(foreign=None), tmp_path / "new", "peft", base=base)
    for got, peft in zip(outputs(model, loaded(model, tmp_path / "new").base_model.model), wanted, strict=True):
        assert torch.equal(got, peft)
    with pytest.raises(NotMergeable, match="changes the output, from the channels of all groups, not weights"):
        ak.merge(base, folder, tmp_path / "out")


@torch.no_grad()
def test_dora_reads_zeros_around_the_input_of_a_padded_convolution_as_peft_trained_it(tmp_path):
    class Reflected(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect")
            self.two = nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", groups=2)

    model, folder, _ = train(tmp_path / "peft", Reflected, config(target_modules=["one", "two"], use_dora=True))
    mine = copy.deepcopy(model)
    ak.torch.inject(mine, ak.read(folder))
    peft = loaded(model, folder).base_model.model
    for name, channels in (("one", 3), ("two", 4)):
        x = torch.randn(2, channels, 6, 5)
        torch.testing.assert_close(getattr(mine, name)(x), getattr(peft, name)(x), rtol=1e-5, atol=1e-5)


def test_the_norms_of_the_paper_are_not_written_as_pefts(tmp_path):
    """A file means PEFT's norms; with others it is refused, unless it is read by the formula again."""
    _, folder, base = train(tmp_path / "peft", *DORA["groups"])
    paper = ak.read(folder, compat="formula")
    held = [update for found in paper.updates.values() for update in found]
    assert {update.regrouped for update in held if update.method == "grouped_dora"} == {False}
    with pytest.raises(Unrepresentable, match="grouped_dora divides by the norms of each output"):
        ak.write(paper.replace(foreign=None, recipe=()), tmp_path / "new", "peft", base=base)
    ak.write(paper, tmp_path / "again", "peft")
    again = (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert again == (folder / "adapter_model.safetensors").read_bytes()


@torch.no_grad()
def test_an_onnx_graph_divides_by_the_same_norms(tmp_path):
    import onnxruntime

    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Conv2d(6, 6, 1)).eval()
    made, folder, _ = train(tmp_path / "peft", lambda: model, config(target_modules=["0", "1"], use_dora=True))
    x = torch.randn(2, 4, 5, 6)
    torch.onnx.export(made, (x,), tmp_path / "base.onnx", dynamo=True, verbose=False)
    ak.onnx.inject(tmp_path / "base.onnx", ak.read(folder), tmp_path / "out.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), loaded(made, folder)(x), rtol=1e-4, atol=1e-5)


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
    with pytest.raises(
        ShapeMismatch, match=r"another number of channels.*inputs=8, in=8.*the weight has the shape \[4, 8, 3, 3\]"
    ):
        ak.torch.inject(nn.Sequential(nn.Conv2d(8, 4, 3)), fresh)
    # A weight does not tell how many groups it is of: the layer itself does, once it runs.
    for other, channels in ((nn.Conv2d(4, 4, 3), 4), (nn.Conv2d(16, 4, 3, groups=4), 16)):
        alike = nn.Sequential(other)
        ak.torch.inject(alike, fresh)
        with pytest.raises(
            ShapeMismatch, match=rf"0: the update was made for 8 channels, but the layer reads {channels}"
        ):
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

"""Every type of PEFT's on every kind of layer: what PEFT adapts and merges there, adapterkit merges and runs alike.

Which kinds a type supports is PEFT's to say: it is asked, case by case, and refuses what it does not support.
"""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft_cases import every_case
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.errors import NotMergeable, ShapeMismatch, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")
"""PEFT warns about much that is asked of it here; none of it comes from adapterkit."""


KINDS = {
    "linear": (lambda: nn.Linear(8, 12), (3, 8)),
    "square": (lambda: nn.Linear(8, 8, bias=False), (3, 8)),
    "stored in, out": (lambda: Conv1D(12, 8), (3, 8)),
    "embedding": (lambda: nn.Embedding(10, 8), None),
    "convolution along one axis": (lambda: nn.Conv1d(8, 4, 3, padding=1), (2, 8, 5)),
    "convolution along two axes": (lambda: nn.Conv2d(8, 4, (3, 2), stride=2), (2, 8, 6, 5)),
    "convolution along three axes": (lambda: nn.Conv3d(4, 8, 2), (1, 4, 3, 4, 3)),
    "of a square kernel": (lambda: nn.Conv2d(4, 6, 2), (2, 4, 5, 4)),
    "pointwise": (lambda: nn.Conv2d(8, 4, 1), (2, 8, 3, 3)),
    "in groups": (lambda: nn.Conv1d(8, 12, 3, groups=2), (2, 8, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 4, 4)),
    "norm": (lambda: nn.LayerNorm(8), (3, 8)),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 3, 8)),
}
"""Kind -> a layer, and the shape of an input; None for token numbers."""

FIRST = {str(config.peft_type.value): config for _, config in reversed(every_case().values())}
TYPES = {name: config for name, config in FIRST.items() if name != "TRAINABLE_TOKENS"}
"""`peft_type` -> a config that has a case of its own; those of rows alone have no targets."""

GROUPS_OF_PATCHES = ("OFT", "depthwise")
"""PEFT's forward turns patches over all channels there, for which no rotation fits the weight of a group."""

PATCHES = ("OFT", "of a square kernel")
"""PEFT's forward turns overlapping patches of the input there, which no change of the weight does."""


def layer(kind):
    torch.manual_seed(len(kind))
    return nn.ModuleDict({"m": KINDS[kind][0]()}).eval()


@torch.no_grad()
def run(model, kind):
    shape = KINDS[kind][1]
    if shape is None:
        return model["m"](torch.arange(10))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return model["m"](x, x, x)[0] if kind == "attention" else model["m"](x)


def config_for(peft_type):
    """A config of the type that names the one layer."""
    config = copy.deepcopy(TYPES[peft_type])
    off = {"rank_pattern": {}, "alpha_pattern": {}, "feedforward_modules": set(), "modules_to_save": None}
    for name, value in {"target_modules": {"m"}, **off}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def saved(model, peft_type, folder):
    """Whether PEFT adapts such a layer; if so its folder is written, every trained number moved."""
    try:
        wrapped = get_peft_model(copy.deepcopy(model), config_for(peft_type))
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError, LookupError):
        return False
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(str(folder))
    return bool(load_file(folder / "adapter_model.safetensors"))


def outcome(theirs, kind):
    """PEFT's output and the weights that it merges to; None for what it fails at."""
    try:
        y = run(theirs.base_model.model, kind)
    except (AttributeError, RuntimeError):  # Some forwards do not know kernels whose sides differ, or groups.
        y = None
    try:
        return y, theirs.merge_and_unload().state_dict()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return y, None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("peft_type", TYPES)
def test_what_peft_adapts_is_merged_and_runs_alike(peft_type, kind, tmp_path):
    model = layer(kind)
    if not saved(model, peft_type, tmp_path / "a"):
        return
    y, merged = outcome(PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a")).eval(), kind)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    adapter = ak.read(tmp_path / "a", base=tmp_path / "base.safetensors")
    if merged is None and (y is None or (peft_type, kind) == GROUPS_OF_PATCHES):
        with pytest.raises(ShapeMismatch):
            ak.torch.inject(model, adapter)
        return
    plain = run(model, kind)
    handle = ak.torch.inject(model, adapter)
    got = run(model, kind)
    assert not torch.equal(got, plain)
    if y is not None:
        torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    try:
        handle.merge_()
    except NotMergeable:
        assert merged is None or (peft_type, kind) == PATCHES
        return
    torch.testing.assert_close(run(model, kind), got, rtol=1e-5, atol=1e-5 * float(got.abs().max()))
    for name, weight in model.state_dict().items() if merged else ():
        wanted = merged.get(name, merged.get(name.replace("m.", "m.modules_to_save.default.")))
        error = float((weight.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
        assert error <= 1e-6, (name, error)


def test_every_kind_is_adapted_by_some_type_and_every_type_adapts_some_kind(tmp_path):
    able = {
        (name, kind)
        for name in TYPES
        for kind in ("linear", "embedding", "stored in, out", "pointwise", "norm", "attention", "in groups")
        if saved(layer(kind), name, tmp_path / f"{name} {kind}")
    }
    assert {name for name, _ in able} == set(TYPES)
    assert len({kind for _, kind in able}) == 7


PADDED = {
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular along one axis": lambda: nn.Conv1d(4, 6, 3, padding=2, stride=2, padding_mode="circular", bias=False),
    "dilated to the same size": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2),
    "in groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="replicate"),
}


def padded(kind, folder, **options):
    """A model of one such convolution, PEFT's folder for it, an input, and PEFT's output before and after its merge."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"m": PADDED[kind]()}).eval()
    wrapped = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=["m"], init_lora_weights=False, **options)
    )
    wrapped.save_pretrained(str(folder))
    x = torch.randn(2, 4, *[7] * (model["m"].weight.ndim - 2))
    with torch.no_grad():
        return model, x, wrapped.eval().base_model.model["m"](x)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", PADDED)
def test_lora_reads_zeros_around_the_input_of_a_convolution_as_peft_trained_it(kind, bias, tmp_path):
    if bias and kind.startswith("circular"):
        bias = False
    model, x, wanted = padded(kind, tmp_path / "a", lora_bias=bias)
    adapter = ak.read(tmp_path / "a")
    handle = ak.torch.inject(model, adapter)
    torch.testing.assert_close(model["m"](x), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(NotMergeable):
        handle.merge_()
    # The adapter that comes back is the one that was read, and is written as PEFT wrote it.
    again = handle.adapter()
    assert [update.method for _, update in again] == [update.method for _, update in adapter]
    ak.write(again, tmp_path / "b", "peft")
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "b" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, names[name])
    handle.remove()
    ak.torch.inject(model, ak.read(tmp_path / "a", compat="formula"))
    assert (model["m"](x) - wanted).abs().max() > 1e-2


@torch.no_grad()
def test_a_convolution_that_pads_nothing_has_one_reading(tmp_path):
    model = nn.ModuleDict({"m": nn.Conv2d(4, 6, 3, padding_mode="circular", dilation=1)})
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["m"], init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path / "a"))
    x, W = torch.randn(1, 4, 5, 5), model["m"].weight.clone()
    wanted = wrapped.eval().base_model.model["m"](x)
    handle = ak.torch.inject(model, ak.read(tmp_path / "a"))
    torch.testing.assert_close(model["m"](x), wanted, rtol=1e-5, atol=1e-5)
    handle.merge_()
    assert not torch.equal(model["m"].weight, W)
    torch.testing.assert_close(model["m"](x), wanted, rtol=1e-5, atol=1e-5)


def test_other_methods_of_padded_convolutions_are_refused_with_both_readings(tmp_path):
    torch.manual_seed(3)
    model = nn.ModuleDict({"m": PADDED["reflect"]()}).eval()
    get_peft_model(copy.deepcopy(model), LoHaConfig(r=2, target_modules={"m"})).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(Unsupported, match=r"padding_mode='reflect'.*pads the input with zeros") as raised:
        ak.torch.inject(model, ak.read(tmp_path / "a"))
    assert raised.value.where == "m"
    assert 'compat="formula"' in raised.value.cure
    assert "--compat formula" in raised.value.cure
    ak.torch.inject(model, ak.read(tmp_path / "a", compat="formula"))


@torch.no_grad()
def test_oft_of_a_convolution_read_without_the_base_is_still_what_peft_trained(tmp_path):
    kind = "of a square kernel"
    model = layer(kind)
    assert saved(model, "OFT", tmp_path / "a")
    theirs = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "a")).eval()
    wanted = run(theirs.base_model.model, kind)
    adapter = ak.read(tmp_path / "a")
    handle = ak.torch.inject(model, adapter)
    torch.testing.assert_close(run(model, kind), wanted, rtol=1e-5, atol=1e-5)
    assert [update.method for _, update in handle.adapter()] == ["oft"]
    handle.remove()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    for given in (adapter, tmp_path / "a"):
        with pytest.raises(NotMergeable, match="overlapping patches"):
            ak.merge(tmp_path / "base.safetensors", given, tmp_path / "out.safetensors", device="cpu")
    # The lineage travels in the native file, and with it the reading.
    ak.write(adapter, tmp_path / "n.safetensors")
    ak.torch.inject(model, ak.read(tmp_path / "n.safetensors"))
    torch.testing.assert_close(run(model, kind), wanted, rtol=1e-5, atol=1e-5)
    formula = ak.read(tmp_path / "a", compat="formula")
    ak.merge(tmp_path / "base.safetensors", formula, tmp_path / "out.safetensors", device="cpu")

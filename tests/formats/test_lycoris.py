"""LyCORIS's own forward, saved by tools/foreign/check_lycoris.py, where its options change what a file means.

Each case has the file that LyCORIS wrote, its layer's weights, an input, and what LyCORIS's forward gave for it.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import Unrepresentable, Unsupported

DATA = Path(__file__).parents[1] / "data" / "lycoris"
LAYERS = {
    "linear": lambda: nn.Linear(12, 16),
    "conv1d k3": lambda: nn.Conv1d(8, 12, 3, padding=1),
    "conv2d k3": lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2),
    "conv2d reflect": lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"),
}
CASES = sorted(path.name.removesuffix(".adapter.safetensors") for path in DATA.glob("*.adapter.safetensors"))
OPTIONS = [case for case in CASES if not case.endswith("reflect")]
REFLECT = "lora-conv2d_reflect"


def model_of(case, weights=None):
    with safe_open(DATA / f"{case}.forward.safetensors", "pt") as file:
        kind = file.metadata()["layer"]
    held = load_file(DATA / f"{case}.forward.safetensors")
    x, y = held.pop("x"), held.pop("y")
    model = nn.ModuleDict({"block": nn.ModuleDict({"layer": LAYERS[kind]()})}).eval()
    model.load_state_dict(held if weights is None else weights)
    return model, x, y


def base_of(case, folder):
    save_file(model_of(case)[0].state_dict(), folder / "base.safetensors", {"format": "pt"})
    return folder / "base.safetensors"


def changed(case, change, path):
    """The case's file with other options of the network."""
    with safe_open(DATA / f"{case}.adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    arguments = json.loads(metadata["ss_network_args"])
    change(arguments)
    metadata["ss_network_args"] = json.dumps(arguments)
    save_file(load_file(DATA / f"{case}.adapter.safetensors"), path, metadata)
    return path


@torch.no_grad()
@pytest.mark.parametrize("case", OPTIONS)
def test_the_forward_of_lycoris_with_options_that_no_tensor_tells(case, tmp_path):
    model, x, y = model_of(case)
    base = base_of(case, tmp_path)
    adapter = ak.read(DATA / f"{case}.adapter.safetensors", base=base)
    ak.torch.inject(model, adapter)
    torch.testing.assert_close(model.block.layer(x), y, rtol=1e-5, atol=1e-5)
    ak.merge(base, adapter, tmp_path / "merged.safetensors")
    merged = model_of(case, load_file(tmp_path / "merged.safetensors"))[0]
    torch.testing.assert_close(merged.block.layer(x), y, rtol=1e-5, atol=1e-5)
    formula = ak.read(DATA / f"{case}.adapter.safetensors", base=base, compat="formula")
    other = model_of(case)[0]
    ak.torch.inject(other, formula)
    assert not torch.allclose(other.block.layer(x), y, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compat", [None, "formula"])
@pytest.mark.parametrize("case", CASES)
def test_what_lycoris_wrote_is_written_back(case, compat, tmp_path):
    path = DATA / f"{case}.adapter.safetensors"
    ak.write(ak.read(path, base=base_of(case, tmp_path), compat=compat), tmp_path / "again.safetensors", "lycoris")
    with safe_open(path, "pt") as one, safe_open(tmp_path / "again.safetensors", "pt") as other:
        assert one.metadata() == other.metadata()
    one, other = load_file(path), load_file(tmp_path / "again.safetensors")
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert torch.equal(tensor, other[key])


@torch.no_grad()
def test_a_change_reads_zeros_around_the_input_of_a_padded_convolution(tmp_path):
    model, x, y = model_of(REFLECT)
    path = DATA / f"{REFLECT}.adapter.safetensors"
    ak.torch.inject(model, ak.read(path, base=base_of(REFLECT, tmp_path)))
    torch.testing.assert_close(model.block.layer(x), y, rtol=1e-5, atol=1e-5)
    other = model_of(REFLECT)[0]
    ak.torch.inject(other, ak.read(path, base=base_of(REFLECT, tmp_path), compat="formula"))
    assert not torch.allclose(other.block.layer(x), y, rtol=1e-2, atol=1e-2)


def test_other_methods_at_a_padded_convolution_are_refused(tmp_path):
    model = model_of("loha_dora_bypass-conv2d_k3")[0]
    adapter = ak.read(
        DATA / "loha_dora_bypass-conv2d_k3.adapter.safetensors", base=base_of("loha_dora_bypass-conv2d_k3", tmp_path)
    )
    model.block.layer.padding_mode = "circular"
    with pytest.raises(Unsupported, match=r"loha on a convolution with padding_mode='circular'") as raised:
        ak.torch.inject(model, adapter)
    assert "--compat formula" in raised.value.cure


@torch.no_grad()
@pytest.mark.parametrize("said", ["False", "false", False])
def test_an_option_that_is_off_is_as_if_it_were_not_there(said, tmp_path):
    case = "diag-oft_bypass-linear"
    path = changed(case, lambda arguments: arguments.update(bypass_mode=said), tmp_path / "off.safetensors")
    (found,) = ak.read(path, base=base_of(case, tmp_path)).updates.values()
    assert not found[0].on_output


@pytest.mark.parametrize("text", ["{", "[]", '{"algo": 1, "block_size": "x"}', ""])
def test_arguments_that_are_none_are_kept_and_mean_nothing(text, tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"ss_network_module": "lycoris.kohya", "ss_network_args": text}
    save_file(load_file(DATA / "dylora-linear.adapter.safetensors"), path, metadata)
    adapter = ak.read(path, base=base_of("dylora-linear", tmp_path))
    (found,) = adapter.updates.values()
    assert found[0].scaling == 3 / 8
    ak.write(adapter, tmp_path / "again.safetensors", "lycoris")
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_a_bias_that_is_turned_is_not_written_where_no_option_says_so(tmp_path):
    """LyCORIS turns the bias in bypass mode alone; its own loader does not know of the mode."""
    case = "diag-oft_bypass-linear"
    base = base_of(case, tmp_path)
    adapter = ak.read(DATA / f"{case}.adapter.safetensors", base=base)
    with pytest.raises(Unrepresentable, match="oft changes the bias, but ss_network_args does not have bypass_mode"):
        ak.write(adapter.replace(foreign=None), tmp_path / "new.safetensors", "lycoris", base=base)


def test_dora_of_a_bypassed_convolution_is_refused(tmp_path):
    """LyCORIS leaves the magnitude out at plain convolutions and not at those in groups."""
    with safe_open(DATA / "lora_dora_bypass-linear.adapter.safetensors", "pt") as file:
        metadata = file.metadata()
    stem, path = "lycoris_block_layer", tmp_path / "a.safetensors"
    shapes = {"lora_down.weight": (2, 4, 3, 3), "lora_up.weight": (12, 2, 1, 1), "dora_scale": (12, 1, 1, 1)}
    tensors = {f"{stem}.{slot}": torch.ones(shape) for slot, shape in shapes.items()}
    save_file({**tensors, f"{stem}.alpha": torch.tensor(2.0)}, path, metadata)
    base = base_of("lora-conv2d_reflect", tmp_path)
    with pytest.raises(Unsupported, match="DoRA on a convolution, trained with bypass_mode") as raised:
        ak.read(path, base=base)
    assert "--compat formula" in raised.value.cure

"""ControlNets copy the first blocks of a model under its names: which of the two a LoRA is of, or a refusal."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    QwenImageControlNetModel,
    SanaControlNetModel,
    UNetMotionModel,
)
from diffusers.models.transformers.transformer_sana_wm import SanaWMTransformer3DModel
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

import adapterkit as ak
from adapterkit.errors import Unrepresentable

NETS = {
    "flux": (FluxControlNetModel, {"num_layers": 5, "num_single_layers": 10}),
    "qwen_image": (QwenImageControlNetModel, {"num_layers": 5}),
    "sana": (SanaControlNetModel, {}),
    "sd": (ControlNetModel, {}),
}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FORWARD = (".ff.", ".ff_context.", ".img_mlp.", ".mlp.")


def modules(net, chosen):
    """Module -> its weight's shape, of a model that is made without memory for its weights."""
    kind, config = NETS.get(net, (net, {}))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' own, of a class that its ControlNets import.
        model = kind(**config)
    found = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    return {name: shape for name, shape in found.items() if chosen(name)}


def attention(name):
    return name.endswith(ATTENTION)


def forward(name):
    return any(word in f".{name}." for word in FORWARD)


def lora(shapes, prefix):
    held = {}
    for name, shape in shapes.items():
        ones = [1] * (len(shape) - 2)
        held[f"{prefix}{name}.lora_A.weight"] = np.ones((1, shape[1], *shape[2:]), "f2")
        held[f"{prefix}{name}.lora_B.weight"] = np.ones((shape[0], 1, *ones), "f2")
    return held


@pytest.mark.parametrize("chosen", [attention, forward], ids=["attention", "forward"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize("net", NETS)
def test_a_lora_of_a_controlnet_gets_no_names_of_its_model(net, prefix, chosen, tmp_path):
    shapes = modules(net, chosen)
    save_file(lora(shapes, prefix), tmp_path / "a.safetensors")
    adapter = ak.read(tmp_path / "a.safetensors")
    for to in ("kohya", "diffusers"):
        with pytest.raises(Unrepresentable, match=r"--family \(family=\)") as refusal:
            ak.write(adapter, tmp_path / "b.safetensors", to)
        assert "a ControlNet of" in str(refusal.value.items)
    ak.write(adapter, tmp_path / "peft", "peft")
    assert {str(target) for target in ak.read(tmp_path / "peft").updates} == set(shapes)
    named = ak.read(tmp_path / "a.safetensors", family=f"controlnet_{net}")
    ak.write(named, tmp_path / "c.safetensors", "diffusers")
    assert load_file(tmp_path / "c.safetensors").keys() == lora(shapes, "controlnet.").keys()
    with pytest.raises(Unrepresentable):
        ak.write(named, tmp_path / "d.safetensors", "kohya")


@pytest.mark.parametrize("net", ["flux", "sana"])
def test_a_prefix_or_a_family_says_that_it_is_the_model(net, tmp_path):
    shapes = {f"transformer.{name}": shape for name, shape in modules(net, attention).items()}
    family = {"modelspec.architecture": {"flux": "flux-1-dev/lora", "sana": "sana/lora"}[net]}
    save_file(lora(shapes, ""), tmp_path / "a.safetensors", metadata=family)
    ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", "comfyui")
    bare = {name.removeprefix("transformer."): shape for name, shape in shapes.items()}
    for way, metadata, given in (("metadata", family, None), ("argument", None, net)):
        save_file(lora(bare, ""), tmp_path / f"{way}.safetensors", metadata=metadata)
        adapter = ak.read(tmp_path / f"{way}.safetensors", family=given)
        ak.write(adapter, tmp_path / f"{way}_out.safetensors", "diffusers")
        assert load_file(tmp_path / f"{way}_out.safetensors").keys() == lora(shapes, "").keys()


def test_the_part_before_the_names_is_kept(tmp_path):
    shapes = modules("flux", attention)
    save_file(lora(shapes, "controlnet."), tmp_path / "a.safetensors")
    adapter = ak.read(tmp_path / "a.safetensors")
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()
    with pytest.raises(Unrepresentable, match="its module is in a ControlNet"):
        ak.write(adapter, tmp_path / "c.safetensors", "kohya")


@pytest.mark.parametrize(
    ("kind", "outcome"),
    [("FluxControlNetModel", "controlnet."), ("FluxTransformer2DModel", "transformer."), ("New", "")],
)
def test_the_class_in_a_config_of_peft_tells_the_part(kind, outcome, tmp_path):
    shapes = {
        name: shape for name, shape in modules("flux", attention).items() if name.startswith("transformer_blocks")
    }
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(ATTENTION)}
    config["auto_mapping"] = {"base_model_class": kind, "parent_library": "diffusers.models.x"}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    save_file(lora(shapes, "base_model.model."), tmp_path / "a" / "adapter_model.safetensors")
    adapter = ak.read(tmp_path / "a")
    if not outcome:
        with pytest.raises(Unrepresentable, match="the base is a New"):
            ak.write(adapter, tmp_path / "b.safetensors", "kohya")
        return
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == lora(shapes, outcome).keys()


def test_the_feed_forward_of_sana_wm_alone_gets_no_names_of_sana_video(tmp_path):
    shapes = modules(SanaWMTransformer3DModel, lambda name: ".mlp." in name and "t_conv" not in name)
    for prefix in ("", "transformer."):
        save_file(lora(shapes, prefix), tmp_path / "a.safetensors")
        adapter = ak.read(tmp_path / "a.safetensors")
        with pytest.raises(Unrepresentable, match="SANA-WM"):
            ak.write(adapter, tmp_path / "b.safetensors", "kohya")
    ak.write(adapter, tmp_path / "b.safetensors", "diffusers")
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(tmp_path / "a.safetensors").keys()


def test_a_motion_lora_gets_diffusers_names(tmp_path):
    """AnimateDiff writes its own names of the motion modules; diffusers' script renames them as this does."""
    random = np.random.default_rng(3)
    blocks = {"down_blocks.0": 32, "up_blocks.1": 64, "mid_block": 64}
    held = {}
    for block, width in blocks.items():
        start = f"{block}.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks"
        for number in (0, 1):
            for word in ("to_q", "to_k", "to_v", "to_out"):
                stem = f"{start}.{number}.processor.{word}_lora"
                held[f"{stem}.down.weight"] = random.normal(size=(2, width)).astype("f4")
                held[f"{stem}.up.weight"] = random.normal(size=(width, 2)).astype("f4")
    save_file(held, tmp_path / "a.safetensors")
    ak.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
             "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "layers_per_block": 1, "norm_num_groups": 8,
             "cross_attention_dim": 8, "num_attention_heads": 2, "motion_num_attention_heads": 2}  # fmt: skip
    model = UNetMotionModel(**sizes)
    state = {key: torch.from_numpy(value) for key, value in load_file(tmp_path / "b.safetensors").items()}
    names = {key.removeprefix("unet.").rpartition(".lora_")[0] for key in state}
    assert len(names) == len(held) // 2
    state = {key: value for key, value in state.items() if "up_blocks" not in key}
    model.load_lora_adapter(state, prefix="unet")
    layer = dict(model.named_modules())["down_blocks.0.motion_modules.0.transformer_blocks.0.attn2.to_out.0"]
    inside = "temporal_transformer.transformer_blocks.0.attention_blocks.1"
    stem = f"down_blocks.0.motion_modules.0.{inside}.processor.to_out_lora"
    wanted = held[f"{stem}.up.weight"].astype("f8") @ held[f"{stem}.down.weight"]
    np.testing.assert_allclose(layer.get_delta_weight("default_0").detach().numpy(), wanted, atol=1e-5)


def test_a_resized_network_says_its_own_rank(tmp_path):
    """As sd-scripts' resize_lora does: `Dynamic` for several ranks; hashes of the old file are not kept."""
    random, held = np.random.default_rng(4), {}
    for stem, out in (("lora_unet_double_blocks_0_img_attn_qkv", 96), ("lora_unet_single_blocks_0_linear1", 224)):
        held[f"{stem}.lora_down.weight"] = random.normal(size=(8, 32)).astype("f4")
        held[f"{stem}.lora_up.weight"] = random.normal(size=(out, 8)).astype("f4")
        held[f"{stem}.alpha"] = np.array(4, "f4")
    told = {"ss_network_module": "networks.lora_flux", "ss_network_dim": "8", "ss_network_alpha": "4.0",
            "ss_base_model_version": "flux1", "sshs_model_hash": "a" * 64, "ss_learning_rate": "1e-4"}  # fmt: skip
    save_file(held, tmp_path / "a.safetensors", metadata=told)
    adapter = ak.read(tmp_path / "a.safetensors")
    ak.write(adapter, tmp_path / "same.safetensors", "kohya")
    assert (tmp_path / "same.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    ak.write(ak.ops.resize(adapter, rank=4), tmp_path / "b.safetensors", "kohya")
    with safe_open(tmp_path / "b.safetensors", "np") as file:
        found = file.metadata()
        ranks = {file.get_tensor(key).shape[0] for key in file.keys() if "down" in key}  # noqa: SIM118 - no mapping
        alphas = {float(file.get_tensor(key)) for key in file.keys() if key.endswith("alpha")}  # noqa: SIM118
    assert (ranks, found["ss_network_dim"]) == ({4}, "4")
    assert float(found["ss_network_alpha"]) in (alphas or {4.0})
    assert found["ss_learning_rate"] == "1e-4"
    assert "sshs_model_hash" not in found

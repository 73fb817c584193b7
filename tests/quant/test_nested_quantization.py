"""A model of several parts whose language model's config says how it is quantized, as Kimi K2.5 is published.

Its experts are whole numbers of 4 bits in compressed-tensors' layout; the adapter is PEFT's, on stacks of experts. What
the numbers mean is computed here in float64, and PEFT merges into that.
"""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText
from vision_towers import as_published, model

import adapterkit as ak
from adapterkit.errors import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")

GROUP = 8
SAID = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": True, "type": "int"},
        }
    },
}  # fmt: skip
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def packed(weight):
    """A weight `[out, in]` in 4 bits: its tensors as published, and what they mean, in float64."""
    out, columns = weight.shape
    groups = weight.reshape(out, -1, GROUP).astype(float)
    scale = (np.abs(groups).max(-1) / 7.5).astype(np.float16)
    q = np.clip(np.rint(groups / scale[..., None].astype(float)), -8, 7)
    words = ((q + 8).reshape(out, -1, 8).astype(np.uint64) << (4 * np.arange(8, dtype=np.uint64))).sum(-1)
    held = {"packed": words.astype(np.uint32).view(np.int32), "scale": scale, "shape": np.array([out, columns])}
    return held, (q * scale[..., None].astype(float)).astype(np.float16).reshape(out, columns).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kimi")
    plain = model("kimi_k25")
    plain.save_pretrained(folder / "plain")
    for name, chosen in (("adapter", ["o_proj"]), ("attention", ["o_proj"])):
        stacks = STACKS if name == "adapter" else None
        config = LoraConfig(r=2, lora_alpha=4, target_modules=chosen, target_parameters=stacks)
        tuned = get_peft_model(model("kimi_k25"), config)
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        tuned.save_pretrained(folder / name)
    stored = {as_published(name): each for name, each in load_file(folder / "plain/model.safetensors").items()}
    quantized, dense = {}, dict(stored)
    for name, weight in stored.items():
        if ".experts." not in name:
            quantized[name] = weight
            continue
        parts, dense[name] = packed(weight)
        quantized |= {f"{name}_{part}": np.ascontiguousarray(tensor) for part, tensor in parts.items()}
    config = json.loads((folder / "plain/config.json").read_text())
    for kind, tensors in (("quantized", quantized), ("dense", dense)):
        (folder / kind).mkdir()
        save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
        text = {**config["text_config"], **({"quantization_config": SAID} if kind == "quantized" else {})}
        (folder / kind / "config.json").write_text(json.dumps({**config, "text_config": text}))
    return folder


def merged_by_peft(folder, adapter):
    plain = AutoModelForImageTextToText.from_pretrained(folder / "dense", dtype=torch.float32)
    return dict(PeftModel.from_pretrained(plain, folder / adapter).merge_and_unload().named_parameters())


@pytest.mark.parametrize("adapter", ["adapter", "attention"])
def test_it_is_merged_as_peft_merges_it(folder, adapter, tmp_path):
    with pytest.raises(Unsupported, match="quantized"):
        ak.merge(folder / "quantized", folder / adapter, tmp_path / "none")
    ak.merge(folder / "quantized", folder / adapter, tmp_path / "out", quantized="dequantize", dtype="float32")
    expected = merged_by_peft(folder, adapter)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = dict(again.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=0, atol=2e-5)


def test_the_config_of_the_language_model_no_longer_says_it(folder, tmp_path):
    ak.merge(folder / "quantized", folder / "adapter", tmp_path / "out", quantized="dequantize")
    config = json.loads((tmp_path / "out/config.json").read_text())
    before = json.loads((folder / "dense/config.json").read_text())
    assert config["text_config"] == before["text_config"]
    assert "quantization_config" not in config


def test_what_is_not_adapted_stays_packed(folder, tmp_path):
    ak.merge(folder / "quantized", folder / "attention", tmp_path / "out", quantized="requantize")
    before, after = (load_file(each / "model.safetensors") for each in (folder / "quantized", tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {name for name in before if "language_model" in name and name.endswith("o_proj.weight")}
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["quantization_config"] == SAID

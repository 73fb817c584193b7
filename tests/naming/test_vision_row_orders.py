"""Vision towers whose files have queries and keys in Meta's order of rows: PEFT's adapters against PEFT's own merge.

Kimi K2.5 is published under other names than those that transformers saves it by; both are merged into here.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText
from vision_towers import as_published, model

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.binding import find_sites

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILIES = ("kimi_k25", "mistral_large4")
TARGETS = r".*\.(q_proj|k_proj|v_proj|kv_b_proj|o_proj|down_proj|fc1|proj|linear_1|in_proj)"


def write(folder, family):
    """The base, PEFT's adapter, and the base that PEFT merged it into."""
    plain = model(family)
    plain.save_pretrained(folder / "base")
    wide = {name: module for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    chosen = [name for name in wide if any(name.endswith(end) for end in TARGETS[5:-1].split("|"))]
    tuned = get_peft_model(plain, LoraConfig(r=2, lora_alpha=6, target_modules=chosen, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "peft")
    return load_file(folder / "peft/model.safetensors")


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(got[name], tensor, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tower_in_the_order_of_its_file_merges_as_peft_does(family, tmp_path):
    expected = write(tmp_path, family)
    before = load_file(tmp_path / "base/model.safetensors")
    changed = [name for name in expected if not np.array_equal(before[name], expected[name])]
    assert any("wqkv" in name or "attention.wq" in name for name in changed if "vision" in name)
    ak.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert_equal(load_file(tmp_path / "out/model.safetensors"), expected)


def test_kimi_under_its_published_names(tmp_path):
    expected = write(tmp_path, "kimi_k25")
    file = tmp_path / "base/model.safetensors"
    save_file({as_published(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert any(name.startswith("language_model.model.layers.") for name in load_file(file))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    given = dict(model("kimi_k25").named_parameters())  # transformers reads these names as the same weights.
    assert all(torch.equal(parameter, given[name]) for name, parameter in again.named_parameters())
    ak.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert_equal(
        load_file(tmp_path / "out/model.safetensors"), {as_published(name): each for name, each in expected.items()}
    )


def test_without_the_towers_heads_nothing_tells_the_order():
    lora = METHODS["lora"](A=from_numpy(np.zeros((1, 8), "f4")), B=from_numpy(np.zeros((8, 1), "f4")))
    adapter = Adapter({Target("model.vision_tower.layers.0.attn.q_proj"): (lora,)})
    shapes = {"vision_tower.encoder.blocks.0.wqkv.weight": (24, 8)}
    config = {"model_type": "kimi_k25", "text_config": {"num_attention_heads": 2, "hidden_size": 8}}
    with pytest.raises(UsageError, match="the number of its vision tower's heads"):
        find_sites(adapter, shapes, partial=False, config=config).sites[0].updates[0].B.numpy()
    config["vision_config"] = {"num_attention_heads": 2}
    assert find_sites(adapter, shapes, partial=False, config=config).sites[0].updates[0].B.numpy().shape == (8, 1)

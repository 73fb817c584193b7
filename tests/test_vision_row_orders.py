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
from transformers import AutoConfig, AutoModelForImageTextToText

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.naming.binding import find_sites

pytestmark = pytest.mark.filterwarnings("ignore")

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2, "vocab_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 4, "head_dim": 4, "index_n_heads": 2, "index_head_dim": 4,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Four heads here and two above: heads of the language model must not decide on the tower's rows.
VISION = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 2,
    "image_size": 8, "pos_emb_height": 4, "pos_emb_width": 4, "head_dim": 8,
}  # fmt: skip
FAMILIES = ("kimi_k25", "mistral_large4")
TARGETS = r".*\.(q_proj|k_proj|v_proj|kv_b_proj|o_proj|down_proj|fc1|proj|linear_1|in_proj)"


def model(family):
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    parts = {"text_config": TEXT, "vision_config": VISION}
    small = {
        name: {"model_type": getattr(known, name).model_type}
        | {key: value for key, value in fields.items() if hasattr(getattr(known, name), key)}
        for name, fields in parts.items()
    }
    config = AutoConfig.for_model(family, **small, tie_word_embeddings=False, projection_hidden_size=32)
    made = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


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


def as_published(name):
    """transformers' `save_pretrained` turns every `layers` of Kimi into `blocks`, and moves what embeds patches."""
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
    return name.replace("model.mm_projector.", "mm_projector.").replace("encoder.patch_embed", "patch_embed")


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
    with pytest.raises(UsageError, match="how many heads its vision tower has"):
        find_sites(adapter, shapes, partial=False, config=config).sites[0].updates[0].B.numpy()
    config["vision_config"] = {"num_attention_heads": 2}
    assert find_sites(adapter, shapes, partial=False, config=config).sites[0].updates[0].B.numpy().shape == (8, 1)

"""Files saved inside wrappers: FSDP, torch.compile, activation checkpointing, DistributedDataParallel, a value head.

PEFT reads the patterns of its config before a model is wrapped, so a pattern means the module whatever its key says.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.formats.peft.patterns import first_match, unwrapped

PATH = "model.layers.1.self_attn.q_proj"
BASE = "base_model.model."
KEYS = [
    "base_model.model.model.layers.1._fsdp_wrapped_module.self_attn._checkpoint_wrapped_module.q_proj",
    "base_model.model._orig_mod.model.layers.1.self_attn.q_proj",
    "_forward_module.base_model.model.model.layers.1.self_attn.q_proj",
    "base_model.model.module.model.layers.1.self_attn.q_proj",
    "module.base_model.model.model.layers.1.self_attn.q_proj",
    "pretrained_model.base_model.model.model.layers.1.self_attn.q_proj",
]
PATTERNS = [
    PATH, "layers.1.self_attn.q_proj", r"layers\.(0|1)\.self_attn\.q_proj", r"^model\.layers\.1\.self_attn\.q_proj",
    r"model\.layers\.[1-3]\..*q_proj",
]  # fmt: skip


def written(folder, config, tensors):
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(rank=2):
    random = np.random.default_rng(0)
    return random.normal(size=(rank, 4)).astype("f4"), random.normal(size=(6, rank)).astype("f4")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_counts_whatever_wrappers_put_into_the_key(key, pattern, tmp_path):
    A, B = factors(3)
    # A pattern of any q_proj comes second: the first one that fits is the one.
    config = {"alpha_pattern": {pattern: 12, "q_proj": 5}, "rank_pattern": {pattern: 3}}
    file = written(tmp_path / "a", config, {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B})
    adapter = ak.read(file)
    ((update,),) = adapter.updates.values()
    assert update.scaling == 12 / 3
    ak.write(adapter, tmp_path / "b", format="peft")
    ((again,),) = ak.read(tmp_path / "b").updates.values()
    assert again.scaling == 12 / 3


def test_a_word_of_the_model_itself_stays_one():
    assert first_match({"^module.fc": 1, "fc": 2}, "module.fc", 3) == 1
    assert first_match({"^fc": 1}, "module.fc", 3) == 1
    assert first_match({"^fc": 1}, "model.fc", 3) == 3
    assert unwrapped("model.fc") == "model.fc"


@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_other_families_of_factors(kind, tmp_path):
    random = np.random.default_rng(0)
    key = KEYS[0]
    shapes = {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}
    if kind == "LOKR":
        shapes = {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2)}
    tensors = {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    config = {"peft_type": kind, "alpha": 4, "alpha_pattern": {PATH: 12}}
    plain = written(tmp_path / "p", config, {f"{BASE}{PATH}.{name}": each for name, each in tensors.items()})
    wrapped = written(tmp_path / "w", config, {f"{key}.{name}": each for name, each in tensors.items()})
    ((expected,),), ((found,),) = (ak.read(file).updates.values() for file in (plain, wrapped))
    assert expected.attributes == found.attributes
    assert expected.attributes["scaling"] == 12 / 2


def test_inputs_that_ia3_scales(tmp_path):
    key = "base_model.model.model.layers.0.mlp._checkpoint_wrapped_module.down_proj"
    config = {"peft_type": "IA3", "target_modules": ["mlp.down_proj"], "feedforward_modules": ["mlp.down_proj"]}
    file = written(tmp_path / "a", config, {f"{key}.ia3_l": np.ones((1, 4), "f4")})
    ((update,),) = ak.read(file).updates.values()
    assert update.tensors.keys() == {"l_in"}


def test_parameters_of_experts(tmp_path):
    random = np.random.default_rng(0)
    config = {
        "target_modules": [], "target_parameters": ["model.layers.0.mlp.experts.down_proj"], "peft_version": "0.21.2",
        "alpha_pattern": {"model.layers.0.mlp.experts.down_proj": 10},
    }  # fmt: skip
    stem = "base_model.model.model.layers.0._fsdp_wrapped_module.mlp.experts"
    tensors = {"lora_A": random.normal(size=(6, 8)), "lora_B": random.normal(size=(8, 6))}
    tensors = {f"{stem}.{name}.weight": each.astype("f4") for name, each in tensors.items()}
    file = written(tmp_path / "a", config, tensors)
    ((update,),) = ak.read(file).updates.values()
    assert update.scaling == 10 / 2
    assert update.tensors["A"].shape == (3, 2, 8)
    assert load_file(file / "adapter_model.safetensors").keys() == tensors.keys()

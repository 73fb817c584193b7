"""Bases without a config.json: names and shapes prove the family, and two readings are asked about."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import adapterkit as ak
from adapterkit.errors import TargetNotFound, UsageError
from adapterkit.naming.renames import family_of, parse_renames

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "num_local_experts": 3, "num_experts": 3,
    "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2, "max_position_embeddings": 32,
    "decoder_sparse_step": 1, "n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 8,
}  # fmt: skip
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "phimoe", "gpt_oss")


def model(family):
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{key: value for key, value in SMALL.items() if hasattr(known, key)})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory):
    """A base as it is stored, its adapter of attention and experts, and the weights that PEFT makes of them."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = model(request.param)
    plain.save_pretrained(folder / "base")
    stacks = [n for n, p in plain.named_parameters() if p.ndim == 3 and n.endswith(("gate_up_proj", "down_proj"))]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=stacks)
    tuned = get_peft_model(plain, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(folder / "adapter")
    before = {name: each.detach().clone() for name, each in model(request.param).named_parameters()}
    whole = {name: each.detach().clone() for name, each in tuned.merge_and_unload().named_parameters()}
    assert sum(not torch.equal(before[name], each) for name, each in whole.items()) >= 3
    return folder, whole


@pytest.mark.parametrize("profile", [None, "peft_0.18", "vllm"])
def test_fused_experts_into_shards_without_a_config(profile, trained, tmp_path):
    folder, whole = trained
    adapter = folder / "adapter"
    if profile is not None:
        adapter = tmp_path / "adapter"
        ak.write(ak.read(folder / "adapter", base=folder / "base"), adapter, "peft", folder / "base", profile=profile)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((folder / "base/model.safetensors").read_bytes())
    report = ak.merge(bare, adapter, tmp_path / "merged")
    assert report.plan.targets >= 4
    (tmp_path / "merged/config.json").write_bytes((folder / "base/config.json").read_bytes())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, whole[name], rtol=0, atol=2e-6)


EXPERTS, OUT, IN = 3, 6, 16


def shards(folder, transposed):
    """A base of one layer's stacks without a config; `[expert, in, out]` where they are transposed."""
    random = np.random.default_rng(0)
    gate_up = random.standard_normal((EXPERTS, 2 * OUT, IN)).astype(np.float32)
    down = random.standard_normal((EXPERTS, IN, OUT)).astype(np.float32)
    folder.mkdir()
    turned = [each.transpose(0, 2, 1).copy() if transposed else each for each in (gate_up, down)]
    names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    save_file(dict(zip(names, turned, strict=True)), folder / "model.safetensors")
    return gate_up, down


def one_by_one(folder):
    """PEFT's file of an adapter on each expert, and the change of each weight by the formula in float64."""
    random, tensors, changes = np.random.default_rng(1), {}, {}
    for expert in range(EXPERTS):
        for name, out, in_ in (("gate_proj", OUT, IN), ("up_proj", OUT, IN), ("down_proj", IN, OUT)):
            path = f"base_model.model.model.layers.0.mlp.experts.{expert}.{name}"
            A, B = random.standard_normal((2, in_)), random.standard_normal((out, 2))
            tensors |= {f"{path}.lora_A.weight": A.astype(np.float32), f"{path}.lora_B.weight": B.astype(np.float32)}
            changes[expert, name] = 2.0 * B.astype(np.float32).astype(float) @ A.astype(np.float32).astype(float)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes


def merged(folder):
    held = load_file(folder / "model.safetensors")
    return [held[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")]


def expected(gate_up, down, changes, interleaved):
    gate_up, down = gate_up.astype(float), down.astype(float)
    for expert in range(EXPERTS):
        rows = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, OUT), slice(OUT, None))
        gate_up[expert][rows[0]] += changes[expert, "gate_proj"]
        gate_up[expert][rows[1]] += changes[expert, "up_proj"]
        down[expert] += changes[expert, "down_proj"]
    return gate_up, down


def test_one_reading_of_stacks_is_proven_by_their_shape(tmp_path):
    """Of the families with these names only gpt-oss interleaves gate and up, and it stores `[expert, in, out]`."""
    weights, changes = shards(tmp_path / "base", transposed=False), one_by_one(tmp_path / "adapter")
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    for got, want in zip(merged(tmp_path / "merged"), expected(*weights, changes, False), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_two_readings_are_asked_about_and_a_family_answers(tmp_path):
    weights, changes = shards(tmp_path / "base", transposed=True), one_by_one(tmp_path / "adapter")
    with pytest.raises(TargetNotFound, match=r"two families fit.*part 1 of 2 row by row as in gpt_oss") as error:
        ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert "--rename family:gpt_oss" in error.value.cure
    assert '"model_type"' in error.value.cure
    assert not (tmp_path / "merged").exists()
    for family, interleaved in (("qwen3_moe", False), ("gpt_oss", True)):
        out = tmp_path / family
        ak.merge(tmp_path / "base", tmp_path / "adapter", out, rename=f"family:{family}")
        for got, want in zip(merged(out), expected(*weights, changes, interleaved), strict=True):
            np.testing.assert_allclose(got.transpose(0, 2, 1), want, rtol=0, atol=1e-5)
        assert ak.verify(out, tmp_path / "base", tmp_path / "adapter", rename=f"family:{family}")
    other = tmp_path / "base/config.json"
    other.write_text(json.dumps({"model_type": "gpt_oss"}))
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "told")
    assert all(map(np.array_equal, merged(tmp_path / "told"), merged(tmp_path / "gpt_oss")))


def test_a_family_is_a_rule_about_a_base(tmp_path):
    one_by_one(tmp_path / "adapter")
    assert family_of(parse_renames(["a=b", "family:mixtral"], ["a"])).family == "mixtral"
    assert family_of(parse_renames("a=b")) is None
    with pytest.raises(UsageError, match="names an unknown family 'mixtrall'"):
        parse_renames("family:mixtrall")
    with pytest.raises(UsageError, match="concerns a base, but no base is read"):
        ak.ops.resize(ak.read(tmp_path / "adapter"), rank=1, rename="family:mixtral")

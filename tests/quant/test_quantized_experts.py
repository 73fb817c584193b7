"""Mixtures of experts in GPTQ and AWQ, one packed weight an expert as they are published, against PEFT and float64."""

import copy
import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import adapterkit as ak
from adapterkit.errors import Unsupported

pytestmark = pytest.mark.filterwarnings("ignore")

GROUP = 16
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "num_local_experts": 3, "num_experts": 3,
    "num_experts_per_tok": 2, "max_position_embeddings": 32, "decoder_sparse_step": 1,
}  # fmt: skip
FAMILIES = ("mixtral", "qwen3_moe")
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""AWQ's order of eight outputs in a word."""


def model(family):
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{key: value for key, value in SMALL.items() if hasattr(known, key)})
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def words(numbers):
    """Eight numbers of 4 bits a word, along the last axis, the first one lowest."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8).astype(np.uint64)
    return (eights << (4 * np.arange(8, dtype=np.uint64))).sum(-1).astype(np.uint32).view(np.int32)


def numbers(held):
    split = held.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    return split.reshape(*held.shape[:-1], -1).astype(int)


def packed(weight, kind, at=None):
    """A weight `[out, in]` in 4 bits: its tensors as published, and the weight that they mean, in float64."""
    out, in_ = weight.shape
    at = np.arange(in_) // GROUP if at is None else at
    scale, zero = np.empty((out, in_ // GROUP)), np.empty((out, in_ // GROUP), int)
    for group in range(in_ // GROUP):
        part = weight[:, at == group].astype(float)
        low, high = part.min(1), part.max(1)
        scale[:, group] = ((high - low) / 15).astype(np.float16)
        zero[:, group] = np.clip(np.rint(-low / scale[:, group]), 1, 15)
    q = np.clip(np.rint(weight / scale[:, at]) + zero[:, at], 0, 15).astype(int)
    scales = scale.T.astype(np.float16).copy()
    if kind == "awq":
        eights = [each.T.reshape(each.shape[1], -1, 8)[..., ORDER].reshape(each.shape[1], -1) for each in (q, zero)]
        held = {"qweight": words(eights[0]), "qzeros": words(eights[1]), "scales": scales}
    else:
        held = {"qweight": words(q).T.copy(), "qzeros": words(zero.T - 1), "scales": scales}
        held["g_idx"] = at.astype(np.int32)
    return held, meant(held, kind)


def meant(held, kind):
    """The published formula, in float64: `(q - zero) * scale`, as the loader's 16 bits hold it."""
    scale = held["scales"].astype(float).T
    if kind == "awq":
        eights = [numbers(held[name]).reshape(len(held[name]), -1, 8) for name in ("qweight", "qzeros")]
        q, zero = (each[..., np.argsort(ORDER)].reshape(len(each), -1).T for each in eights)
        at = np.arange(q.shape[1]) // GROUP
    else:
        q, zero, at = numbers(held["qweight"].T.copy()), numbers(held["qzeros"]).T + 1, held["g_idx"]
    return ((q - zero[:, at]) * scale[:, at]).astype(np.float16).astype(float)


def quantized(folder, kind, shuffled):
    """A quantized copy of a base, and the weights that its packed ones mean."""
    held, dense = load_file(folder / "base/model.safetensors"), {}
    out = {}
    for name, weight in held.items():
        if name.endswith("_proj.weight") or ".experts." in name:
            groups = np.arange(weight.shape[1]) // GROUP
            at = np.random.default_rng(0).permutation(groups) if shuffled else groups
            parts, dense[name] = packed(weight, kind, at)
            out |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        else:
            out[name] = weight
    (folder / "quantized").mkdir()
    save_file({name: np.ascontiguousarray(each) for name, each in out.items()}, folder / "quantized/model.safetensors")
    config = json.loads((folder / "base/config.json").read_text())
    said = {"quant_method": kind, "bits": 4, "group_size": GROUP, "version": "gemm", "desc_act": shuffled}
    (folder / "quantized/config.json").write_text(json.dumps({**config, "quantization_config": said}))
    return dense


def merged_by_peft(folder, dense):
    """What PEFT makes of the dequantized model, by the names that the base has on disk."""
    held = load_file(folder / "base/model.safetensors")
    held |= {name: np.ascontiguousarray(weight, np.float32) for name, weight in dense.items()}
    (folder / "dense").mkdir()
    save_file(held, folder / "dense/model.safetensors", {"format": "pt"})
    (folder / "dense/config.json").write_bytes((folder / "base/config.json").read_bytes())
    plain = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    whole = PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload()
    whole.save_pretrained(folder / "peft")
    return load_file(folder / "peft/model.safetensors")


KINDS = (("gptq", False), ("gptq", True), ("awq", False))
CASES = [(family, kind, shuffled) for family in FAMILIES for kind, shuffled in KINDS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]} {case[1]}{' reordered' if case[2] else ''}")
def case(request, tmp_path_factory):
    family, kind, shuffled = request.param
    folder = tmp_path_factory.mktemp("case")
    plain = model(family)
    plain.save_pretrained(folder / "base")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], target_parameters=stacks)
    tuned = get_peft_model(copy.deepcopy(plain), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(folder / "adapter")
    dense = quantized(folder, kind, shuffled)
    return kind, folder, dense, merged_by_peft(folder, dense)


def test_dequantized_experts_take_what_peft_gives_them(case, tmp_path):
    _, folder, dense, expected = case
    with pytest.raises(Unsupported, match="quantized"):
        ak.merge(folder / "quantized", folder / "adapter", tmp_path / "none")
    ak.merge(folder / "quantized", folder / "adapter", tmp_path / "out", quantized="dequantize", dtype="float32")
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == expected.keys()
    assert sum(not np.array_equal(expected[name], dense[name].astype(np.float32)) for name in dense) == 2 * (2 + 3 * 3)
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=2e-5)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")


def test_requantized_experts_are_as_near_as_a_fresh_grid(case, tmp_path):
    kind, folder, dense, expected = case
    report = ak.merge(folder / "quantized", folder / "adapter", tmp_path / "out", quantized="requantize")
    before, after = (load_file(f / "model.safetensors") for f in (folder / "quantized", tmp_path / "out"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    for name, weight in dense.items():
        stem = name.removesuffix("weight")
        parts = ("qweight", "qzeros", "scales", "g_idx")
        held = {part: after[f"{stem}{part}"] for part in parts if f"{stem}{part}" in after}
        if np.array_equal(expected[name], weight.astype(np.float32)):
            assert all(np.array_equal(before[f"{stem}{part}"], tensor) for part, tensor in held.items())
            continue
        # Requantizing may choose a fresh grid of the exact merge; it keeps the old one only where that is nearer.
        _, fresh = packed(expected[name], kind, held.get("g_idx"))
        error, least = (float(((each - expected[name]) ** 2).sum()) for each in (meant(held, kind), fresh))
        assert error <= 1.02 * least
        assert np.sqrt(error) < 0.2 * float(np.linalg.norm(expected[name]))
    assert ak.verify(tmp_path / "out", folder / "quantized", folder / "adapter")
    assert report.plan.targets == 2 * (2 + 3 * 3)


def test_the_first_weights_take_the_change_as_they_would_unquantized(case, tmp_path):
    _, folder, _, _ = case
    plain, adapter = folder / "base", folder / "adapter"
    ak.merge(folder / "quantized", adapter, tmp_path / "out", quantized="original", onto=plain)
    ak.merge(plain, adapter, tmp_path / "plain")
    got, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    assert got.keys() == expected.keys()
    assert all(np.array_equal(got[name], expected[name]) for name in got)


def test_an_adapter_of_single_experts_is_the_same(case, tmp_path):
    """The change of fused experts, written one expert after another as transformers 4 trained them."""
    _, folder, _, expected = case
    adapter = ak.read(folder / "adapter", base=folder / "base")
    ak.write(adapter, tmp_path / "single", "peft", folder / "base", profile="vllm")
    ak.merge(folder / "quantized", tmp_path / "single", tmp_path / "out", quantized="dequantize", dtype="float32")
    got = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=2e-5)


def test_mixtral_as_gptqmodel_saves_it_under_transformers_5(tmp_path):
    """GPTQModel takes the stacks of experts apart under names of its own, not those that Mixtral has on hubs."""
    plain = model("mixtral")
    plain.save_pretrained(tmp_path / "base")
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = get_peft_model(plain, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=stacks))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    dense = quantized(tmp_path, "gptq", False)
    expected = merged_by_peft(tmp_path, dense)
    words = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

    def theirs(name):
        return ".".join(words.get(word, word) for word in name.split("."))

    held = load_file(tmp_path / "quantized/model.safetensors")
    save_file({theirs(name): tensor for name, tensor in held.items()}, tmp_path / "quantized/model.safetensors")
    ak.merge(tmp_path / "quantized", tmp_path / "adapter", tmp_path / "out", quantized="dequantize", dtype="float32")
    got = load_file(tmp_path / "out/model.safetensors")
    assert got.keys() == {theirs(name) for name in expected}
    for name, tensor in expected.items():
        np.testing.assert_allclose(got[theirs(name)], tensor, rtol=0, atol=2e-5)

"""Adapters of experts in live models of transformers 5, from every layout, against PEFT's own model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.tensor([[3, 4, 1, 7, 5, 9], [3, 2, 2, 6, 7, 3]])
SMALL = {
    "hidden_size": 16, "intermediate_size": 8, "moe_intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16, "num_local_experts": 3, "num_experts": 3,
    "num_experts_per_tok": 2, "layer_types": ["full_attention"], "max_position_embeddings": 32,
    "decoder_sparse_step": 1,
}  # fmt: skip
EXPERTS = {"mixtral": "mlp.experts", "qwen3_moe": "mlp.experts", "gpt_oss": "mlp.experts",
           "granitemoe": "block_sparse_moe.experts"}  # fmt: skip
LAYOUTS = {
    "peft 0.18": ("peft", "peft_0.18"), "unsloth grouped": ("peft", "unsloth_grouped"), "sglang": ("peft", "sglang"),
    "vllm": ("peft", "vllm"), "shared outer": ("shared_outer", None), "gguf": ("gguf", None), "mlx": ("mlx", None),
}  # fmt: skip


def model(family):
    torch.manual_seed(0)
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{key: value for key, value in SMALL.items() if hasattr(known, key)})
    made = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("family", EXPERTS)
def test_every_layout_in_a_live_model_computes_what_peft_computes(family, tmp_path):
    plain = model(family)
    plain.save_pretrained(tmp_path / "base")
    parameters = [f"{EXPERTS[family]}.{name}" for name in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=parameters)
    tuned = get_peft_model(model(family), config).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(tmp_path / "peft")
    before, expected = plain(IDS).logits, tuned(IDS).logits
    assert not torch.allclose(before, expected, rtol=0.05)
    adapter = ak.read(tmp_path / "peft", base=tmp_path / "base")
    for number, (to, profile) in enumerate([("peft", None), *LAYOUTS.values()]):
        out = tmp_path / f"{number}{'.gguf' if to == 'gguf' else ''}"
        ak.write(adapter, out, to, tmp_path / "base", "promote", profile=profile)
        handle = ak.torch.inject(plain, ak.read(out, base=tmp_path / "base"))
        close(plain(IDS).logits, expected)
        handle.remove()
        assert torch.equal(plain(IDS).logits, before)


ROUTERS = {"mixtral": "mlp.gate", "qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router",
           "granitemoe": "block_sparse_moe.router"}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("kind", ["router", "whole router", "whole experts"])
def test_routers_and_whole_stacks_merge_into_a_base_as_it_is_stored(family, kind, tmp_path):
    plain = model(family)
    plain.save_pretrained(tmp_path / "base")
    chosen = {
        "router": {"target_modules": [], "target_parameters": [f"{ROUTERS[family]}.weight"]},
        "whole router": {"target_modules": ["q_proj"], "modules_to_save": [ROUTERS[family].rpartition(".")[2]]},
        "whole experts": {"target_modules": ["q_proj"], "modules_to_save": ["experts"]},
    }
    tuned = get_peft_model(model(family), LoraConfig(r=2, lora_alpha=4, **chosen[kind])).eval()
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(tmp_path / "peft")
    expected = tuned(IDS).logits
    assert not torch.allclose(plain(IDS).logits, expected, rtol=0.05)
    ak.merge(tmp_path / "base", tmp_path / "peft", tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    close(merged(IDS).logits, expected)
    ak.torch.inject(plain, ak.read(tmp_path / "peft", base=tmp_path / "base"))
    close(plain(IDS).logits, expected)


METHOD_CASES = {
    "dora": lambda e, out, in_: {"A": (e, 2, in_), "B": (e, out, 2), "magnitude": (e, out)},
    "loha": lambda e, out, in_: {"w1_a": (e, out, 2), "w1_b": (e, 2, in_), "w2_a": (e, out, 2), "w2_b": (e, 2, in_)},
    "ia3": lambda e, out, _: {"l": (e, out)},
}


@torch.no_grad()
@pytest.mark.parametrize("method", METHOD_CASES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_other_methods_on_stacks_compute_live_what_their_merge_computes(family, method, tmp_path):
    """The merged files are loaded by transformers: gpt-oss stores [in, out], gate and up interleaved, with biases."""
    torch.manual_seed(4)
    plain, layout = model(family), "e in out *k" if family == "gpt_oss" else "e out *in"
    plain.save_pretrained(tmp_path / "base")
    updates = {}
    for name, (out, in_) in {"gate_up_proj": (16, 16), "down_proj": (16, 8)}.items():
        tensors = {field: torch.rand(shape) * 0.5 + 0.2 for field, shape in METHOD_CASES[method](3, out, in_).items()}
        updates[Target(f"model.layers.0.mlp.experts.{name}", layout)] = (METHODS[method](**tensors),)
    adapter = Adapter(updates)
    ak.merge(tmp_path / "base", adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    before = plain(IDS).logits
    ak.torch.inject(plain, adapter)
    close(plain(IDS).logits, merged(IDS).logits)
    assert not torch.allclose(plain(IDS).logits, before, rtol=0.01)

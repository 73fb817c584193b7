"""Injected adapters against PEFT's own forward, and under torch's compilers."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import adapterkit as ak
from adapterkit.adapter import Adapter, Target
from adapterkit.methods import METHODS

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.tensor([[1, 5, 9], [2, 2, 7]])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


CONFIGS = {
    "llama-lora": (llama, LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)),
    "llama-dora": (llama, LoraConfig(target_modules=["v_proj"], r=4, use_dora=True, init_lora_weights=False)),
    "llama-embedding": (llama, LoraConfig(target_modules=["embed_tokens"], r=4, init_lora_weights=False)),
    "llama-ia3": (
        llama,
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    ),
    "gpt2-lora": (
        gpt2,
        LoraConfig(target_modules=["c_attn", "c_proj"], r=4, fan_in_fan_out=True, init_lora_weights=False),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_pefts(name, tmp_path):
    build, config = CONFIGS[name]
    torch.manual_seed(0)
    model = build().eval()
    theirs = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
    theirs.save_pretrained(tmp_path)
    plain = model(IDS).logits
    handle = ak.torch.inject(model, ak.read(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    handle.remove()
    assert torch.equal(model(IDS).logits, plain)


def test_what_is_created_here_is_loaded_by_peft(tmp_path):
    torch.manual_seed(0)
    model = llama().eval()
    handle = ak.torch.inject(
        model, ak.torch.create(model, "lora", targets=["q_proj", "v_proj"], rank=4), trainable=True
    )
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_()
    ak.write(handle.adapter(), tmp_path / "out", format="peft")
    mine = model(IDS).logits
    handle.remove()
    theirs = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    torch.testing.assert_close(theirs(IDS).logits, mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_compile_and_export(weight):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU()), torch.randn(3, 16)
    update = METHODS["lora"](A=torch.randn(2, 16), B=torch.randn(8, 2))
    ak.torch.inject(model, Adapter({Target("0"): (update,)}), weight=weight)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)

"""A LoRA with a bias of its own (PEFT's `lora_bias`) at layers whose base has none: refused, and the cure works."""

import pytest

import adapterkit
from adapterkit.errors import NotMergeable


@pytest.mark.filterwarnings(
    "ignore:.lora_bias", "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:.*invalid shape"
)
def test_the_cure_that_the_refusal_names_gives_pefts_logits(tmp_path):
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"], lora_bias=True, init_lora_weights=False)
    trained = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    trained.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(12).reshape(2, 6)
    expected = trained(tokens).logits
    with pytest.raises(NotMergeable, match=r"from_pretrained\(base, attention_bias=True\), then save_pretrained"):
        adapterkit.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    copy = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attention_bias=True)
    copy.save_pretrained(tmp_path / "biased")
    adapterkit.merge(tmp_path / "biased", tmp_path / "adapter", tmp_path / "merged")
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()

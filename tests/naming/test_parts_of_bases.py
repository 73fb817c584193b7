"""Models that are parts of others: classes without a head, and models with a config for each of two parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapterkit as ak
from adapterkit.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4,
    "patch_size": 2,
}  # fmt: skip
TEXT = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PIXELS = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
TOKENS = torch.tensor([[3, 1, 7]])


def drawn(model: Any) -> Any:
    """The model with random parameters, so that no layer is without effect."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def adapted(model: Any, modules: list[str], folder: Path) -> Any:
    """PEFT's model, saved."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False)).eval()
    peft.save_pretrained(str(folder))
    return peft


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT", "DeiT", "Dinov2", "IJepa"])
def test_an_adapter_of_a_class_without_a_head_fits_its_base(name: str, tmp_path: Path) -> None:
    import transformers

    model = drawn(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**SIZES)))
    model.save_pretrained(tmp_path / "base")
    peft = adapted(model, ["q_proj", "o_proj", "fc1"], tmp_path / "adapter")
    expected = peft(PIXELS).last_hidden_state
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    close(type(model).from_pretrained(tmp_path / "merged").eval()(PIXELS).last_hidden_state, expected)
    # The class with a head has the same model inside, under a name of its own.
    kind = getattr(transformers, f"{name}ForImageClassification")
    whole = drawn(kind(getattr(transformers, f"{name}Config")(**SIZES)))
    whole.save_pretrained(tmp_path / "whole")
    ak.merge(tmp_path / "whole", tmp_path / "adapter", tmp_path / "merged whole")
    again = kind.from_pretrained(tmp_path / "merged whole").eval()
    inside = getattr(whole, whole.base_model_prefix)
    expected = adapted_like(inside, tmp_path / "adapter")(PIXELS).last_hidden_state
    close(getattr(again, whole.base_model_prefix)(PIXELS).last_hidden_state, expected)


def adapted_like(model: Any, folder: Path) -> Any:
    """PEFT's model of another base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder)).eval()


@torch.no_grad()
def test_an_encoder_decoder_of_two_models_has_the_names_of_both(tmp_path: Path) -> None:
    from transformers import BertConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    parts = ViTConfig(**SIZES), BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    model = drawn(VisionEncoderDecoderModel(config))
    model.save_pretrained(tmp_path / "base")
    peft = adapted(model, ["q_proj", "fc2", "query", "intermediate.dense"], tmp_path / "adapter")
    inputs = {"pixel_values": PIXELS, "decoder_input_ids": TOKENS}
    expected = peft(**inputs).logits
    with peft.disable_adapter():
        assert not torch.allclose(peft(**inputs).logits, expected, rtol=0.01)
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again = VisionEncoderDecoderModel.from_pretrained(tmp_path / "merged").eval()
    close(again(**inputs).logits, expected)
    rules = ak.names(tmp_path / "base", tmp_path / "adapter")["rules"]
    assert any("vit" in rule["rule"] and "encoder." in rule["rule"] for rule in rules)


@torch.no_grad()
def test_two_encoders_in_one_model_have_the_names_of_both(tmp_path: Path) -> None:
    from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

    parts = ViTConfig(**SIZES), BertConfig(**TEXT)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(*parts, projection_dim=4)
    model = drawn(VisionTextDualEncoderModel(config))
    model.save_pretrained(tmp_path / "base")
    peft = adapted(model, ["k_proj", "fc1", "key"], tmp_path / "adapter")
    inputs = {"pixel_values": PIXELS, "input_ids": TOKENS}
    expected = peft(**inputs)
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = VisionTextDualEncoderModel.from_pretrained(tmp_path / "merged").eval()(**inputs)
    close(found.image_embeds, expected.image_embeds)
    close(found.text_embeds, expected.text_embeds)


def test_an_embedding_that_the_decoder_ties_to_its_head_is_not_changed_in_both_without_a_word(tmp_path: Path) -> None:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    parts = BertConfig(**TEXT), BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    model = drawn(EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*parts)))
    model.save_pretrained(tmp_path / "base")
    peft = adapted(model, ["decoder.bert.embeddings.word_embeddings"], tmp_path / "adapter")
    with pytest.raises(UsageError, match="ties its head to this embedding"):
        ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "both", tied="merge")
    live = EncoderDecoderModel.from_pretrained(tmp_path / "base").eval()
    ak.torch.inject(live, ak.read(tmp_path / "adapter", base=tmp_path / "base"))
    inputs = {"input_ids": TOKENS, "decoder_input_ids": TOKENS}
    with torch.no_grad():
        close(live(**inputs).logits, peft(**inputs).logits)

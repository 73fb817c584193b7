"""Text encoders of image and video models: CLIP, T5 and language models, in every trainer's spelling."""

import numpy as np
import pytest
from image_cases import FAMILIES, dotted, pairs, whole
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.errors import Unrepresentable

CLIP, T5 = "text_model.encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
LLM = "layers.0.self_attn.q_proj"

SPELLINGS = {
    "sdxl": {"text_encoder": (CLIP, "lora_te1", "clip_l"), "text_encoder_2": (CLIP, "lora_te2", "clip_g")},
    "flux": {"text_encoder": (CLIP, "lora_te1", "clip_l"), "text_encoder_2": (T5, "lora_te2", "t5xxl")},
    "sd3": {
        "text_encoder": (CLIP, "lora_te1", "clip_l"), "text_encoder_2": (CLIP, "lora_te2", "clip_g"),
        "text_encoder_3": (T5, "lora_te3", "t5xxl"),
    },
    "chroma": {"text_encoder": (T5, "lora_te1", "t5xxl")},
    "pixart": {"text_encoder": (T5, "lora_te1", "t5xxl")},
    "hidream": {
        "text_encoder": (CLIP, "lora_te1", "clip_l"), "text_encoder_2": (CLIP, "lora_te2", "clip_g"),
        "text_encoder_3": (T5, "lora_te3", "t5xxl"), "text_encoder_4": (LLM, "lora_te4", "llama"),
    },
    "hunyuan_video": {"text_encoder": (LLM, "lora_te1", "llama"), "text_encoder_2": (CLIP, "lora_te2", "clip_l")},
    "qwen_image": {"text_encoder": (f"model.language_model.{LLM}", "lora_te", "qwen25_7b")},
    "cosmos": {"text_encoder": (LLM, "lora_te", "qwen3_06b")},
    "lumina2": {"text_encoder": (LLM, "lora_te", "gemma2_2b")},
}  # fmt: skip
"""Family -> text encoder -> a module, and what OneTrainer, sd-scripts (Anima, Lumina 2) and ComfyUI call the encoder:
OneTrainer's `lora_text_encoders`, sd-scripts' `LORA_PREFIX_TEXT_ENCODER`, comfy/text_encoders."""


def with_encoders(name, folder):
    """A file of diffusers with modules of the transformer and of each encoder; targets -> their changes."""
    family = FAMILIES[name]
    modules = dict(list(whole(family, "diffusers").items())[:4])
    held = pairs(modules, dotted(f"{family.component}."))
    for seed, (encoder, (module, *_)) in enumerate(SPELLINGS[name].items()):
        held |= pairs({module: (8, 8)}, dotted(f"{encoder}."), seed=seed + 1)
    word = {"modelspec.architecture": family.facts.words[0]} if family.facts.words else {}
    save_file(held, folder / "a.safetensors", word)
    return ak.read(folder / "a.safetensors")


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("to", ["comfyui", "kohya", "lycoris"])
def test_encoders_go_to_every_trainer_s_spelling_and_back(name, to, tmp_path):
    adapter = with_encoders(name, tmp_path)
    assert ak.write(adapter, tmp_path / "b.safetensors", to) == []
    there = ak.read(tmp_path / "b.safetensors", to)
    assert ak.write(there, tmp_path / "c.safetensors", "diffusers") == []
    first, last = (load_file(tmp_path / f"{x}.safetensors") for x in "ac")
    encoders = [key for key in first if key.startswith("text_encoder")]
    assert encoders == [key for key in last if key.startswith("text_encoder")]
    assert all(np.array_equal(first[key], last[key]) for key in encoders)
    if to == "comfyui":
        keys = set(load_file(tmp_path / "b.safetensors"))
        for module, _, word in SPELLINGS[name].values():
            inside = f"model.{LLM}" if module.endswith(LLM) and "text_model" not in module else module
            assert f"text_encoders.{word}.transformer.{inside}.lora_down.weight" in keys


@pytest.mark.parametrize("name", SPELLINGS)
def test_encoders_in_onetrainer_s_spelling_are_read(name, tmp_path):
    family = FAMILIES[name]
    held, wanted = {}, set()
    for encoder, (module, prefix, _) in SPELLINGS[name].items():
        stem = f"{prefix}_{module.replace('.', '_')}"
        held |= pairs(
            {"": (8, 8)},
            lambda _, stem=stem: tuple(f"{stem}.{s}" for s in ("lora_down.weight", "lora_up.weight", "alpha")),
        )
        wanted.add(f"{encoder}.{module}")
    save_file(
        held,
        tmp_path / "a.safetensors",
        {"modelspec.architecture": family.facts.words[0]} if family.facts.words else {},
    )
    assert {str(target) for target in ak.read(tmp_path / "a.safetensors").updates} == wanted


def test_the_second_transformer_of_wan_has_no_word_in_one_file_of_a_trainer(tmp_path):
    held = pairs({f"{part}.blocks.0.attn1.to_q": (8, 8) for part in ("transformer", "transformer_2")}, dotted(""))
    save_file(held, tmp_path / "a.safetensors")
    for to in ("comfyui", "kohya", "lycoris"):
        with pytest.raises(Unrepresentable, match="transformer_2"):
            ak.write(ak.read(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", to)

"""Adapters that PEFT 0.18 trained under transformers 4.57, in transformers 5: merged into bases of both, and injected.

`tools/foreign/across_versions.py make` wrote the files: a tiny base, an adapter on every linear layer, and what PEFT's
model gave. It checks all other model types the same way.
"""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import adapterkit as ak

FOLDER = Path(__file__).parents[1] / "data" / "transformers4"
CLASSES = {
    "vit": transformers.ViTForImageClassification, "llava": transformers.LlavaForConditionalGeneration,
    "mixtral": transformers.MixtralForCausalLM,
}  # fmt: skip


def loaded(family, folder):
    return CLASSES[family].from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def assert_gives(model, wanted, inputs):
    with torch.no_grad():
        found = model(**inputs).logits
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@pytest.mark.parametrize("family", CLASSES)
def test_an_adapter_of_transformers_4_is_the_same_function_under_transformers_5(family, tmp_path):
    held = load_file(FOLDER / family / "outputs.safetensors")
    inputs = {name.removeprefix("inputs."): value for name, value in held.items() if name.startswith("inputs.")}
    base, adapter = FOLDER / family / "base", FOLDER / family / "adapter"
    live = loaded(family, base)
    assert_gives(live, held["plain"], inputs)
    live.save_pretrained(tmp_path / "base5")
    handle = ak.torch.inject(live, ak.read(adapter, base=base))
    assert_gives(live, held["adapted"], inputs)
    handle.remove()
    for name, one in (("4", base), ("5", tmp_path / "base5")):
        ak.merge(one, adapter, tmp_path / name)
        assert_gives(loaded(family, tmp_path / name), held["adapted"], inputs)

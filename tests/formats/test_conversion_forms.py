"""What is no plain matrix, from every format that can say it into every other: the same change, or a refusal."""

import numpy as np
import pytest
from llm_adapters import SHAPES, VECTORS, where, write_base

import adapterkit as ak
from adapterkit.errors import Unrepresentable
from adapterkit.io.computed import load
from adapterkit.io.lazy import from_numpy
from adapterkit.methods.lora import LoRA

Q, DOUBLE, SINGLE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "double_blocks", "single_blocks"
CONFIG = {
    "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4,
    "num_hidden_layers": 1, "vocab_size": 12, "intermediate_size": 24,
}  # fmt: skip
LLAMA = {f"model.layers.0.{name}.weight": shape for name, shape in SHAPES.items()} | {
    f"{name}.weight": (12, 16) for name in ("model.embed_tokens", "lm_head")
}


def lora(in_, out, rank=2, bias=False, stack=(), kernel=(), scaling=2.0):
    rng = np.random.default_rng(in_ + out)

    def normal(*shape):
        return from_numpy(rng.normal(size=(*stack, *shape)).astype("f4"))

    return LoRA(A=normal(rank, in_, *kernel), B=normal(out, rank), scaling=scaling, bias=normal(out) if bias else None)


FORMS = {
    "heads": (
        {ak.Target(f"model.layers.0.self_attn.{x}_proj"): lora(16, 16 if x == "q" else 8, scaling=1.0) for x in "qkv"},
        LLAMA,
    ),
    "embedding": ({ak.Target("model.embed_tokens", "in out *k"): lora(12, 16)}, LLAMA),
    "head": ({ak.Target("lm_head"): lora(16, 12)}, LLAMA),
    "biased": (
        {ak.Target("model.layers.0.mlp.down_proj"): lora(24, 16, bias=True)},
        LLAMA | {"model.layers.0.mlp.down_proj.bias": (16,)},
    ),
    "experts": (
        {ak.Target("model.layers.0.mlp.experts.down_proj", "e out *in"): lora(24, 16, stack=(3,))},
        LLAMA | {"model.layers.0.mlp.experts.down_proj": (3, 16, 24)},
    ),
    "convolution": (
        {ak.Target("unet.down_blocks.0.resnets.0.conv1"): lora(4, 6, kernel=(3, 3))},
        {"unet.down_blocks.0.resnets.0.conv1.weight": (6, 4, 3, 3), f"{Q}.weight": (8, 8)},
    ),
    "image_biased": (
        {ak.Target(Q): lora(8, 8, bias=True, scaling=1.0)},
        {f"{Q}.weight": (8, 8), f"{Q}.bias": (8,)},
    ),
    "fused": (
        {ak.Target(f"transformer.{DOUBLE}.0.img_attn.qkv"): lora(8, 24, scaling=1.0)},
        {f"transformer.{DOUBLE}.0.img_attn.qkv.weight": (24, 8)},
    ),
    "rows": (
        {ak.Target(f"transformer.{SINGLE}.0.linear1", rows=(0, 24)): lora(8, 24, scaling=1.0)},
        {f"transformer.{SINGLE}.0.linear1.weight": (56, 8)},
    ),
    "parts": (
        {ak.Target(f"transformer.transformer_blocks.0.attn.to_{x}"): lora(8, 8, scaling=1.0) for x in "qkv"},
        {f"transformer.transformer_blocks.0.attn.to_{x}.weight": (8, 8) for x in "qkv"},
    ),
}  # fmt: skip
"""Name -> LoRAs by target, and the base that they are of."""


def changes(adapter, base):
    """What is added to each weight, and to its bias."""
    biases: dict = {}
    for target, update in adapter:
        for field, by in (("bias", getattr(update, "scaling", 1.0)), ("d", 1.0)):  # `d` is a dense change of a bias.
            if update.tensors.get(field) is not None:
                biases[target.path] = biases.get(target.path, 0) + by * load(update.tensors[field])
    return {
        target.path: of_whole(target, adapter.delta(target.path, base).numpy()) for target in adapter.updates
    }, biases


def of_whole(target, change):
    """The change of all of a weight, where an update is of its first rows alone."""
    return change if target.rows is None else np.pad(change, ((0, 56 - target.rows[1]), (0, 0)))


def says(adapter, folder, name, base):
    try:
        ak.write(adapter, where(folder, name), name, base)
    except Unrepresentable:
        return False
    return True


OF_FLUX = ("bfl_control", "xlabs")
"""Formats whose files are of FLUX alone, which the names of some modules do not say."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_goes_from_each_into_each(form, tmp_path):
    found, shapes = FORMS[form]
    family = {"model_type": "qwen3_moe", "num_experts": 3} if form == "experts" else {}
    base = write_base(tmp_path / "base", CONFIG | family, shapes)
    adapter = ak.Adapter({target: (update,) for target, update in found.items()})
    able = [name for name in ak.FORMATS if says(adapter, tmp_path / "first" / name, name, base)]
    expected = changes(adapter.bind(base), base)
    assert {"adapterkit", "onnx_adapter"} < set(able)
    for first in able:
        read = ak.read(where(tmp_path / "first" / first, first), first, base)
        # A reader may put parts together, or take them apart: then it is another form.
        as_it_was = [(t, u.method) for t, u in read] == [(t, u.method) for t, u in adapter]
        for second in ak.FORMATS:
            there = where(tmp_path / first / second, second)
            if not says(read, tmp_path / first / second, second, base):
                assert second not in able or not as_it_was, (first, second)
                continue
            assert second in able or not as_it_was or first in OF_FLUX, (first, second)
            for got, wanted in zip(changes(ak.read(there, second, base), base), expected, strict=True):
                assert got.keys() == wanted.keys(), (first, second)
                for path, value in wanted.items():
                    assert np.abs(got[path] - value).max() <= 1e-6 * np.abs(value).max(), (first, second, path)


OWN = {"nola": "nola/value", "textual_inversion": "textual_inversion/kohya"}


@pytest.mark.parametrize("method", OWN)
def test_a_formula_of_one_format_is_refused_by_all_others_but_those_of_every_formula(method, tmp_path):
    adapter, base = (
        ak.read(VECTORS / "formats" / OWN[method] / "expected.native.safetensors"),
        VECTORS / "bases" / "llama",
    )
    for name, form in ak.FORMATS.items():
        there = where(tmp_path / name, name)
        if name != "nola" and {update.method for _, update in adapter} <= form.methods:
            ak.write(adapter, there, name)
            assert [u.method for _, u in ak.read(there, name)] == [u.method for _, u in adapter]
        else:
            with pytest.raises(Unrepresentable):
                ak.write(adapter, there, name, base)

"""PEFT's configs state one layout for all modules; a model may have Linear and Conv1D layers with square weights."""

import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
)
from transformers.pytorch_utils import Conv1D

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, TargetNotFound, UsageError


def encoder_decoder():
    """BERT, whose layers are Linear, and GPT-2, whose layers are Conv1D, in one model."""
    bert = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, vocab_size=20,
        max_position_embeddings=16,
    )  # fmt: skip
    gpt2 = GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16, add_cross_attention=True, is_decoder=True
    )
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert, gpt2)).eval()


class Block(nn.Module):
    """One layer of each kind; PEFT adapts them in the order in which they are defined."""

    def __init__(self, *names):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(8, 8) if name.startswith("lin") else Conv1D(8, 8))


class Blocks(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.h = nn.ModuleList([Block(*names)])


def trained(model, targets, out, config=None):
    """Save the base and PEFT's adapter, and return PEFT's merged weights and the `fan_in_fan_out` that PEFT stored."""
    (out / "base").mkdir()
    state = model.state_dict()
    tied = {"decoder.lm_head.weight", "language_model.lm_head.weight"} & set(state)
    save_file({k: v.clone() for k, v in state.items() if k not in tied}, out / "base" / "model.safetensors")
    if config is not None:
        (out / "base" / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it corrects fan_in_fan_out
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        tuned.save_pretrained(out / "adapter")
    stored = json.loads((out / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    return tuned.merge_and_unload().state_dict(), stored


def check_merged(out, wanted, **options):
    ak.merge(out / "base", [out / "adapter"], out / "merged", **options)
    merged = load_file(out / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("known", [True, False], ids=["with a config", "without a config"])
@pytest.mark.parametrize(
    "targets",
    [["query", "c_proj"], ["query", "c_attn"], ["query", "q_attn"], "all-linear", ["dense", "c_proj"]],
    ids=str,
)
def test_both_kinds_in_an_encoder_decoder_are_merged_as_peft_merges_them(known, targets, tmp_path):
    model = encoder_decoder()
    wanted, turned = trained(model, targets, tmp_path, model.config.to_dict() if known else None)
    assert turned
    check_merged(tmp_path, wanted)


@pytest.mark.parametrize("names", [["lin", "c_proj"], ["c_proj", "lin"], ["lin", "conv"]], ids=str)
def test_a_layout_that_nothing_proves_is_refused_until_a_rule_states_it(names, tmp_path):
    wanted, turned = trained(Blocks(*names), names, tmp_path)
    assert turned == (names[-1] != "lin")
    with pytest.raises(ShapeMismatch, match=r"\[out, in\] or \[in, out\]") as raised:
        check_merged(tmp_path, wanted)
    assert "--rename 'out_in:h.0." in raised.value.cure
    check_merged(tmp_path, wanted, rename=["out_in:*.lin", "in_out:*.c*"])


def test_a_rule_for_layouts_needs_modules(tmp_path):
    trained(Blocks("lin"), ["lin"], tmp_path)
    with pytest.raises(UsageError, match="names no module"):
        ak.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", rename="in_out:")


@pytest.mark.parametrize("rule", ["in_out:*.c_porj", "out_in:h.0", "in_out:lin"])
def test_a_rule_for_layouts_that_matches_no_module_is_refused(rule, tmp_path):
    model = Blocks("lin")
    trained(model, ["lin"], tmp_path)
    adapter = ak.read(tmp_path / "adapter")
    merged = tmp_path / "merged"
    with pytest.raises(TargetNotFound, match=f"{re.escape(repr(rule))} matches no target"):
        ak.merge(tmp_path / "base", adapter, merged, rename=["out_in:*.lin", rule])
    with pytest.raises(TargetNotFound, match="matches no target"):
        ak.ops.extract(tmp_path / "base", tmp_path / "base", rank=1, rename=rule)


def test_a_rule_for_layouts_may_name_the_modules_of_the_base_or_the_adapter(tmp_path):
    """The base's names have a prefix that the adapter's names lack."""
    wanted, _ = trained(Blocks("lin"), ["lin"], tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    for number, rule in enumerate(("out_in:model.h.*.lin", "out_in:h.*.lin")):
        ak.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / str(number), rename=rule)
        for name, tensor in load_file(tmp_path / str(number) / "model.safetensors").items():
            torch.testing.assert_close(tensor, wanted[name.removeprefix("model.")])


def test_layers_around_a_text_model_of_conv1d_are_linear(tmp_path):
    """PEFT states [in, out] for all modules of BLIP-2 with GPT-2; only those of GPT-2 are stored so."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = Blip2Config(
        vision_config={**sizes, "image_size": 8, "patch_size": 4},
        qformer_config={**sizes, "vocab_size": 20, "encoder_hidden_size": 8},
        text_config=GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=16).to_dict(),
        num_query_tokens=2,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config)
    names = ["language_projection", "c_proj", "qkv", "projection", "query"]
    wanted, stated = trained(model, names, tmp_path, config.to_dict())
    assert stated
    ak.merge(tmp_path / "base", tmp_path / "adapter", out=tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


GPT2 = {
    "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,), "h.0.attn.c_proj.weight": (8, 8),
    "h.0.attn.c_proj.bias": (8,), "h.0.mlp.c_fc.weight": (8, 32), "h.0.mlp.c_fc.bias": (32,),
}  # fmt: skip
LINEAR = {name: shape[::-1] for name, shape in GPT2.items()}


@pytest.mark.parametrize("changed", ["", "c_proj.weight", "c_attn"], ids=["all", "square", "bias and weight"])
@pytest.mark.parametrize(
    ("shapes", "config", "prefix", "in_out"),
    [
        (GPT2, None, "", True),
        (LINEAR, None, "", False),
        (GPT2, {"model_type": "of_no_family"}, "transformer.", True),
        (GPT2, {"model_type": "llava", "text_config": {"model_type": "gpt2"}}, "model.language_model.", True),
    ],
    ids=["Conv1D", "Linear", "unknown family", "text model"],
)
def test_extract_states_the_layout_of_weights_without_a_known_family(tmp_path, shapes, config, prefix, in_out, changed):
    """Merges of the extracted adapter, and of its PEFT folder, restore the tuned model; A reads the layer's inputs."""
    torch.manual_seed(0)
    base = {prefix + name: torch.randn(shape) for name, shape in shapes.items()}
    tuned = {name: value + (changed in name) * torch.randn(value.shape) for name, value in base.items()}
    tuned[f"{prefix}h.0.attn.c_proj.weight"][:, 1:] = base[f"{prefix}h.0.attn.c_proj.weight"][:, 1:]
    for folder, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        if config:
            (tmp_path / folder / "config.json").write_text(json.dumps(config))
    adapter = ak.ops.extract(tmp_path / "tuned", tmp_path / "base", energy=1.0)
    for target, updates in adapter.updates.items():
        assert target.layout == ("in out *k" if in_out else "out *in"), target
        sizes = {update.A.shape[1] for update in updates if update.method == "lora"}
        weight = base[f"{target.path}.weight"]
        assert sizes <= {weight.shape[0 if in_out else 1]}
    ak.write(adapter, tmp_path / "peft", format="peft")
    for number, source in enumerate((adapter, tmp_path / "peft")):
        ak.merge(tmp_path / "base", source, out=tmp_path / str(number))
        merged = load_file(tmp_path / str(number) / "model.safetensors")
        for name, value in tuned.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_extract_takes_a_stated_layout(tmp_path):
    """Without biases, a square weight does not show its layout."""
    for seed, folder in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        (tmp_path / folder).mkdir()
        save_file({"h.0.c_proj.weight": torch.randn(8, 8)}, tmp_path / folder / "model.safetensors")
    for rule, layout in (("in_out:*.c_proj", "in out *k"), ("out_in:*.c_proj", "out *in")):
        adapter = ak.ops.extract(tmp_path / "tuned", tmp_path / "base", energy=1.0, rename=rule)
        assert [target.layout for target in adapter.updates] == [layout]

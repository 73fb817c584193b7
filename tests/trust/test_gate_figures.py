"""The gate's figures against PEFT's own models and plain numpy; its inputs, thresholds, errors and command."""

from __future__ import annotations

import json
import math
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from gated_models import lora, make, model_of, scaled, world
from peft import IA3Config, LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import adapterkit as ak
from adapterkit.errors import CheckFailed, Malformed, Unsupported, UsageError
from adapterkit.gating.models import texts_of
from adapterkit.gating.result import AdapterEffect, KeptEffect, ModulePart, Thresholds, checks_of
from adapterkit.gating.runner import null_adapter
from adapterkit.io.checkpoint import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

FAST: dict[str, Any] = {"texts": 2, "length": 12, "new_tokens": 0, "null": False, "device": "cpu"}
SMALL = ["--texts", "2", "--length", "12", "--new-tokens", "0", "--no-null"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("figures"))


def with_tokenizer(folder: Path) -> Path:
    """Bytes as tokens: 96 of them, so any text in ASCII has some."""
    words = {chr(32 + at): at for at in range(95)} | {"?u": 95}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?u"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?u").save_pretrained(folder)
    return folder


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits - logits.max(-1, keepdims=True)
    return top - np.log(np.exp(top).sum(-1, keepdims=True))


def test_the_figures_are_those_of_pefts_model_in_numpy(tmp_path: Path) -> None:
    base = with_tokenizer(make("llama", tmp_path / "base"))
    model = get_peft_model(model_of(base), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "texts.txt").write_text("The cat sat on a mat.\n\nWhere is the key? Here.\n")
    data = tmp_path / "texts.txt"
    found = ak.gate(base, tmp_path / "adapter", merged=base, data=data, length=16, new_tokens=6)
    kl, back, nll, plain, count = 0.0, 0.0, 0.0, 0.0, 0
    texts: list[list[list[int]]] = [[], []]
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for line in ("The cat sat on a mat.", "Where is the key? Here."):
        ids = torch.tensor([[ord(c) - 32 for c in line[:16]]])
        with torch.no_grad(), model.disable_adapter():
            p = log_softmax(model(ids).logits[0].double().numpy())
            texts[0].append(model.generate(input_ids=ids[:, :8], **greedy)[0, 8:].tolist())
        with torch.no_grad():
            q = log_softmax(model(ids).logits[0].double().numpy())
            texts[1].append(model.generate(input_ids=ids[:, :8], **greedy)[0, 8:].tolist())
        kl, back, count = kl + (np.exp(p) * (p - q)).sum(), back + (np.exp(q) * (q - p)).sum(), count + len(p)
        nll -= sum(q[at, ids[0, at + 1]] for at in range(15))
        plain -= sum(p[at, ids[0, at + 1]] for at in range(15))
    assert found.effect.divergence == pytest.approx(kl / count, rel=1e-4)
    assert found.effect.perplexity == pytest.approx(math.exp(nll / 30), rel=1e-4)
    assert found.effect.perplexity_base == pytest.approx(math.exp(plain / 30), rel=1e-4)
    assert found.merged is not None
    assert found.merged.divergence == pytest.approx(back / count, rel=1e-4)
    assert found.merged.kept == pytest.approx(0, abs=1e-6)
    assert found.merged.scale == pytest.approx(0, abs=1e-6)
    same = [next((at for at in range(6) if one[at] != two[at]), 6) for one, two in zip(*texts, strict=True)]
    assert found.effect.agreement == sum(same) / 12
    assert found.data == "2 given texts"


def test_the_null_adapter_has_the_norm_of_the_change(root: str) -> None:
    base, first = world("mixtral", root)
    second = lora("mixtral", model_of(base), seed=2)
    null = null_adapter([first, second], open_checkpoint(base), weights=[1.0, -0.5], seed=0, rename=())
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.down_proj"):
        wanted = first.delta(path) - 0.5 * second.delta(path)
        drawn = [null.delta(target.path) for target in null.updates if "layers.0.self_attn.q" in target.path]
        if "q_proj" in path:
            assert float(drawn[0].norm()) == pytest.approx(float(wanted.norm()), rel=1e-5)
            assert abs(float((drawn[0] * wanted).sum())) < 0.5 * float(wanted.norm()) ** 2
    experts = [
        null.delta(target.path).norm() for target in null.updates if "layers.1." in target.path and ".w2" in target.path
    ]
    wanted = first.delta("model.layers.1.mlp.experts.down_proj") - 0.5 * second.delta(
        "model.layers.1.mlp.experts.down_proj"
    )
    assert [float(each) for each in experts] == pytest.approx(wanted.flatten(1).norm(dim=1).tolist(), rel=1e-5)


def test_the_null_adapter_of_scales_and_biases(root: str, tmp_path: Path) -> None:
    base, _ = world("qwen2", root)
    for at, config in enumerate(
        (
            IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
            LoraConfig(r=2, target_modules=["q_proj"], bias="lora_only", use_dora=True),
        )
    ):
        model = get_peft_model(model_of(base), copy(config))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / str(at))
        merged = model.merge_and_unload().state_dict()
        adapter = ak.read(tmp_path / str(at), base=base)
        null = null_adapter([adapter], open_checkpoint(base), weights=[1.0], seed=0, rename=())
        before = model_of(base).state_dict()
        name = "model.layers.1.self_attn.q_proj"
        wanted = float((merged[f"{name}.weight"] - before[f"{name}.weight"]).norm())
        assert float(null.delta(name).norm()) == pytest.approx(wanted, rel=1e-4)
        bias = float((merged[f"{name}.bias"] - before[f"{name}.bias"]).norm())
        drawn = [update.d for target, update in null if target.path == name and getattr(update, "d", None) is not None]
        assert [float(each.norm()) for each in drawn] == pytest.approx([bias] if bias else [], rel=1e-4)


def test_the_same_call_gives_the_same_record(root: str) -> None:
    base, adapter = world("bert", root)
    one, two = (ak.gate(base, adapter, **FAST | {"null": True}).record() | {"seconds": 0} for _ in range(2))
    assert one == two
    assert one["effect"]["null"] > 0
    other = ak.gate(base, adapter, **FAST | {"null": True}, seed=1)
    assert other.effect.null != one["effect"]["null"]


def test_texts_of_files(tmp_path: Path) -> None:
    assert texts_of("builtin") is None
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two"]
    for content, match in (('{"words": 1}', 'no field "text"'), ("{", "not JSON")):
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(Malformed, match=match) as raised:
            texts_of(tmp_path / "b.jsonl")
        assert raised.value.where == "line 1"
    (tmp_path / "c.txt").write_text("\n \n")
    with pytest.raises(UsageError, match="contains no texts"):
        texts_of(tmp_path / "c.txt")


def test_built_in_texts_are_read_by_the_bases_tokenizer(tmp_path: Path) -> None:
    base = with_tokenizer(make("llama", tmp_path / "base"))
    found = ak.gate(base, lora("llama", model_of(base)), **FAST)
    assert found.data == "2 built-in texts"
    assert found.outcome == "passed"


def test_wrong_calls_are_refused_with_a_cure(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = world("llama", root)
    (tmp_path / "t.txt").write_text("some text\n")
    plain = make("llama", tmp_path / "plain")
    (plain / "config.json").rename(tmp_path / "away")
    for error, match, call in (
        (UsageError, "no adapter", lambda: ak.gate(base, [])),
        (UsageError, "2 weights for 1", lambda: ak.gate(base, adapter, weights=[1, 2])),
        (UsageError, "unknown dtype", lambda: ak.gate(base, adapter, dtype="int8")),
        (UsageError, "texts must be at least 1", lambda: ak.gate(base, adapter, texts=0)),
        (UsageError, "texts 2.5 is not a whole number", lambda: ak.gate(base, adapter, texts=2.5)),
        (UsageError, "length '9' is not a whole number", lambda: ak.gate(base, adapter, length="9")),
        (UsageError, "min_kept '0.9' is not a number", lambda: ak.gate(base, adapter, min_kept="0.9")),
        (UsageError, "min_effect None is not a number", lambda: ak.gate(base, adapter, min_effect=None)),
        (UsageError, "max_perplexity nan is not a number", lambda: ak.gate(base, adapter, max_perplexity=math.nan)),
        (UsageError, "has no tokenizer", lambda: ak.gate(base, adapter, data=tmp_path / "t.txt")),
        (UsageError, "graph does not exist", lambda: ak.gate(base, adapter, onnx=tmp_path / "none.onnx")),
        (UsageError, "a single weight file", lambda: ak.gate(base / "model.safetensors", adapter)),
        (Malformed, "no config.json", lambda: ak.gate(plain, adapter)),
    ):
        with pytest.raises(error, match=match) as raised:
            call()
        assert raised.value.cure
    monkeypatch.setattr("adapterkit.torch.pretrained.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="needs transformers") as raised:
        ak.gate(base, adapter)
    assert raised.value.cure == "pip install 'adapterkit[transformers]'"


def test_thresholds_that_are_asked_for(root: str) -> None:
    base, adapter = world("llama", root)
    more = FAST | {"null": True, "new_tokens": 4}
    found = ak.gate(base, adapter, merged=base, min_agreement=0.9, max_perplexity=0.5, min_over_null=50.0, **more)
    failed = {check.name for check in found.checks if check.ok is False}
    assert {"agreement", "perplexity", "over null", "kept", "scale", "modules"} <= failed
    found = ak.gate(base, adapter, min_over_null=1.0, **FAST)
    assert found.outcome == "inconclusive", "no null adapter was asked for"
    assert "1 " not in repr(found)
    assert found._repr_html_().count("<tr>") == 1 + len(found.checks)


def test_an_effect_that_is_too_small_cannot_be_judged(root: str) -> None:
    base, adapter = world("llama", root)
    found = ak.gate(base, scaled(adapter, 1e-6), merged=base, min_effect=0.0, **FAST)
    assert found.outcome == "inconclusive", found.verdicts


def test_rounding_that_eats_a_weak_change_is_told(root: str, tmp_path: Path) -> None:
    """In bfloat16 a step is 0.4 to 0.8 % of a number, so a change of 0.05 % is mostly lost."""
    base, adapter = world("llama", root, "bfloat16")
    ak.merge(base, scaled(adapter, 1 / 300), tmp_path / "merged")
    found = ak.gate(base, scaled(adapter, 1 / 300), merged=tmp_path / "merged", **FAST)
    assert found.outcome == "failed"
    assert any("rounding" in verdict for verdict in found.verdicts), found.verdicts
    assert found.merged is not None
    assert not found.merged.faults


@pytest.mark.parametrize("weight", [1.0, 2.0, 0.0])
def test_a_packed_merge_is_read_as_the_numbers_that_it_stands_for(root: str, tmp_path: Path, weight: float) -> None:
    base, adapter = world("llama", root)
    from safetensors.torch import load_file, save_file

    ak.merge(base, adapter, tmp_path / "merged", dtype="BF16", weights=[weight])
    file = tmp_path / "merged" / "model.safetensors"
    tensors = {}
    for name, value in load_file(file).items():
        if "_proj" not in name:
            tensors[name] = value
            continue
        scale = value.float().abs().amax(1, keepdim=True) / 448
        tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, file, {"format": "pt"})
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups,
        "ignore": ["lm_head"],
    }  # fmt: skip
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    found = ak.gate(base, adapter, merged=tmp_path / "merged", **FAST)
    assert found.merged is not None
    assert found.merged.dtype == "quantized"
    assert found.merged.scale == pytest.approx(weight, abs=0.05)
    assert found.outcome == ("passed" if weight == 1 else "failed"), found.verdicts
    words = {1.0: "% of the effect", 2.0: "twice the change", 0.0: "equals the base"}
    assert any(words[weight] in verdict for verdict in found.verdicts), found.verdicts


def test_models_that_cannot_be_run_are_refused(tmp_path: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = WhisperConfig(
        **sizes, decoder_attention_heads=2, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "whisper")
    made = ak.torch.create(model, "lora", targets=["*.q_proj"], rank=2)
    with pytest.raises(Unsupported, match="reads input_features"):
        ak.gate(tmp_path / "whisper", made, **FAST)


def test_the_command(root: str, tmp_path: Path) -> None:
    base, adapter = world("bert", root)
    ak.write(adapter, tmp_path / "lora.safetensors", format="adapterkit")
    ak.merge(base, tmp_path / "lora.safetensors", tmp_path / "merged")
    passed = run("gate", base, tmp_path / "lora.safetensors", "--merged", tmp_path / "merged", *SMALL)
    assert passed.exit_code == 0, passed.output
    assert "keeps 100 % of the effect" in passed.stdout
    assert "passed: 1 adapter" in passed.stdout
    failed = run("gate", base, tmp_path / "lora.safetensors", "--merged", base, *SMALL, "--json")
    assert failed.exit_code == 1
    told = json.loads(failed.stdout)
    assert (told["outcome"], told["verdicts"][0]) == (
        "failed",
        "the merged model equals the base: it contains none of the change",
    )
    unknown = run("gate", base, tmp_path / "lora.safetensors", *SMALL, "--min-over-null", "1")
    assert unknown.exit_code == 3, unknown.output
    assert run("gate", base, *SMALL).exit_code == 2
    assert run("gate", base, tmp_path / "none", *SMALL).exit_code == 6


def test_another_base_is_a_warning_or_refused(root: str, tmp_path: Path) -> None:
    base, _ = world("llama", root)
    model = get_peft_model(model_of(base), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/one"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    held = json.loads((base / "config.json").read_text())
    other = make("llama", tmp_path / "other", seed=3)
    (other / "config.json").write_text(json.dumps(held | {"_name_or_path": "org/two"}))
    assert "org/one" in ak.gate(other, tmp_path / "adapter", **FAST).warnings[0]
    with pytest.raises(CheckFailed, match="org/one"):
        ak.gate(other, tmp_path / "adapter", strict_base=True, **FAST)


@pytest.mark.parametrize(
    ("rounded", "fault", "kept", "ok"),
    [
        (True, "", 0.995, True),
        (False, "", 0.995, False),
        (True, "scale x 0.9", 0.995, False),
        (True, "", 0.5, False),
    ],
)
def test_a_scale_that_rounding_explains_passes(rounded: bool, fault: str, kept: float, ok: bool) -> None:
    """SmolLM2 in bfloat16 kept 99.5 % of a LoRA's effect and 90 % of its size: small numbers were lost."""
    effect = AdapterEffect(0.5, "nats per token", None, None, None, None, None, finite=True)
    part = ModulePart("layers.0.q_proj", touched=True, scale=0.9, error=0.4, finite=True, fault=fault, rounded=rounded)
    merged = KeptEffect("merged", "m", divergence=0.002, kept=kept, scale=0.9 - 1e-3, dtype="BF16", parts=(part,))
    (scale,) = (check for check in checks_of(effect, [merged], Thresholds()) if check.name == "scale")
    assert scale.ok is ok
    assert ("rounding to BF16" in scale.text) is ok

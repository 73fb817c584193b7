"""Vocabularies that grew, shrank or are padded: merged models compute what PEFT computed on the resized model."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.errors import ShapeMismatch, UsageError

ROWS, MORE = 64, 67
TOKENS = torch.tensor([[1, 2, 64, 7, 66, 0, 65]])
OLD_TOKENS = torch.tensor([[1, 2, 5, 7, 3, 0]])


def llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": ROWS, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=ROWS, n_positions=8, n_embd=8, n_layer=1, n_head=2))


BASES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "tied": (lambda: llama(True), "embed_tokens", "q_proj"),
    "untied": (lambda: llama(False), "embed_tokens", "q_proj"),
    "gpt2": (gpt2, "wte", "c_attn"),
}
"""Name -> the model, its embedding, a layer inside."""


def lora(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=4, **settings)


def token_rows(E: str, numbers: list[int]) -> Any:
    from peft import TrainableTokensConfig

    return TrainableTokensConfig(target_modules=[E], token_indices=numbers)


CONFIGS: dict[str, Callable[[str, str], Any]] = {
    "plain": lambda _, Q: lora(target_modules=[Q]),
    "saved both": lambda E, Q: lora(target_modules=[Q], modules_to_save=[E, "lm_head"]),
    "saved head": lambda _, Q: lora(target_modules=[Q], modules_to_save=["lm_head"]),
    "saved embedding, tied": lambda E, Q: lora(target_modules=[Q], modules_to_save=[E], ensure_weight_tying=True),
    "embedding": lambda E, Q: lora(target_modules=[Q, E]),
    "embedding and head": lambda E, Q: lora(target_modules=[Q, E, "lm_head"]),
    "token rows": lambda _, Q: lora(target_modules=[Q], trainable_token_indices=[3, 64, 65, 66]),
    "token rows of a dict": lambda E, Q: lora(target_modules=[Q], trainable_token_indices={E: [3, 64, 66]}),
    "token rows alone": lambda E, _: token_rows(E, [64, 65, 66]),
}

INCOMPLETE = {("untied", "embedding"), ("untied", "token rows alone")}
"""Files in which PEFT leaves the new rows of the untied head out."""


def saved_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    BASES[kind][0]().save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trained(base: Path, out: Path, config: Any, rows: int = MORE, fill: str | None = None, **saving: Any) -> Any:
    """A PEFT model on the resized base, trained and saved by PEFT; with `fill`, new rows are the mean of the others."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = loaded(base)
        torch.manual_seed(1)
        model.resize_token_embeddings(rows)
        if fill == "mean":
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                layer.weight.data[ROWS:] = layer.weight.data[:ROWS].mean(0)
        peft = get_peft_model(model, config)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        peft.save_pretrained(out, **saving)
    return peft.eval()


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_merges_an_adapter_with_added_tokens(kind: str, name: str, tmp_path: Path) -> None:
    base = saved_base(kind, tmp_path / "base")
    incomplete = (kind, name) in INCOMPLETE
    config = CONFIGS[name](*BASES[kind][1:])
    model = trained(base, tmp_path / "a", config, fill="mean" if incomplete else None)
    if incomplete:
        with pytest.raises(ShapeMismatch, match=r"67 rows.*the base has 64") as refusal:
            ak.merge(base, tmp_path / "a", tmp_path / "out")
        assert '--vocab grow (vocab="grow")' in str(refusal.value.cure)
        assert '--vocab keep (vocab="keep")' in str(refusal.value.cure)
    report = ak.merge(base, tmp_path / "a", tmp_path / "out", vocab="grow" if incomplete else None)
    assert any("grows from 64 to 67 rows" in warning for warning in report.plan.warnings)
    assert ("mean of the base's rows" in str(report.plan.warnings)) == incomplete
    merged = loaded(tmp_path / "out")
    assert merged.config.vocab_size == MORE
    assert_close(logits(merged), logits(model))
    assert ak.verify(tmp_path / "out", base, tmp_path / "a").ok


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", CONFIGS)
def test_reads_files_of_a_resized_model_as_peft_reloads_them(kind: str, name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = saved_base(kind, tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS[name](*BASES[kind][1:]))
    grown = loaded(base)
    grown.resize_token_embeddings(MORE)
    grown.save_pretrained(tmp_path / "grown")
    # Copies that PEFT does not compute with are changed, so that reading them would show. On a tied base PEFT loads
    # `lm_head.original_module` into the shared embedding.
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if ".modules_to_save." in key or (".original_module." in key and kind == "untied"):
            tensors[key] = tensors[key] + 1
    save_file(tensors, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(PeftModel.from_pretrained(loaded(tmp_path / "grown"), tmp_path / "a").eval())
    report = ak.merge(tmp_path / "grown", tmp_path / "a", tmp_path / "out")
    assert not any("vocabulary" in warning for warning in report.plan.warnings)
    assert_close(logits(loaded(tmp_path / "out")), expected)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", ["embedding and head", "token rows", "plain"])
def test_keep_leaves_the_added_tokens_out(kind: str, name: str, tmp_path: Path) -> None:
    base = saved_base(kind, tmp_path / "base")
    model = trained(base, tmp_path / "a", CONFIGS[name](*BASES[kind][1:]))
    report = ak.merge(base, tmp_path / "a", tmp_path / "out", vocab="keep")
    assert any("rows 64 to 66" in warning and "are dropped" in warning for warning in report.plan.warnings)
    merged = loaded(tmp_path / "out")
    assert merged.config.vocab_size == ROWS
    assert_close(logits(merged, OLD_TOKENS), logits(model, OLD_TOKENS)[..., :ROWS])
    assert ak.verify(tmp_path / "out", base, tmp_path / "a").ok


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("name", ["embedding and head", "saved both", "token rows", "plain"])
def test_padded_rows_of_the_base_stay(kind: str, name: str, tmp_path: Path) -> None:
    base = saved_base(kind, tmp_path / "base")
    numbers = {"token rows": lora(target_modules=[BASES[kind][2]], trainable_token_indices=[3, 61])}
    config = numbers[name] if name in numbers else CONFIGS[name](*BASES[kind][1:])
    model = trained(base, tmp_path / "a", config, rows=ROWS - 2)
    report = ak.merge(base, tmp_path / "a", tmp_path / "out")
    assert any("trained on 62 rows" in warning and "stay unchanged" in warning for warning in report.plan.warnings)
    merged = loaded(tmp_path / "out")
    assert merged.config.vocab_size == ROWS
    assert_close(logits(merged, OLD_TOKENS)[..., : ROWS - 2], logits(model, OLD_TOKENS))
    table = merged.get_input_embeddings().weight
    assert torch.equal(table[ROWS - 2 :], loaded(base).get_input_embeddings().weight[ROWS - 2 :])
    assert ak.verify(tmp_path / "out", base, tmp_path / "a").ok


def test_far_fewer_rows_than_the_base_are_refused(tmp_path: Path) -> None:
    base = saved_base("tied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"), rows=40)
    with pytest.raises(ShapeMismatch, match="made for 40 rows; the base has 64"):
        ak.merge(base, tmp_path / "a", tmp_path / "out")
    ak.merge(base, tmp_path / "a", tmp_path / "out", vocab="keep")


def test_a_head_that_no_file_has_is_asked_about_and_the_resized_model_answers(tmp_path: Path) -> None:
    """PEFT leaves the new rows of a head that it does not adapt out, whatever it is told to save."""
    base = saved_base("untied", tmp_path / "base")
    config = CONFIGS["embedding"]("embed_tokens", "q_proj")
    model = trained(base, tmp_path / "a", config, save_embedding_layers=True)
    assert not any("lm_head" in name for name in load_file(tmp_path / "a/adapter_model.safetensors"))
    with pytest.raises(ShapeMismatch, match=r"3 of the new rows of lm_head.weight") as error:
        ak.merge(base, tmp_path / "a", tmp_path / "out")
    assert "--vocab grow" in error.value.cure
    assert "resized model with save_pretrained" in error.value.cure
    resized = loaded(base)
    torch.manual_seed(1)
    resized.resize_token_embeddings(MORE)
    resized.save_pretrained(tmp_path / "resized")
    ak.merge(tmp_path / "resized", tmp_path / "a", tmp_path / "out")
    assert_close(logits(loaded(tmp_path / "out")), logits(model))


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    base = saved_base("untied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    wide = {key: t.repeat(1, 2) if "embed_tokens" in key else t for key, t in load_file(file).items()}
    save_file(wide, file)
    for vocab in (None, "grow", "keep"):
        with pytest.raises(ShapeMismatch):
            ak.merge(base, tmp_path / "a", tmp_path / "out", vocab=vocab)


def test_rows_of_16_bits_grow_in_the_dtype_of_the_base(tmp_path: Path) -> None:
    saved_base("untied", tmp_path / "wide")
    loaded(tmp_path / "wide").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    trained(tmp_path / "base", tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"))
    ak.merge(tmp_path / "base", tmp_path / "a", tmp_path / "out")
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(found, rows.to(torch.bfloat16))


def test_a_smaller_weight_leaves_the_given_rows_whole(tmp_path: Path) -> None:
    """The base has no such rows: the change is counted from those that training began with."""
    base = saved_base("untied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["embedding and head"]("embed_tokens", "q_proj"))
    ak.merge(base, tmp_path / "a", tmp_path / "out", weights=[0.5])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    held = {key.removeprefix("base_model.model."): tensor.double() for key, tensor in tensors.items()}
    B, A = held["lm_head.lora_B.weight"], held["lm_head.lora_A.weight"]
    expected = held["lm_head.base_layer.weight"] + 0.5 * 2.0 * B @ A
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].double()
    assert float((found - expected).abs().max()) < 1e-6


def test_an_adapter_without_the_tokens_merges_beside_one_with_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved_base("untied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = get_peft_model(loaded(base), LoraConfig(r=2, target_modules=["lm_head"]))
        torch.manual_seed(2)
        other.base_model.model.lm_head.lora_B.default.weight.data.normal_()
        other.save_pretrained(tmp_path / "b", save_embedding_layers=False)
    ak.merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    change = other.base_model.model.lm_head.get_delta_weight("default").detach()
    rows = load_file(tmp_path / "a" / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
    rows[:ROWS] += change
    assert_close(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], rows)


def test_two_adapters_with_different_tokens_are_refused(tmp_path: Path) -> None:
    base = saved_base("untied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["saved both"]("embed_tokens", "q_proj"))
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    ak.merge(base, [tmp_path / "a", tmp_path / "same"], tmp_path / "out", weights=[0.5, 0.5])
    file = tmp_path / "same" / "adapter_model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="different rows for the added token 64"):
        ak.merge(base, [tmp_path / "a", tmp_path / "same"], tmp_path / "other", weights=[0.5, 0.5])


def test_config_of_a_model_with_a_nested_text_config(tmp_path: Path) -> None:
    base = saved_base("tied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"))
    config = json.loads((base / "config.json").read_text())
    text = {"vocab_size": config.pop("vocab_size"), "tie_word_embeddings": True, "hidden_size": 8}
    (base / "config.json").write_text(json.dumps({**config, "text_config": text, "vision_config": {"hidden_size": 4}}))
    ak.merge(base, tmp_path / "a", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {**text, "vocab_size": MORE}
    assert "vocab_size" not in written


def test_the_head_s_bias_grows_with_it(tmp_path: Path) -> None:
    base = saved_base("untied", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.bias"] = torch.linspace(-1, 2, ROWS)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    trained(base, tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"))
    with pytest.raises(ShapeMismatch, match=r"lm_head\.bias"):
        ak.merge(base, tmp_path / "a", tmp_path / "out")
    ak.merge(base, tmp_path / "a", tmp_path / "out", vocab="grow")
    found = load_file(tmp_path / "out" / "model.safetensors")["lm_head.bias"]
    assert torch.equal(found, torch.cat([tensors["lm_head.bias"], torch.full((3,), 0.5)]))


def tokenizer_in(folder: Path, rows: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(WordLevel({f"w{n}": n for n in range(ROWS)}, unk_token="w0"))
    own.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="w0")
    tokenizer.add_tokens([f"<{n}>" for n in range(ROWS, rows)])
    tokenizer.save_pretrained(folder)


def test_the_tokenizer_comes_along_on_the_command_line(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = saved_base("tied", tmp_path / "base")
    tokenizer_in(base, ROWS)
    trained(base, tmp_path / "a", CONFIGS["token rows"]("embed_tokens", "q_proj"), save_embedding_layers=False)
    tokenizer_in(tmp_path / "a", MORE)
    command = ["merge", str(base), str(tmp_path / "a")]
    planned = run(*command, "--plan", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["vocabulary"]["rows"] == MORE
    assert "grows from 64 to 67 rows" in run(*command, "--plan").stdout
    done = run(*command, "-o", str(tmp_path / "out"), "--verify")
    assert done.exit_code == 0, done.output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == MORE
    assert tokenizer.convert_tokens_to_ids("<65>") == 65
    kept = run(*command, "-o", str(tmp_path / "kept"), "--vocab", "keep")
    assert kept.exit_code == 0, kept.output
    assert len(AutoTokenizer.from_pretrained(tmp_path / "kept")) == ROWS


def test_unknown_choice(tmp_path: Path) -> None:
    base = saved_base("tied", tmp_path / "base")
    trained(base, tmp_path / "a", CONFIGS["plain"]("embed_tokens", "q_proj"))
    with pytest.raises(UsageError, match="choice 'shrink' for the vocabulary is unknown"):
        ak.merge(base, tmp_path / "a", tmp_path / "out", vocab="shrink")

"""Tied embeddings and heads: merged and live models compute what PEFT's forward computed while it trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tied_models import BASES, KINDS, TOKENS, VOCABULARY, loaded, logits, trained

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import Unsupported, UsageError
from adapterkit.methods.lora import LoRA

CELLS = [
    *(("llama", kind) for kind in KINDS),
    *(("gpt2", kind) for kind in ("lora at both", "lora at the embedding, tied", "whole embedding", "rows of both")),
    *(("t5", kind) for kind in ("lora at the embedding", "dora at the embedding", "whole head", "whole both", "rows")),
    *(("t5", kind) for kind in ("other rows of the head", "trainable tokens", "trainable tokens of the head")),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (make, _, _) in BASES.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        made[name] = tmp_path_factory.mktemp(name) / "base"
        model.save_pretrained(made[name])
    return made


def error(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(("name", "kind"), CELLS, ids=lambda value: value.replace(" ", "_"))
def test_merged_and_live_models_compute_what_peft_did(
    name: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, adapter = bases[name], tmp_path / "adapter"
    expected = trained(name, base, kind, adapter)
    named = ak.read(adapter).updates
    for tied in (None, "untie"):
        out = tmp_path / str(tied)
        report = ak.merge(base, adapter, out, tied=tied)
        merged = loaded(name, out)
        assert error(logits(merged), expected) < 3e-6
        says_tied = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        assert says_tied == ("lm_head.weight" not in load_file(out / "model.safetensors"))
        assert ak.verify(out, base, adapter).ok
        idle = name == "t5" and any(target.path == "shared" for target in named)
        assert bool(report.record()["warnings"]) == (idle and kind not in ("rows", "trainable tokens"))

    model = loaded(name, base)
    before = logits(model)
    handle = ak.torch.inject(model, ak.read(adapter))
    assert error(logits(model), expected) < 3e-6
    assert set(handle.adapter().updates) == set(named)
    handle.remove()
    assert torch.equal(logits(model), before)


def test_rows_of_a_tied_embedding_train_and_merge_once(bases: dict[str, Path], tmp_path: Path) -> None:
    """One leaf serves both layers: its gradient is the sum over both, as autograd has it for a tied parameter."""
    trained("llama", bases["llama"], "rows", tmp_path)
    rows = ak.read(tmp_path)
    rows = rows.replace(updates={target: us for target, us in rows.updates.items() if "embed" in target.path})
    model = loaded("llama", bases["llama"])
    handle = ak.torch.inject(model, rows, weight=0.5, trainable=True)
    (leaf,) = handle.parameters()
    model(input_ids=TOKENS).logits.square().sum().backward()

    W = loaded("llama", bases["llama"]).model.embed_tokens.weight.detach().double()
    tied = loaded("llama", bases["llama"]).double()
    changed = W.clone()
    changed[[1, 5, 7]] = 0.5 * W[[1, 5, 7]] + 0.5 * leaf.detach().double()
    with torch.no_grad():
        tied.model.embed_tokens.weight.copy_(changed)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    tied(input_ids=TOKENS).logits.square().sum().backward()
    assert torch.allclose(
        leaf.grad.double(), 0.5 * tied.model.embed_tokens.weight.grad[[1, 5, 7]], rtol=1e-4, atol=1e-5
    )

    handle.merge_()
    assert torch.allclose(model.lm_head.weight.double(), changed, atol=1e-7)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("silent", [False, True])
def test_a_head_that_is_stored_beside_its_embedding_is_tied_all_the_same(
    silent: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(bases["gpt2"] / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((bases["gpt2"] / "config.json").read_text())
    if silent:
        del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    for kind in ("lora at the embedding", "rows"):
        expected = trained("gpt2", base, kind, tmp_path / kind)
        ak.merge(base, tmp_path / kind, tmp_path / f"{kind} merged")
        said = json.loads((tmp_path / f"{kind} merged" / "config.json").read_text())
        assert said.get("tie_word_embeddings") == (config.get("tie_word_embeddings") if kind == "rows" else False)
        assert error(logits(loaded("gpt2", tmp_path / f"{kind} merged")), expected) < 3e-6
        assert ak.verify(tmp_path / f"{kind} merged", base, tmp_path / kind).ok


def test_a_head_with_other_rows_than_the_embedding_is_not_tied(tmp_path: Path) -> None:
    """Llama 3.2 Vision: 8 more rows in the embedding, a head of its own, and a config that does not say so."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    head, embedding = torch.randn(12, 8), torch.randn(20, 8)
    names = {"language_model.lm_head.weight": head, "language_model.model.embed_tokens.weight": embedding}
    save_file(names, base / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama"}
    (base / "config.json").write_text(json.dumps(config))
    update = LoRA(A=torch.randn(2, 8), B=torch.randn(12, 2))
    ak.write(ak.Adapter({Target("lm_head"): (update,)}), adapter, format="peft")
    ak.merge(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(merged["language_model.lm_head.weight"], head + update.B @ update.A, atol=1e-5)
    assert torch.equal(merged["language_model.model.embed_tokens.weight"], embedding)


def test_a_tie_of_two_embeddings_is_none_of_the_head(tmp_path: Path) -> None:
    """CSM ties the embeddings of its two decoders; its head has other rows and other columns."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    head, embedding = torch.randn(12, 8), torch.randn(24, 16)
    names = {"lm_head.weight": head, "depth_decoder.model.embed_tokens.weight": embedding}
    save_file(names, base / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["CsmForConditionalGeneration"], "model_type": "csm", "tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    update = LoRA(A=torch.randn(2, 8), B=torch.randn(12, 2))
    ak.write(ak.Adapter({Target("lm_head"): (update,)}), adapter, format="peft")
    ak.merge(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.allclose(merged["lm_head.weight"], head + update.B @ update.A, atol=1e-5)
    assert torch.equal(merged["depth_decoder.model.embed_tokens.weight"], embedding)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
ENCODER = {**SMALL, "num_attention_heads": 2, "max_position_embeddings": 16}
OTHER_NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "BertForMaskedLM": ("BertConfig", ENCODER, "word_embeddings"),  # The head's bias is a second name of another one.
    "RobertaForMaskedLM": ("RobertaConfig", ENCODER, "word_embeddings"),
    "AlbertForMaskedLM": ("AlbertConfig", {**ENCODER, "embedding_size": 8}, "word_embeddings"),
    "ElectraForMaskedLM": ("ElectraConfig", {**ENCODER, "embedding_size": 8}, "word_embeddings"),
    "ModernBertForMaskedLM": (
        "ModernBertConfig", {**ENCODER, "pad_token_id": 0, "layer_types": ["full_attention"]}, "tok_embeddings",
    ),
    "CTRLLMHeadModel": (
        "CTRLConfig",
        {"vocab_size": VOCABULARY, "n_embd": 8, "dff": 8, "n_layer": 1, "n_head": 2, "n_positions": 8},
        "w",
    ),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4},
        "embeddings",
    ),
    "GPTNeoXJapaneseForCausalLM": (
        "GPTNeoXJapaneseConfig",
        {**SMALL, "num_attention_heads": 2, "intermediate_multiple_size": 1, "tie_word_embeddings": True},
        "embed_in",
    ),
    "TrOCRForCausalLM": (
        "TrOCRConfig",
        {
            "vocab_size": VOCABULARY, "d_model": 8, "decoder_layers": 1, "decoder_attention_heads": 2,
            "decoder_ffn_dim": 8,
        },
        "embed_tokens",
    ),
    "ProphetNetForConditionalGeneration": (
        "ProphetNetConfig",
        {
            "vocab_size": VOCABULARY, "hidden_size": 8, "num_encoder_layers": 1, "num_decoder_layers": 1,
            "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8, "decoder_start_token_id": 0,
        },
        "lm_head",
    ),
}  # fmt: skip
"""Class -> its config's class, sizes, an adapted layer: models whose head, or embedding, has a name of its own.

ProphetNet's halves have an embedding each, and all three share one table.
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OTHER_NAMES)
def test_heads_of_any_name_are_untied(name: str, tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    config, sizes, embedding = OTHER_NAMES[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=[embedding], init_lora_weights=False)).eval()
    peft.save_pretrained(str(tmp_path / "adapter"))
    inputs = {"decoder_input_ids": TOKENS[:, :3]} if "Conditional" in name else {}
    with torch.no_grad():
        expected, plain = peft(input_ids=TOKENS, **inputs).logits, None
        with peft.disable_adapter():
            plain = peft(input_ids=TOKENS, **inputs).logits
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again, told = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"]
    with torch.no_grad():
        found = again.eval()(input_ids=TOKENS, **inputs).logits
    assert error(expected, found) < 1e-5 < error(expected, plain)
    ak.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_a_bias_that_peft_leaves_out_of_a_tied_head_is_kept_and_said(tmp_path: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    config, sizes, _ = OTHER_NAMES["BertForMaskedLM"]
    model = transformers.BertForMaskedLM(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "base")
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["query"], trainable_token_indices={"word_embeddings": [1, 5]})
    ).eval()
    peft.save_pretrained(str(tmp_path / "adapter"))
    report = ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert any("cls.predictions.decoder.bias is kept" in warning for warning in report.plan.warnings)
    with torch.no_grad():
        trained = peft(input_ids=TOKENS).logits
        whole = peft.merge_and_unload()(input_ids=TOKENS).logits
        found = transformers.BertForMaskedLM.from_pretrained(tmp_path / "merged").eval()(input_ids=TOKENS).logits
    assert error(whole, found) < 1e-5
    assert error(trained + model.cls.predictions.bias, found) < 1e-5 < error(trained, found)
    live = transformers.BertForMaskedLM.from_pretrained(tmp_path / "base").eval()
    with pytest.warns(UserWarning, match=r"the bias of cls.predictions.decoder is kept.*bias.data.zero_\(\)") as told:
        ak.torch.inject(live, ak.read(tmp_path / "adapter"))
    assert len(told) == 1
    with torch.no_grad():
        kept = live(input_ids=TOKENS).logits
        live.get_submodule("cls.predictions.decoder").bias.data.zero_()
        assert error(whole, kept) < 1e-5
        assert error(trained, live(input_ids=TOKENS).logits) < 1e-5


def test_both_halves_of_bart_have_their_embeddings_when_the_head_is_untied(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, **sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape))
        expected = adapted(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    ak.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    again, told = BartForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"]
    with torch.no_grad():
        found = again.eval()(input_ids=TOKENS, decoder_input_ids=TOKENS).logits
    assert error(found, expected) < 3e-6
    assert ak.verify(tmp_path / "merged", tmp_path / "base", tmp_path / "adapter").ok


def test_kinds_are_chosen_one_by_one(bases: dict[str, Path], tmp_path: Path) -> None:
    """`rows=untie` leaves the head alone; `embedding=merge` is PEFT's own merge into the shared tensor."""
    from peft import PeftModel

    base = bases["llama"]
    trained("llama", base, "rows", tmp_path / "rows")
    ak.merge(base, tmp_path / "rows", tmp_path / "apart", tied={"rows": "untie"})
    apart = load_file(tmp_path / "apart" / "model.safetensors")
    rows = load_file(tmp_path / "rows" / "adapter_model.safetensors")
    original = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(apart["lm_head.weight"], original)
    values = next(value for key, value in rows.items() if "trainable_tokens_delta" in key)
    assert torch.equal(apart["model.embed_tokens.weight"][[1, 5, 7]], values)
    assert ak.verify(tmp_path / "apart", base, tmp_path / "rows").ok

    trained("llama", base, "lora at the embedding", tmp_path / "lora")
    ak.merge(base, tmp_path / "lora", tmp_path / "shared", tied="embedding=merge,replacement=merge")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(loaded("llama", base), tmp_path / "lora").merge_and_unload()
    assert error(logits(loaded("llama", tmp_path / "shared")), logits(merged)) < 3e-6
    for wrong in ("cut", "rows", "rows=cut", "tail=merge", {"rows": "cut"}, {}):
        with pytest.raises(UsageError, match="rows, embedding, head, replacement"):
            ak.merge(base, tmp_path / "lora", tmp_path / "wrong", tied=wrong)


def test_what_the_file_does_not_tell_is_asked(bases: dict[str, Path], tmp_path: Path) -> None:
    table = Target("model.embed_tokens", "in out *k")
    made = ak.Adapter({table: (LoRA(A=torch.randn(2, VOCABULARY), B=torch.randn(8, 2)),)})
    with pytest.raises(UsageError, match=r"tied=\"untie\".*tied=\"merge\"") as raised:
        ak.merge(bases["llama"], made, tmp_path / "out")
    assert raised.value.where == "model.embed_tokens.weight"
    for tied in ("untie", "merge"):
        ak.merge(bases["llama"], made, tmp_path / tied, tied=tied)
    trained("llama", bases["llama"], "lora at the embedding", tmp_path / "peft")
    ak.write(ak.read(tmp_path / "peft"), tmp_path / "native.safetensors", format="adapterkit")
    ak.merge(bases["llama"], tmp_path / "native.safetensors", tmp_path / "lineage")
    assert "lm_head.weight" in load_file(tmp_path / "lineage" / "model.safetensors")


def test_a_gguf_base_without_a_head_is_tied(tmp_path: Path) -> None:
    """llama.cpp reads token_embd.weight where there is no output.weight."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(str(tmp_path / "base.gguf"), "llama")
    writer.add_block_count(1)
    table = np.random.default_rng(0).standard_normal((VOCABULARY, 32)).astype(np.float32)
    writer.add_tensor("token_embd.weight", table)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = ak.Adapter(
        {Target("model.embed_tokens", "in out *k"): (LoRA(A=torch.randn(2, VOCABULARY), B=torch.randn(32, 2)),)}
    )
    with pytest.raises(UsageError, match=r"ties lm_head\.weight"):
        ak.merge(tmp_path / "base.gguf", made, tmp_path / "out.gguf")
    with pytest.raises(Unsupported, match=r"--tied merge.*dequantize"):
        ak.merge(tmp_path / "base.gguf", made, tmp_path / "out.gguf", tied="untie")
    ak.merge(tmp_path / "base.gguf", made, tmp_path / "out.gguf", tied="merge")
    ak.merge(tmp_path / "base.gguf", made, tmp_path / "out.safetensors", tied="untie", quantized="dequantize")
    head = load_file(tmp_path / "out.safetensors")["lm_head.weight"]
    assert torch.equal(head.float(), torch.tensor(table).to(head.dtype).float())


def test_live_models_take_the_words_of_merges(bases: dict[str, Path], tmp_path: Path) -> None:
    """As a merge with the same choice, which transformers loads and runs."""
    for kind, tied in (("rows", "rows=untie"), ("lora at the embedding", "merge"), ("lora at the head", "merge")):
        trained("llama", bases["llama"], kind, tmp_path / kind)
        ak.merge(bases["llama"], tmp_path / kind, tmp_path / "out", tied=tied, overwrite=True)
        model = loaded("llama", bases["llama"])
        handle = ak.torch.inject(model, ak.read(tmp_path / kind), tied=tied)
        assert error(logits(model), logits(loaded("llama", tmp_path / "out"))) < 3e-6
        assert set(handle.adapter().updates) == set(ak.read(tmp_path / kind).updates)
    with pytest.raises(UsageError, match="rows, embedding, head, replacement"):
        ak.torch.inject(loaded("llama", bases["llama"]), ak.read(tmp_path / "rows"), tied="cut")


@pytest.mark.parametrize("apart", [False, True])
def test_a_difference_of_models_says_whether_the_head_is_its_own(
    apart: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The tuned model is the oracle: a live base with the extracted adapter computes what it computes."""
    tuned = loaded("llama", bases["llama"])
    if apart:
        tuned.config.tie_word_embeddings = False
        tuned.lm_head.weight = torch.nn.Parameter(tuned.lm_head.weight.detach().clone())
    with torch.no_grad():
        tuned.model.embed_tokens.weight.add_(torch.randn(VOCABULARY, 8) * 0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    adapter = ak.ops.extract(tmp_path / "tuned", bases["llama"], rank=8)
    model = loaded("llama", bases["llama"])
    ak.torch.inject(model, adapter)
    assert error(logits(model), logits(tuned)) < 3e-5

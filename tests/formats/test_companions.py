"""What arrives with an adapter is not lost: its tokenizer, the strings in its file, and what it says of its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import record, run
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit import ops
from adapterkit.errors import CheckFailed, Malformed, UsageError

WORDS = ["a", "b", "c", "[UNK]"]
TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


def make_base(folder: Path, seed: int = 0, **config: Any) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": (6, 4), "q.weight": (8, 4), "lm_head.weight": (6, 4)}
    values = {name: random.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def make_adapter(folder: Path, seed: int = 1, header: dict[str, str] | None = None, **config: Any) -> Path:
    random = np.random.default_rng(seed)
    folder.mkdir()
    key = "base_model.model.q.lora_{}.weight"
    factors = {key.format(name): random.standard_normal(shape) for name, shape in (("A", (2, 4)), ("B", (8, 2)))}
    tensors = {name: value.astype(np.float32) for name, value in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", **(header or {})})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def save_tokenizer(folder: Path, *added: str, template: str | None = None) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def loaded_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def header_of(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as opened:
        return dict(opened.metadata())


def test_an_adapters_tokenizer_goes_along_whole(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "style")
    save_tokenizer(base)
    save_tokenizer(adapter, "<x>", template=TEMPLATE)
    said = record("merge", base, adapter, "-o", tmp_path / "out")
    assert said["tokenizer"] == {"from": "adapter", "adapter": "style", "differs": True}
    (warning,) = said["warnings"]
    assert "tokenizer of style differs" in warning
    assert "--tokenizer base" in warning
    merged = loaded_tokenizer(tmp_path / "out")
    assert merged.encode("a <x> c") == [0, 4, 2]
    assert merged.apply_chat_template([{"content": "hi"}], tokenize=False) == "<hi>"

    shown = run("merge", base, adapter, "-o", tmp_path / "kept", "--tokenizer", "base")
    assert "warning: the tokenizer of style differs" in shown.output
    kept = loaded_tokenizer(tmp_path / "kept")
    assert kept.encode("a <x> c") != [0, 4, 2]
    assert kept.chat_template is None

    ak.merge(base, adapter, tmp_path / "again", tokenizer="adapter")
    tokens = {file.name for file in adapter.iterdir() if "token" in file.name or "chat" in file.name}
    assert {name: (tmp_path / "again" / name).read_bytes() for name in tokens} == {
        name: (adapter / name).read_bytes() for name in tokens
    }
    assert record("merge", base, adapter, "--plan")["tokenizer"]["from"] == "adapter"


def test_a_tokenizer_that_is_not_whole_or_does_not_fit_stays_behind(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "style")
    save_tokenizer(base)
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    report = ak.merge(base, adapter, tmp_path / "template")
    assert "no vocabulary" in report.record()["warnings"][0]
    assert not (tmp_path / "template" / "chat_template.jinja").exists()
    with pytest.raises(UsageError, match="no adapter's folder has a tokenizer"):
        ak.merge(base, adapter, tmp_path / "x", tokenizer="adapter")

    save_tokenizer(adapter, "<x>", "<y>", "<z>")
    report = ak.merge(base, adapter, tmp_path / "grown")
    assert report.record()["tokenizer"] == {"from": "base", "differs": True}
    assert "token 6" in report.record()["warnings"][0]
    with pytest.raises(UsageError, match="token 6"):
        ak.merge(base, adapter, tmp_path / "y", tokenizer="adapter")

    other = make_adapter(tmp_path / "other")
    save_tokenizer(other, "<q>")
    report = ak.merge(base, [adapter, other], tmp_path / "two")
    assert "style, other differ from each other" in report.record()["warnings"][0]
    with pytest.raises(UsageError, match="one adapter at a time"):
        ak.merge(base, [adapter, other], tmp_path / "z", tokenizer="adapter")
    with pytest.raises(UsageError, match="base, adapter"):
        ak.merge(base, adapter, tmp_path / "z", tokenizer="both")

    combined = ("merge", base, adapter, other, "--method", "linear", "-o")
    assert "although these adapters have a tokenizer too: " in record(*combined, tmp_path / "combined")["warnings"][0]
    said = record(*combined, tmp_path / "named", "--tokenizer", other)
    assert said["tokenizer"] == {"from": "adapter", "adapter": "other", "differs": True}
    read = ak.merge(base, ak.read(other), tmp_path / "read")
    assert read.record()["tokenizer"]["adapter"] == "Adapter"


def test_the_same_tokenizer_is_no_matter(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "style")
    save_tokenizer(base)
    save_tokenizer(adapter)
    said = ak.merge(base, adapter, tmp_path / "out").record()
    assert (said["tokenizer"], said["warnings"]) == ({"from": "base", "differs": False}, [])


def test_a_base_that_is_not_the_adapters_is_warned_of_or_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", _name_or_path="org/right")
    right = make_adapter(tmp_path / "right", base_model_name_or_path="org/right")
    wrong = make_adapter(tmp_path / "wrong", base_model_name_or_path="org/other")
    local = make_adapter(tmp_path / "local", base_model_name_or_path=str(tmp_path / "somewhere"))
    for adapter in (right, local):
        assert ak.merge(base, adapter, tmp_path / f"{adapter.name} out", strict_base=True).record()["warnings"] == []
    said = record("merge", base, wrong, "-o", tmp_path / "out")
    assert said["warnings"] == ["wrong was made for org/other; this base is org/right"]
    refused = run("merge", base, wrong, "-o", tmp_path / "refused", "--strict-base")
    assert refused.exit_code == 1
    assert "--strict-base" in refused.output
    assert not (tmp_path / "refused").exists()

    cached = tmp_path / "models--org--other" / "snapshots" / "0" / "x"
    cached.parent.mkdir(parents=True)
    make_base(cached, _name_or_path="org/right")
    assert ak.merge(cached, wrong, tmp_path / "cached out").record()["warnings"] == []

    tuned = make_base(tmp_path / "tuned", seed=5, _name_or_path="org/right")
    extracted = ops.extract(tuned, base, rank=2)
    assert ak.merge(base, extracted, tmp_path / "same").record()["warnings"] == []
    other = make_base(tmp_path / "values", seed=7, _name_or_path="org/right")
    (why,) = ak.merge(other, extracted, tmp_path / "values out").record()["warnings"]
    assert "fingerprint" in why
    config = make_base(tmp_path / "config", _name_or_path="org/right", rope_theta=2)
    (why,) = ak.merge(config, extracted, tmp_path / "config out").record()["warnings"]
    assert "config" in why
    with pytest.raises(CheckFailed, match="sampled-2-sha256"):
        ak.merge(other, extracted, tmp_path / "strict", strict_base=True)


def test_verify_knows_the_base_by_its_fingerprint(tmp_path: Path) -> None:
    """Whole weights leave nothing of the base where they lie, so that a merge of another base could look right."""
    base, other = make_base(tmp_path / "base"), make_base(tmp_path / "other", seed=3)
    tuned = make_base(tmp_path / "tuned", seed=5)
    extracted = ops.extract(tuned, base, rank=2)
    ak.write(extracted, tmp_path / "delta.safetensors", format="adapterkit")
    ak.merge(other, tmp_path / "delta.safetensors", tmp_path / "wrong")
    found = ak.verify(tmp_path / "wrong", other, tmp_path / "delta.safetensors")
    assert not found.ok
    assert not found.differences
    words = ("verify", tmp_path / "wrong", "--base", other, "--adapter", tmp_path / "delta.safetensors")
    (told,) = record(*words, code=1)["base"]
    assert told["expected"] != told["given"]
    assert all(told[name] in run(*words).output for name in ("expected", "given"))

    ak.merge(base, tmp_path / "delta.safetensors", tmp_path / "right")
    assert ak.verify(tmp_path / "right", base, tmp_path / "delta.safetensors").ok
    whole = {f"base_model.model.{name}": tensor for name, tensor in load_file(tuned / "model.safetensors").items()}
    adapter = make_adapter(tmp_path / "whole", modules_to_save=["q", "embed_tokens", "lm_head"])
    save_file(whole, adapter / "adapter_model.safetensors", {"format": "pt"})
    ak.merge(base, adapter, tmp_path / "replaced")
    assert ak.verify(tmp_path / "replaced", base, adapter).ok
    found = ak.verify(tmp_path / "replaced", other, adapter)
    assert (found.ok, found.differences, found.base[0].named_by) == (False, (), "adapterkit_merge.json")


def test_fingerprints_see_values_and_not_files(tmp_path: Path) -> None:
    from adapterkit.io.checkpoint import fingerprint, open_checkpoint

    base = make_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, name in enumerate(tensors):
        save_file({name: tensors[name]}, shards / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, name in enumerate(tensors)}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same = [fingerprint(open_checkpoint(path)) for path in (base, shards)]
    assert same[0] == same[1]
    large = {"w": np.zeros((600, 700), np.float32)}
    seen = set()
    for row in (None, 0, 599):
        if row is not None:
            large["w"][row] += 1
        save_file(large, tmp_path / "large.safetensors")
        seen.add(fingerprint(open_checkpoint(tmp_path / "large.safetensors")))
    assert len(seen) == 3


def kohya(path: Path, seed: int, **header: str) -> Path:
    random = np.random.default_rng(seed)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2)}
    found = {f"{stem}.{name}": random.standard_normal(s).astype(np.float32) for name, s in tensors.items()}
    found[f"{stem}.alpha"] = np.array(2, np.float32)
    own = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "sshs_model_hash": "1"}
    save_file(found, path, {**own, **header})
    return path


def test_trigger_words_survive_every_verb(tmp_path: Path) -> None:
    frequency = json.dumps({"10_ohwx": {"ohwx man": 3}})
    words = {"ss_tag_frequency": frequency, "modelspec.trigger_phrase": "ohwx", "ss_output_name": "man"}
    one = kohya(tmp_path / "one.safetensors", 0, **words)
    two = kohya(tmp_path / "two.safetensors", 1, **{"modelspec.trigger_phrase": "zwx, ohwx", "ss_output_name": "dog"})
    for target, out in (
        ("kohya", "kohya.safetensors"), ("diffusers", "diffusers.safetensors"), ("peft", "peft"),
        ("lycoris", "lycoris.safetensors"), ("adapterkit", "native.safetensors"),
    ):  # fmt: skip
        assert run("convert", one, tmp_path / out, "--to", target).exit_code == 0
        assert run("convert", tmp_path / out, tmp_path / f"{target}-back.safetensors", "--to", "kohya").exit_code == 0
        back = header_of(tmp_path / f"{target}-back.safetensors")
        assert {key: back.get(key) for key in words} == words, target
    file = tmp_path / "peft" / "adapter_model.safetensors"
    assert header_of(file)["modelspec.trigger_phrase"] == "ohwx"
    assert "sshs_model_hash" not in header_of(file)

    assert run("resize", one, "--rank", "1", "-o", tmp_path / "small.safetensors", "--to", "kohya").exit_code == 0
    small = header_of(tmp_path / "small.safetensors")
    assert {key: small.get(key) for key in words} == words
    assert small["ss_network_dim"] == "1"
    assert "sshs_model_hash" not in small

    words_of_two = ("combine", one, two, "--method", "linear", "-o", tmp_path / "sum.safetensors", "--to", "kohya")
    assert run(*words_of_two).exit_code == 0
    both = header_of(tmp_path / "sum.safetensors")
    assert both["modelspec.trigger_phrase"] == "ohwx, zwx"
    assert both["ss_tag_frequency (man)"] == frequency
    assert (both["ss_output_name (man)"], both["ss_output_name (dog)"]) == ("man", "dog")
    native = ops.combine([ak.read(one), ak.read(two)], method="linear")
    ak.write(native, tmp_path / "sum", format="adapterkit")
    ak.write(ak.read(tmp_path / "sum"), tmp_path / "again.safetensors", format="kohya")
    assert header_of(tmp_path / "again.safetensors")["modelspec.trigger_phrase"] == "ohwx, zwx"


def test_links_out_of_a_base_are_refused_but_for_the_caches_of_hubs(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "style")
    secret = tmp_path / "secret"
    secret.write_text("key")
    (base / "notes.txt").symlink_to(secret)
    with pytest.raises(Malformed, match="outside the folder"):
        ak.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (base / "notes.txt").unlink()
    (base / "inside.json").symlink_to("config.json")
    ak.merge(base, adapter, tmp_path / "inside")

    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(("model.safetensors", "config.json")):
        (blobs / str(number)).write_bytes((base / file).read_bytes())
        (snapshot / file).symlink_to(f"../../blobs/{number}")
    ak.merge(snapshot, adapter, tmp_path / "cached")
    assert (tmp_path / "cached" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    (snapshot / "notes.txt").symlink_to(secret)
    with pytest.raises(Malformed, match="outside the folder"):
        ak.merge(snapshot, adapter, tmp_path / "cached out")


@pytest.mark.parametrize("name", ["metadata", "long"])
def test_a_damaged_index_is_a_typed_error(name: str, tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "style")
    (base / "model.safetensors").rename(base / "one.safetensors")
    file = "x" * 300 if name == "long" else "one.safetensors"
    index = {"metadata": 1 if name == "metadata" else {}, "weight_map": dict.fromkeys(["q.weight"], file)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ak.AdapterkitError) as raised:
        ak.merge(base, adapter, tmp_path / "out")
    assert raised.value.path
    for call in (
        lambda: ak.merge("x" * 300, adapter, tmp_path / "out"), lambda: ak.merge(base, "x" * 300, tmp_path / "out"),
        lambda: ak.merge(base, adapter, tmp_path / ("x" * 300)), lambda: ak.read("x" * 300),
    ):  # fmt: skip
        with pytest.raises(ak.AdapterkitError):
            call()


def test_a_change_beyond_float32_is_refused(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "style", lora_alpha=1e308)
    with pytest.raises(Malformed, match="a NaN or an infinity in F32"):
        ak.merge(base, adapter, tmp_path / "out")

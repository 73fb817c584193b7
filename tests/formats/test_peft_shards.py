"""Adapters in several files, as transformers saves a PEFT adapter that is larger than `max_shard_size`."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import peft as integration

import adapterkit as ak
from adapterkit.errors import Malformed


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, `adapter` in several files, and the logits of the model with the adapter."""
    # transformers 5.24 asks for a newer PEFT; what it saves does not depend on that.
    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval()
    model.save_pretrained(tmp_path / "adapter", max_shard_size="2KB")
    torch.save(model(torch.arange(8)[None]).logits.detach(), tmp_path / "logits.pt")
    assert len(list((tmp_path / "adapter").glob("adapter_model-*"))) > 1
    return tmp_path


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "adapter_model.safetensors.index.json"])
def test_an_adapter_in_several_files_is_read_whole(sharded: Path, index: str) -> None:
    (sharded / "adapter" / "model.safetensors.index.json").rename(sharded / "adapter" / index)
    adapter = ak.read(sharded / "adapter")
    assert len(adapter.updates) == 4
    ak.merge(sharded / "base", [adapter], sharded / "merged")
    merged = LlamaForCausalLM.from_pretrained(sharded / "merged").eval()
    logits = torch.load(sharded / "logits.pt")
    found = merged(torch.arange(8)[None]).logits.detach()
    assert float((found - logits).abs().max() / logits.abs().max()) < 1e-5


def test_a_lost_file_is_named(sharded: Path) -> None:
    lost = sorted((sharded / "adapter").glob("adapter_model-*"))[1]
    lost.unlink()
    with pytest.raises(Malformed, match=lost.name):
        ak.read(sharded / "adapter")


def test_an_index_that_names_another_file_is_refused(sharded: Path) -> None:
    path = sharded / "adapter" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = sorted(set(index["weight_map"].values()))
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = next(name for name in names if name != index["weight_map"][key])
    path.write_text(json.dumps(index))
    with pytest.raises(Malformed, match="but the file does not have this tensor"):
        ak.read(sharded / "adapter")


def test_files_of_an_older_adapter_do_not_stay(sharded: Path) -> None:
    adapter = ak.read(sharded / "adapter").load("cpu")
    ak.write(adapter, sharded / "adapter", format="peft", overwrite=True)
    assert not list((sharded / "adapter").glob("adapter_model-*"))
    assert len(load_file(sharded / "adapter" / "adapter_model.safetensors")) == 8
    assert len(ak.read(sharded / "adapter").updates) == 4

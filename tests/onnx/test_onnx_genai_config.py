"""The folder of an exported language model, compared with the config that onnxruntime-genai's builder wrote for it."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import adapterkit as ak
from adapterkit.onnx import exporting
from adapterkit.onnx.model_file import opened

HELD = Path(__file__).parents[1] / "data" / "onnxruntime_genai"
"""The config of a Llama, and what the builder of onnxruntime-genai 0.18 wrote for it."""

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|torch)")


def exported(folder, config, **options):
    torch.manual_seed(0)
    kind = transformers.LlamaForCausalLM if config.model_type == "llama" else transformers.BertModel
    kind(config).save_pretrained(folder / "base")
    return ak.onnx.export_pretrained(folder / "base", folder / "out", **options)


def test_the_config_is_that_of_the_builder(tmp_path):
    report = exported(tmp_path, transformers.LlamaConfig.from_pretrained(HELD))
    got = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    wanted = json.loads((HELD / "genai_config.json").read_text())
    # The graph takes positions, and returns each cache as a new tensor.
    assert got["model"]["decoder"]["inputs"].pop("position_ids") == "position_ids"
    assert got["search"].pop("past_present_share_buffer") is False
    assert got["model"].pop("type") == "decoder"
    del wanted["model"]["type"]
    assert got["model"] == wanted["model"]
    assert got["search"].items() <= wanted["search"].items()
    assert tmp_path / "out" / "genai_config.json" in report.files
    graph = opened(report.out).model.graph
    names = {value.name for value in (*graph.inputs, *graph.outputs)}
    told = wanted["model"]["decoder"]
    patterns = [*told["inputs"].values(), *told["outputs"].values()]
    layers = range(told["num_hidden_layers"])
    assert {name % at if "%d" in name else name for name in patterns for at in layers} | {"position_ids"} == names
    ak.onnx.export_pretrained(tmp_path / "base", tmp_path / "out", overwrite=True)  # An older config is replaced.


@pytest.mark.parametrize("kind", ["no cache", "no end"])
def test_models_that_cannot_generate_have_no_config(tmp_path, kind):
    """An encoder has no cache; a model without an end token would be given another token as its end."""
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
    if kind == "no cache":
        config = transformers.BertConfig(**small)
    else:
        config = transformers.LlamaConfig(**small, eos_token_id=None, pad_token_id=0)
    exported(tmp_path, config, check=False)
    assert (tmp_path / "out" / "model.onnx").exists()
    assert not (tmp_path / "out" / "genai_config.json").exists()
    assert "genai_config.json" in exporting.OWNS

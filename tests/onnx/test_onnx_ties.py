"""Tied layers of graphs: injected and merged graphs compute what PEFT's forward computes, as folders do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import run
from tied_models import BASES, TOKENS, loaded, trained

import adapterkit as ak
from adapterkit.core.adapter import Target
from adapterkit.errors import CheckFailed, UsageError
from adapterkit.methods.lora import LoRA

FORMS = ("copied", "shared")
"""torch's exporter stores a tied head as a transposed copy, and unoptimised as the embedding's own tensor."""

CELLS = [
    *(("llama", "shared", kind) for kind in ("rows", "rows of both", "other rows of the head", "rows of the head")),
    *(("llama", "shared", kind) for kind in ("lora at both", "lora at the embedding, tied", "whole both")),
    *(("llama", "copied", kind) for kind in ("rows", "lora at the embedding", "dora at the embedding, tied")),
    *(("gpt2", "shared", kind) for kind in ("trainable tokens", "whole embedding, tied")),
    *(("gpt2", "copied", kind) for kind in ("rows of both", "lora at both")),
]


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> a folder with `base` and the graphs."""
    folders = {}
    for name in ("llama", "gpt2"):
        torch.manual_seed(0)
        model, folder = BASES[name][0](), tmp_path_factory.mktemp(name)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            model.save_pretrained(folder / "base")
            words: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["logits"], "external_data": False}
            for form in FORMS:
                torch.onnx.export(
                    Logits(model).eval(), (TOKENS,), str(folder / f"{form}.onnx"), dynamo=True, verbose=False,
                    optimize=form == "copied", **words,
                )  # fmt: skip
        folders[name] = folder
    return folders


def told(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input_ids": TOKENS.numpy()})[0]


def error(got: Any, wanted: Any) -> float:
    return float(np.abs(got - np.asarray(wanted)).max() / np.abs(np.asarray(wanted)).max())


def test_exports_store_the_head_in_both_ways(made: dict[str, Path]) -> None:
    for folder in made.values():
        one, two = (onnx.load(folder / f"{form}.onnx").graph for form in FORMS)
        assert [sum(12 in each.dims for each in graph.initializer) for graph in (one, two)] == [2, 1]


@pytest.mark.parametrize(("name", "form", "kind"), CELLS, ids=lambda value: value.replace(" ", "_"))
def test_graphs_compute_what_peft_did(name: str, form: str, kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    folder = made[name]
    wanted = trained(name, folder / "base", kind, tmp_path / "adapter")
    for verb in (ak.onnx.inject, ak.onnx.merge):
        verb(folder / f"{form}.onnx", tmp_path / "adapter", tmp_path / "out.onnx")
        assert error(told(tmp_path / "out.onnx"), wanted) < 3e-6


def test_the_choice_is_that_of_merges(made: dict[str, Path], tmp_path: Path) -> None:
    """`rows=untie` leaves the head alone; `merge` puts a LoRA on both: as a merge into a folder, which torch runs."""
    folder = made["llama"]
    for kind, tied in (("rows", "rows=untie"), ("lora at the embedding", "merge")):
        adapter = tmp_path / kind
        trained("llama", folder / "base", kind, adapter)
        ak.merge(folder / "base", adapter, tmp_path / "merged", tied=tied, overwrite=True)
        with torch.no_grad():
            wanted = loaded("llama", tmp_path / "merged")(input_ids=TOKENS).logits
        for form in FORMS:
            for verb in (ak.onnx.inject, ak.onnx.merge):
                verb(folder / f"{form}.onnx", adapter, tmp_path / "out.onnx", tied=tied)
                assert error(told(tmp_path / "out.onnx"), wanted) < 3e-6
        for verb_ in ("inject", "merge"):
            call = [verb_, folder / "shared.onnx", adapter, "-o", tmp_path / "cli.onnx", "--tied", tied, "--overwrite"]
            assert run(*call).exit_code == 0
            assert error(told(tmp_path / "cli.onnx"), wanted) < 3e-6


def test_what_nothing_tells_is_asked(made: dict[str, Path], tmp_path: Path) -> None:
    table = Target("model.embed_tokens", "in out *k")
    adapter = ak.Adapter({table: (LoRA(A=torch.randn(2, 12), B=torch.randn(8, 2)),)})
    for verb in (ak.onnx.inject, ak.onnx.merge):
        with pytest.raises(UsageError, match=r"tied=\"untie\".*tied=\"merge\""):
            verb(made["llama"] / "shared.onnx", adapter, tmp_path / "out.onnx")
        assert not (tmp_path / "out.onnx").exists()


def test_a_config_beside_the_graph_may_say_that_nothing_is_tied(made: dict[str, Path], tmp_path: Path) -> None:
    """An untied head with the embedding's numbers, as right after a model was untied: rows change the embedding."""
    base = tmp_path / "base"
    untied = loaded("llama", made["llama"] / "base")
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.save_pretrained(base)
    wanted = trained("llama", base, "rows", tmp_path / "adapter")
    graph = Path(shutil.copy(made["llama"] / "shared.onnx", tmp_path / "model.onnx"))
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    ak.onnx.inject(graph, tmp_path / "adapter", tmp_path / "out.onnx")
    assert error(told(tmp_path / "out.onnx"), wanted) < 3e-6


def test_a_quantized_head_is_tied_where_the_base_is(made: dict[str, Path], tmp_path: Path) -> None:
    """The head's numbers are only near the embedding's: without the base's config nothing proves the tie."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder, graph = made["llama"], tmp_path / "int8.onnx"
    quantize_dynamic(
        folder / "copied.onnx", graph, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"]
    )
    trained("llama", folder / "base", "trainable tokens", tmp_path / "adapter")
    weights = Path(shutil.copy(folder / "base" / "model.safetensors", tmp_path / "alone.safetensors"))
    with pytest.raises(UsageError, match=r"--base-weights DIR .*--tied merge"):
        ak.onnx.inject(graph, tmp_path / "adapter", tmp_path / "out.onnx", base_weights=weights)
    for words in ({"base_weights": folder / "base"}, {"base_weights": weights, "tied": "merge"}):
        report = ak.onnx.inject(graph, tmp_path / "adapter", tmp_path / "out.onnx", check=False, **words)
        assert len({node for place in report.found for node in place.nodes}) == 2


def test_a_base_that_is_not_the_adapters_warns_or_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    folder, adapter = made["llama"], tmp_path / "adapter"
    trained("llama", folder / "base", "rows", adapter)
    base = Path(shutil.copytree(folder / "base", tmp_path / "base"))
    for file, key, name in ((adapter / "adapter_config.json", "base_model_name_or_path", "org/one"),
                            (base / "config.json", "_name_or_path", "org/other")):  # fmt: skip
        file.write_text(json.dumps({**json.loads(file.read_text()), key: name}))
    wanted = "adapter was made for org/one; this base is org/other"
    for verb in (ak.onnx.inject, ak.onnx.merge):
        report = verb(folder / "shared.onnx", adapter, tmp_path / "out.onnx", base_weights=base)
        assert report.warnings == (wanted,)
        with pytest.raises(CheckFailed, match=r"org/one.*--strict-base \(strict_base=True\)"):
            verb(folder / "shared.onnx", adapter, tmp_path / "no.onnx", base_weights=base, strict_base=True)
    for verb_ in ("inject", "merge"):
        call = [verb_, str(folder / "shared.onnx"), str(adapter), "-o", str(tmp_path / f"{verb_}.onnx"), "--json"]
        assert run(*call, "--base-weights", base, "--strict-base").exit_code == 1
        result = run(*call, "--base-weights", base)
        assert result.exit_code == 0
        assert json.loads(result.stdout)["warnings"] == [wanted]
        assert f"warning: {wanted}" in result.stderr


def test_a_verification_warns_of_another_base(made: dict[str, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    trained("llama", made["llama"] / "base", "rows", adapter)
    base = Path(shutil.copytree(made["llama"] / "base", tmp_path / "base"))
    for file, key, name in ((adapter / "adapter_config.json", "base_model_name_or_path", "org/one"),
                            (base / "config.json", "_name_or_path", "org/other")):  # fmt: skip
        file.write_text(json.dumps({**json.loads(file.read_text()), key: name}))
    ak.merge(base, adapter, tmp_path / "out")
    wanted = "adapter was made for org/one; this base is org/other"
    found = ak.verify(tmp_path / "out", base, adapter)
    assert found.ok
    assert found.warnings == (wanted,)
    with pytest.raises(CheckFailed, match="strict_base=True"):
        ak.verify(tmp_path / "out", base, adapter, strict_base=True)
    call = ["verify", tmp_path / "out", "--base", base, "--adapter", adapter, "--json"]
    assert run(*call, "--strict-base").exit_code == 1
    result = run(*call)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["warnings"] == [wanted]
    assert f"warning: {wanted}" in result.stderr

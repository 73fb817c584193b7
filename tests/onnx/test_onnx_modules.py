"""Adapters at modules of a graph: under onnxruntime they compute what the adapters library recorded."""

import re
from functools import cache

import pytest
import torch
from adapterhub_folders import FOLDERS, ROOT, model_of, read_folder
from safetensors.torch import load_file

import adapterkit as ak

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning:(transformers|torch)")

BEHIND = {"prompt_bert", "prompt_padded_bert"}
"""Prompts behind a module of several embeddings."""

CASES = [f for f in FOLDERS if f.name not in BEHIND and model_of(f) in ("bert", "gpt2", "llama")]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """Model -> its graph."""
    folder = tmp_path_factory.mktemp("graphs")
    return cache(lambda model: ak.onnx.export_pretrained(ROOT / "models" / model, folder / model, check=False).out)


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_a_graph_computes_what_the_library_computed(folder, graphs, tmp_path, close):
    forward = load_file(folder / "forward.safetensors")
    y, graph = forward.pop("y"), graphs(model_of(folder))
    report = ak.onnx.inject(graph, read_folder(folder), tmp_path / "out.onnx")
    session = ak.onnx.Session(report.out)
    ids = forward["input_ids"]
    words = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), **forward}
    feeds = {name: words[name].numpy() for name in session.inputs}
    # The outputs at masked positions differ between releases of torch; no token reads them.
    kept = words["attention_mask"].bool()
    close(torch.tensor(session.run(feeds)["last_hidden_state"])[kept], y[kept], tolerance=1e-5)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graph.read_bytes()


@pytest.mark.parametrize("name", sorted(BEHIND))
def test_a_prompt_behind_several_embeddings(name, graphs, tmp_path, close):
    """Its tokens are numbered behind the vocabulary; the mask counts them, positions do not."""
    forward, adapter = load_file(ROOT / name / "forward.safetensors"), read_folder(ROOT / name)
    y, ids = forward.pop("y"), forward["input_ids"]
    report = ak.onnx.inject(graphs("bert"), adapter, tmp_path / "out.onnx")
    first, last = map(int, re.search(r"the ids (\d+) to (\d+)", report.note).groups())
    front = torch.arange(first, last + 1)[None].expand(len(ids), -1)
    mask = torch.cat((torch.ones_like(front), forward.get("attention_mask", torch.ones_like(ids))), 1)
    kinds = forward.get("token_type_ids", torch.zeros_like(ids))
    words = {
        "input_ids": torch.cat((front, ids), 1), "attention_mask": mask,
        "token_type_ids": torch.cat((torch.zeros_like(front), kinds), 1),
    }  # fmt: skip
    session = ak.onnx.Session(report.out)
    got = torch.tensor(session.run({name: words[name].numpy() for name in session.inputs})["last_hidden_state"])
    close(got[mask.bool()], y[mask.bool()], tolerance=1e-5)
    ak.onnx.eject(report.out, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == graphs("bert").read_bytes()

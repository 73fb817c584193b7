"""Folders that the adapters library saved read as what it held in memory, and compute what it computed."""

from functools import cache

import numpy as np
import pytest
import torch
from adapterhub_folders import FOLDERS, ROOT, model_of, read_folder
from safetensors.torch import load_file
from transformers import AutoModel, DynamicCache

import adapterkit as ak
from adapterkit.core.adapter import Step
from adapterkit.io.lazy import as_lazy


def content(adapter):
    """Every value of an adapter's updates, bits of tensors included."""
    return {
        (target, update.method, name): (leaf.shape, leaf.dtype, bytes(leaf.fetch()))
        for target, update in adapter
        for name, leaf in {n: as_lazy(t) for n, t in update.tensors.items()}.items()
    }


@cache
def state(model):
    return load_file(ROOT / "models" / model / "model.safetensors")


def built(model):
    """The model as transformers builds it, with the weights that the library had."""
    return AutoModel.from_pretrained(ROOT / "models" / model, attn_implementation="eager").eval()


def tensors(file):
    return torch.load(file, weights_only=True) if file.suffix == ".bin" else load_file(file)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_reads_as_the_library_held_it(folder):
    read, expected = read_folder(folder), ak.read(folder / "expected.native.safetensors")
    before, after = content(expected), content(read)
    assert before.keys() == after.keys()
    for key, (shape, dtype, data) in before.items():
        assert after[key][:2] == (shape, dtype)
        if key[2].endswith("projection"):  # the library and adapterkit both compute it
            values = (np.frombuffer(bits, np.float32) for bits in (data, after[key][2]))
            np.testing.assert_allclose(*values, rtol=0, atol=1e-6)
        else:
            assert after[key][2] == data
    assert {t: [u.attributes for u in us] for t, us in read.updates.items()} == {
        t: [u.attributes for u in us] for t, us in expected.updates.items()
    }
    # The reading that a file without orthogonality needs is said in the lineage; the library has no word for it.
    told = [
        Step(step.op, {name: value for name, value in step.args.items() if name != "compat"}) for step in read.recipe
    ]
    assert tuple(told) == expected.recipe


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_is_detected_as_itself_only(folder):
    assert ak.detect(folder) == "adapterhub"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("by_way_of", ["directly", "native"])
def test_writes_as_the_library_wrote_it(folder, by_way_of, tmp_path):
    adapter = read_folder(folder)
    if by_way_of == "native":
        ak.write(adapter, tmp_path / "native.safetensors")
        adapter = ak.read(tmp_path / "native.safetensors")
    assert ak.write(adapter, tmp_path / "a", "adapterhub", ROOT / "models" / model_of(folder)) == []
    written = {file.name for file in (tmp_path / "a").iterdir()}
    assert written == {f.name for f in folder.iterdir()} - {"expected.native.safetensors", "forward.safetensors"}
    for name in written:
        if name.endswith(".bin"):
            before, after = tensors(folder / name), tensors(tmp_path / "a" / name)
            assert before.keys() == after.keys()
            assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
        else:
            assert (tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_computes_what_the_library_computed(folder):
    model, forward = built(model_of(folder)), load_file(folder / "forward.safetensors")
    y = forward.pop("y")
    with torch.no_grad():
        before = model(**forward).last_hidden_state
        ak.torch.inject(model, read_folder(folder))
        after = model(**forward).last_hidden_state
    assert y.shape != before.shape or (y - before).abs().max() > 1e-2
    torch.testing.assert_close(after, y, rtol=0, atol=1e-5)


def test_the_papers_dora_is_another_than_the_librarys(tmp_path):
    """The library divides by |W + B A| whatever the scaling, and multiplies the bias too."""
    folder = ROOT / "dora_bert"
    model, forward = built("bert"), load_file(folder / "forward.safetensors")
    y, paper = forward.pop("y"), ak.read(folder, compat="formula")
    assert {update.method for _, update in paper} == {"dora"}
    ak.torch.inject(model, paper)
    with torch.no_grad():
        assert (model(**forward).last_hidden_state - y).abs().max() > 1e-2
    for adapter in (paper, ak.read(folder)):
        ak.write(adapter, tmp_path / "again", "adapterhub", base=ROOT / "models" / "bert")
        for name in ("adapter_config.json", "pytorch_adapter.bin"):
            if (folder / name).exists():
                assert (tmp_path / "again" / name).exists()
        assert ak.read(tmp_path / "again").digest() == ak.read(folder).digest()


def test_a_prefix_is_attended_to_first_and_shifts_no_position():
    folder = ROOT / "prefix_flat_llama"
    model, forward, cache = built("llama"), load_file(folder / "forward.safetensors"), DynamicCache()
    y, ids = forward.pop("y"), forward["input_ids"]
    for layer, update in enumerate(update for _, update in read_folder(folder).load()):
        keys, values = update.past()[0]
        cache.update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), layer)
    with torch.no_grad():
        positions = torch.arange(ids.shape[1])[None]
        after = model(input_ids=ids, cache=cache, position_ids=positions).last_hidden_state
    torch.testing.assert_close(after, y, rtol=0, atol=1e-5)


def test_a_network_of_a_prefix_gives_the_keys_that_the_library_had():
    """The flat tensor [n, layers, 2, heads, d] of a prefix, by its own formula."""
    folder = ROOT / "prefix_bert"
    file = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    own = {k.rpartition("self_prefix.")[2]: t for k, t in file.items() if k.startswith("prefix_tuning.")}
    h = torch.tanh(own["wte.weight"] @ own["control_trans.0.weight"].T + own["control_trans.0.bias"])
    flat = (h @ own["control_trans.2.weight"].T + own["control_trans.2.bias"]).reshape(3, 2, 2, 2, 4)
    for layer, (target, update) in enumerate(read_folder(folder).load()):
        assert target.path == f"encoder.layer.{layer}.attention.self"
        torch.testing.assert_close(update.past()[0], flat[:, layer].permute(1, 2, 0, 3))


def test_a_prompt_stands_behind_the_embeddings():
    folder = ROOT / "prompt_bert"
    model, forward = built("bert"), load_file(folder / "forward.safetensors")
    y, ((target, update),) = forward.pop("y"), read_folder(folder).load()
    module = model.get_submodule(target.path)
    module.register_forward_hook(lambda *given: torch.cat([update.embeddings().expand(2, -1, -1), given[2]], 1))
    with torch.no_grad():
        after = model(**forward).last_hidden_state
    torch.testing.assert_close(after, y, rtol=0, atol=1e-5)


def test_there_is_a_vector_of_every_method():
    methods = {update.method for folder in FOLDERS for _, update in read_folder(folder)}
    methods |= {update.method for _, update in ak.read(ROOT / "dora_bert", compat="formula")}
    assert methods == ak.FORMATS["adapterhub"].methods

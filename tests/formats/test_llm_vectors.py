"""Files that tools of language models wrote, against the weights that they folded them into."""

import json

import numpy as np
import pytest
from llm_adapters import VECTORS, merged
from safetensors.numpy import load_file

import adapterkit as ak
from adapterkit.formats import FORMATS
from adapterkit.io.hdf5 import read_hdf5
from adapterkit.io.ort_adapter import read_ort_adapter
from adapterkit.io.torch_file import read_torch_file

CASES = sorted(path.parent for path in (VECTORS / "formats").glob("*/*/expected.merged.safetensors"))
FILES = {
    "gguf": "adapter.gguf", "keras_hub": "adapter.lora.h5", "loralib": "lora.pt", "olive": "adapter.onnx_adapter",
    "torchtune": "adapter_model.pt",
}  # fmt: skip

cases = pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}/{folder.name}")


def source(folder):
    name = folder.parent.name
    own = VECTORS / "bases" / name
    return name, folder / FILES[name] if name in FILES else folder, own if own.exists() else VECTORS / "bases" / "llama"


@cases
def test_is_detected_as_itself_and_nothing_else(folder):
    name, path, _ = source(folder)
    assert [known for known in FORMATS if FORMATS[known]().sniff(path)] == [name]


@cases
def test_merges_as_the_tool_folds_it(folder, tmp_path):
    _, path, base = source(folder)
    ours, theirs = merged(base, ak.read(path, base=base), tmp_path), load_file(folder / "expected.merged.safetensors")
    before = load_file(base / "model.safetensors")
    assert any(np.abs(value - before[key]).max() > 0.1 for key, value in theirs.items())
    for key, value in theirs.items():
        assert np.abs(ours[key] - value).max() <= 1e-6 * np.abs(value).max()
    untouched = ours.keys() - theirs.keys()
    assert all(np.array_equal(ours[key], before[key]) for key in untouched)


# A LoRA of a larger rank is no Conv2d of loralib's any more.
@pytest.mark.parametrize(
    "folder", [case for case in CASES if case.name != "convolution"], ids=lambda folder: folder.name
)
def test_is_written_again_as_it_was(folder, tmp_path):
    name, path, base = source(folder)
    ak.write(ak.read(path, base=base), tmp_path / "native")
    again = tmp_path / (path.name if name in FILES else "again")
    ak.write(ak.read(tmp_path / "native"), again, name, base)
    if name == "gguf":
        assert again.read_bytes() == path.read_bytes()
    elif name == "olive":
        ours, theirs = (read_ort_adapter(file).tensors for file in (again, path))
        assert list(ours) == list(theirs)
        same(*({key: leaf.numpy() for key, leaf in each.items()} for each in (ours, theirs)))
    elif name == "keras_hub":
        same(*({key: leaf.numpy() for key, leaf in read_hdf5(file)[0].items()} for file in (again, path)))
    elif name == "mlx":
        assert (again / "adapter_config.json").read_bytes() == (path / "adapter_config.json").read_bytes()
        same(load_file(again / "adapters.safetensors"), load_file(path / "adapters.safetensors"))
    elif name == "litgpt":
        for file in ("hyperparameters.yaml", "model_config.yaml"):
            assert (again / file).read_bytes() == (path / file).read_bytes()
        same_torch(again / "lit_model.pth.lora", path / "lit_model.pth.lora")
    else:
        same_torch(again, path)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(ours[key].dtype == value.dtype and np.array_equal(ours[key], value) for key, value in theirs.items())


def same_torch(ours, theirs):
    ours, theirs = read_torch_file(ours), read_torch_file(theirs)
    assert list(ours) == list(theirs)
    same({key: leaf.numpy() for key, leaf in ours.items()}, {key: leaf.numpy() for key, leaf in theirs.items()})


def test_alpha_comes_from_the_config_that_torchtune_writes():
    folder = VECTORS / "formats" / "torchtune" / "lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter = ak.read(folder / "adapter_model.pt", base=VECTORS / "bases" / "llama")
    assert {update.scaling for _, update in adapter} == {config["lora_alpha"] / config["r"]}

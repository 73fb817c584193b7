"""Context updates: their formulas, and what may not be done with them."""

from pathlib import Path

import numpy as np
import pytest
import torch

import adapterkit as ak
from adapterkit.methods import METHODS
from adapterkit.tensors.checkpoint import open_checkpoint
from adapterkit.tensors.lazy import as_array, as_torch

VECTORS = Path(__file__).parent.parent / "spec" / "vectors" / "methods"
CONTEXT = [name for name, cls in METHODS.items() if cls.kind == "context"]
WORDS = ("embeddings", "decoder_embeddings", "past", "vocabulary")
CASES = [
    pytest.param(method, target, id=f"{method}-{target}")
    for method in CONTEXT
    for target in ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit").updates
]


def as_numpy(leaf, dtype):
    return torch.as_tensor(as_array(leaf).astype(np.float64)).to(dtype).numpy()


def tensors_of(leaf, dtype):
    return as_torch(leaf, dtype=dtype)


def said(update, inputs):
    """What an update adds, by word."""
    found = {word: getattr(update, word)() for word in WORDS}
    if update.place == "attention":
        found["attention"] = update.attention(*(inputs[name] for name in "qkv"))
    return {word: value for word, value in found.items() if value is not None}


@pytest.mark.parametrize("load", [as_numpy, tensors_of])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("method", "target"), CASES)
def test_a_formula_agrees_with_its_vector(method, target, dtype, tolerance, load):
    file = open_checkpoint(VECTORS / f"{method}.expected.safetensors")
    expected = {n.removeprefix(f"{target}."): leaf for n, leaf in file.tensors.items() if n.startswith(f"{target}.")}
    adapter = ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit")
    (update,) = adapter.updates[target]
    got = said(update.map(lambda leaf: load(leaf, dtype)), {n: load(leaf, dtype) for n, leaf in expected.items()})
    assert got.keys() == expected.keys() - {"q", "k", "v"}
    assert update.place in got
    for word, value in got.items():
        wanted = expected[word].torch()
        assert tuple(value.shape) == tuple(wanted.shape)
        assert float((torch.as_tensor(value).double() - wanted).abs().max()) <= tolerance * float(wanted.abs().max())

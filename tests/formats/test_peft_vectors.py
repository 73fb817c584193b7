"""Folders that PEFT saved read as what PEFT held in memory when it saved them."""

from pathlib import Path

import pytest

import adapterkit as ak
from adapterkit.io.lazy import as_lazy

FOLDERS = sorted(path.parent for path in Path(__file__).parents[2].glob("spec/vectors/formats/peft/*/*.json"))


def read_folder(folder):
    """With its base, where it has one: what is drawn again is of a size that only that tells."""
    base = folder / "base.safetensors"
    return ak.read(folder, base=base if base.exists() else None)


def content(adapter):
    """Every value of an adapter's updates, bits of tensors included."""
    return {
        (target, update.method, name): (leaf.shape, leaf.dtype, bytes(leaf.fetch()))
        for target, update in adapter
        for name, leaf in {n: as_lazy(t) for n, t in update.tensors.items()}.items()
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_reads_as_peft_held_it(folder):
    read, expected = read_folder(folder), ak.read(folder / "expected.native.safetensors")
    assert content(read) == content(expected)
    assert {t: [u.attributes for u in us] for t, us in read.updates.items()} == {
        t: [u.attributes for u in us] for t, us in expected.updates.items()
    }
    assert read.recipe == expected.recipe
    assert read.digest() == expected.digest()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_writes_as_peft_wrote_it(folder, tmp_path):
    base = folder / "base.safetensors"
    ak.write(read_folder(folder), tmp_path / "a", "peft", base=base if base.exists() else None)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            assert (tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes()


def test_there_is_a_vector_of_every_method():
    methods = {update.method for folder in FOLDERS for _, update in read_folder(folder)}
    assert methods == ak.FORMATS["peft"].methods

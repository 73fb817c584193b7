"""Files of every format: detected as themselves; those from published layouts alone read as what these say."""

import numpy as np
import pytest
import torch
from format_vectors import EVERY, ROOT, base, source

import adapterkit as ak
from adapterkit.formats import FORMATS
from adapterkit.io.lazy import as_lazy

MADE = sorted(path.stem for path in (ROOT.parents[1] / "tools" / "vectors" / "formats").glob("[a-z]*.py"))
"""Formats whose files were built from the published layout."""
CASES = sorted(path.parent for name in MADE for path in (ROOT / "formats" / name).glob("*/expected.native.safetensors"))

cases = pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")


def content(adapter):
    return [
        (target, update.method, update.attributes, {n: as_lazy(leaf).numpy() for n, leaf in update.tensors.items()})
        for target, update in sorted(adapter, key=lambda pair: str(pair[0]))
    ]


def same(one, other):
    assert [each[:3] for each in one] == [each[:3] for each in other]
    for (*_, ours), (*_, theirs) in zip(one, other, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[n], value) and ours[n].dtype == value.dtype for n, value in theirs.items())


def test_every_format_has_a_vector():
    assert {path.name for path in (ROOT / "formats").iterdir()} == set(FORMATS) - {"adapterkit"}


@pytest.mark.parametrize("folder", EVERY, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_is_detected_as_itself_and_nothing_else(folder):
    found = [name for name in FORMATS if FORMATS[name]().sniff(source(folder))]
    assert found == [folder.parent.name]


@cases
def test_reads_as_what_the_layout_says(folder):
    same(content(ak.read(source(folder), base=base(folder))), content(ak.read(folder / "expected.native.safetensors")))


@cases
def test_comes_back_by_way_of_the_native_format(folder, tmp_path):
    path, name = source(folder), folder.parent.name
    ak.write(ak.read(path, base=base(folder)), tmp_path / "native")
    again = tmp_path / "out" / path.name
    again.parent.mkdir()
    ak.write(ak.read(tmp_path / "native"), again, name, base(folder))
    same(content(ak.read(again, name, base(folder))), content(ak.read(folder / "expected.native.safetensors")))


@pytest.mark.parametrize("path", sorted((ROOT / "formats").glob("*/*/*.pt")), ids=lambda path: path.parent.name)
def test_torch_reads_the_files_that_are_torch_s(path):
    assert torch.load(path, weights_only=True)

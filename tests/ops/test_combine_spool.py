"""Results beyond some memory are kept in a temporary file until they are written."""

from __future__ import annotations

import gc
import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import StorageError
from adapterkit.io import computed
from adapterkit.io.lazy import DTYPES, from_numpy
from adapterkit.methods import METHODS

SIZE, RANK, TARGETS = 512, 16, 24


def _adapters(count: int) -> list[Adapter]:
    def lora(*seed: int) -> object:
        random = np.random.default_rng(seed)
        A, B = random.standard_normal((RANK, SIZE)), random.standard_normal((SIZE, RANK))
        return METHODS["lora"](**{name: from_numpy(X.astype(np.float32)) for name, X in {"A": A, "B": B}.items()})

    return [Adapter({Target(f"layers.{i}.q"): (lora(t, i),) for i in range(TARGETS)}) for t in range(count)]  # type: ignore[misc]


@pytest.mark.parametrize("kind", ["F32", "F64", "BF16", "F16"])
def test_what_is_kept_in_a_file_is_what_was_given(kind: str) -> None:
    kept, values = computed.Spool(memory=100), np.random.default_rng(0).standard_normal((3, 5, 7))
    leaves = [kept.rounded_lazy(values[n], DTYPES[kind]) for n in range(3)] + [
        kept.rounded_lazy(values[:0], DTYPES[kind])
    ]
    for n, leaf in enumerate(leaves[:3]):
        wanted = values[n].astype(DTYPES[kind].array)
        assert leaf.shape == (5, 7)
        assert bytes(leaf.fetch()) == wanted.tobytes()
    assert leaves[3].shape == (0, 5, 7)
    assert bytes(leaves[3].fetch()) == b""


def test_the_result_is_the_same_and_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = _adapters(4)
    whole = ak.ops.combine(adapters, "tsv", workers=1)
    wanted = {target: whole.delta(str(target)) for target, _ in whole}
    size = sum(leaf.nbytes for _, update in whole for leaf in update.tensors.values())  # type: ignore[union-attr]
    monkeypatch.setattr(computed.Spool.__init__, "__defaults__", (1 << 20,))
    tracemalloc.start()
    made = ak.ops.combine(adapters, "tsv", workers=1)
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size >= 6 << 20
    assert held < 3 << 20
    for target, change in wanted.items():
        np.testing.assert_array_equal(made.delta(str(target)), change)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files by /proc")
def test_the_file_goes_with_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed.Spool.__init__, "__defaults__", (0,))

    def temporary() -> int:
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return sum(link.startswith(tempfile.gettempdir()) for link in links)

    gc.collect()
    before = temporary()
    made = ak.ops.combine(_adapters(2), "tsv")
    assert temporary() == before + 1
    del made
    gc.collect()
    assert temporary() == before


def test_a_full_disk_is_an_error_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed.Spool.__init__, "__defaults__", (0,))

    def full(*_: object, **__: object) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(StorageError, match="no space") as caught:
        ak.ops.combine(_adapters(2), "tsv")
    assert tempfile.gettempdir() in str(caught.value)

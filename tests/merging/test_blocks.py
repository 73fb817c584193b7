"""Blocks of an output tensor are grouped into runs of about the wanted number of bytes."""

from __future__ import annotations

import pytest

from adapterkit.merging.blocks import Block, runs


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("nbytes", [1, 96, 97, 1000])
def test_a_run_ends_with_the_block_that_fills_it(itemsize: int, nbytes: int) -> None:
    blocks = [Block(None, start, min(start + 3, 50), 50, 8) for start in range(0, 50, 3)]
    found = list(runs(blocks, nbytes, itemsize))
    assert [block for run in found for block in run] == blocks
    sizes = [[(block.stop - block.start) * 8 * itemsize for block in run] for run in found]
    for run in sizes:
        assert sum(run[:-1]) < nbytes
    for run in sizes[:-1]:
        assert sum(run) >= nbytes

"""`combine` keeps freed memory: the system counts the pages that a process faults in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
if sys.argv[1] == "kept":
    from adapterkit.cli._allocator import keep_freed_memory
    keep_freed_memory()
def work(_):
    values = np.ones(1_000_000)
    sizes = np.abs(values)
    del values
    return bool((sizes > 0).all())
with ThreadPoolExecutor(2) as pool:
    list(pool.map(work, range(10)))  # The first rounds fault in what the later ones can use again.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    list(pool.map(work, range(40)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(word: str) -> int:
    ran = subprocess.run([sys.executable, "-c", ROUNDS, word], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_arrays_are_not_mapped_again() -> None:
    assert _faults("kept") < _faults("not") / 4

"""`combine` keeps freed memory: the system counts the pages that a process faults in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

ROUNDS = """
import resource
from threading import Thread
import numpy as np
from adapterkit.cli.combine import keep_freed_memory

def work():
    for number in range(60):
        if number == 20:  # The first rounds fault in what the later ones can use again.
            first.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)
        values = np.ones(3_000_000)
        sizes = np.abs(values)
        mask = sizes > 0
        del values, sizes, mask
    last.append(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt)

keep_freed_memory()
first, last = [], []
threads = [Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(last) - sum(first))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
@pytest.mark.parametrize("attempt", range(3))
def test_freed_arrays_are_not_mapped_again(attempt: int) -> None:
    """Without the settings, two threads fault in 88,000 pages in most attempts."""
    ran = subprocess.run([sys.executable, "-c", ROUNDS], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000, attempt

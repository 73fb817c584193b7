"""Make the C library keep the memory of freed arrays, for commands that compute with large temporary arrays."""

from __future__ import annotations

import sys

_THRESHOLDS = {-3: 32 << 20, -1: 64 << 20, -2: 16 << 20}
"""Names of glibc's `mallopt` (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD) and their values in bytes."""


def keep_freed_memory() -> None:
    """Let the process use freed memory again, up to 64 MB, instead of returning it to the system after each array.

    By default, glibc unmaps an array of a few megabytes when it is freed, and the kernel must map and zero new pages
    for the next array. This took a quarter of the time of `combine --method knots_ties`. Only commands call this
    function, because it changes the whole process. It does nothing if the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    import ctypes

    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:  # Other C libraries lack the function.
        for name, size in _THRESHOLDS.items():
            set_option(name, size)

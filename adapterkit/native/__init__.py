"""The compiled loops: `merge.c`, `normalize.c`, `quantize.c`, `ggml.c`, `dropping.c`, in one library that ctypes loads.

Each loop computes the same bits as the numpy code that it replaces. If the library is missing or does not run on this
processor, numpy computes everything. `ADAPTERKIT_KERNEL=off` disables the library.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

LIBRARY = "_kernel.dll" if sys.platform == "win32" else "_kernel.so"
"""Name of the compiled library, next to this file."""

VERSION = 11
"""The version that the library must report; a library of another version is not used."""

OFF = "ADAPTERKIT_KERNEL"
"""The environment variable that disables the library if its value is `off` or `0`."""

KINDS = {"BF16": 0, "F16": 1, "F32": 2}
"""A map from each element type to its code in the library."""

MOST_LANES = 16
"""Largest number of elements that one step of a merge computes: 16 on processors with AVX-512, 8 on all others."""

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_WORD, _DOUBLE = ctypes.c_uint64, ctypes.c_double


@cache
def loops() -> ctypes.CDLL | None:
    """Load the compiled library. Return None if it is missing, does not run on this processor, or is disabled."""
    if os.environ.get(OFF, "").lower() in ("off", "0"):
        return None
    try:
        loaded = ctypes.CDLL(str(Path(__file__).with_name(LIBRARY)))
        loaded.adapterkit_runs.restype = _INT
        if loaded.adapterkit_runs() != VERSION:
            return None
    except (OSError, AttributeError):
        return None
    loaded.adapterkit_lanes.restype, loaded.adapterkit_lanes.argtypes = _INT, (_INT,)
    loaded.adapterkit_lanes(MOST_LANES)
    for name in ("add", "normalize"):
        function = getattr(loaded, f"adapterkit_{name}")
        function.restype = _LONG
        function.argtypes = (_INT, _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER)
    loaded.adapterkit_drop.restype = _INT
    loaded.adapterkit_drop.argtypes = (_POINTER, _LONG, _LONG, _WORD, _WORD, _DOUBLE, _DOUBLE, _INT)
    for name in ("levels", "indices"):
        function = getattr(loaded, f"adapterkit_{name}")
        function.restype = _INT
        function.argtypes = (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER)
    loaded.adapterkit_from_levels.restype = None
    loaded.adapterkit_from_levels.argtypes = (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT, _POINTER)
    loaded.adapterkit_grids.restype = _INT
    loaded.adapterkit_grids.argtypes = (_POINTER, _LONG, _LONG, _POINTER, _POINTER, _FLOAT, _FLOAT, _POINTER, _POINTER)
    loaded.adapterkit_e2m1.restype, loaded.adapterkit_e2m1.argtypes = None, (_POINTER, _LONG, _POINTER)
    for name in ("encode", "decode"):
        function = getattr(loaded, f"adapterkit_ggml_{name}")
        function.restype, function.argtypes = _INT, (_INT, _POINTER, _LONG, _POINTER, _LONG)
    loaded.adapterkit_damage.restype = None
    loaded.adapterkit_damage.argtypes = (_INT, _INT, _POINTER, _POINTER, _POINTER, _LONG, _POINTER)
    return loaded

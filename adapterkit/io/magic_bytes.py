"""Recognize the type of a tensor file by its magic bytes, without importing a reader."""

from __future__ import annotations

import os

from ..errors import AdapterkitError
from .inputs import open_input

GGUF = b"GGUF"
GGLA = b"algg"
"""The letters of `ggla` in reverse order, because the file stores the integer 0x67676c61 in little-endian order."""
NPY = b"\x93NUMPY"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a GGUF file; never raises an error."""
    return has_mark(path, GGUF)


def is_ggla(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like an adapter of llama.cpp before GGUF; never raises an error."""
    return has_mark(path, GGLA)


def is_npy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a `.npy` file; never raises an error."""
    return has_mark(path, NPY)


def has_mark(path: str | os.PathLike[str], mark: bytes, at: int = 0) -> bool:
    """Whether a file has these bytes at an offset; never raises an error."""
    try:
        with open_input(path) as file:
            return file.read(at + len(mark))[at:] == mark
    except (OSError, AdapterkitError):
        return False

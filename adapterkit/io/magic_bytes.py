"""Magic bytes of tensor files, which show a file's type without importing its reader."""

from __future__ import annotations

import os

from ..errors import AdapterkitError
from .inputs import open_input

GGUF = b"GGUF"
GGLA = b"algg"
"""The number 0x67676c61 in little-endian order, so the letters of `ggla` are reversed."""
NPY = b"\x93NUMPY"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like GGUF; never raises."""
    return has_mark(path, GGUF)


def is_ggla(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like llama.cpp's format before GGUF; never raises."""
    return has_mark(path, GGLA)


def is_npy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a numpy array; never raises."""
    return has_mark(path, NPY)


def has_mark(path: str | os.PathLike[str], mark: bytes, at: int = 0) -> bool:
    """Whether a file has these bytes at an offset; never raises."""
    try:
        with open_input(path) as file:
            return file.read(at + len(mark))[at:] == mark
    except (OSError, AdapterkitError):
        return False

"""What files of tensors begin with: enough to tell them apart, and to leave what reads them unimported."""

from __future__ import annotations

import os

from ..errors import AdapterkitError
from .inputs import open_input

GGUF = b"GGUF"
GGLA = b"algg"
"""The number 0x67676c61, little-endian."""
NPY = b"\x93NUMPY"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a GGUF file; no error is raised."""
    return has_mark(path, GGUF)


def is_ggla(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like one of llama.cpp's before GGUF; no error is raised."""
    return has_mark(path, GGLA)


def is_npy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like an array of numpy's; no error is raised."""
    return has_mark(path, NPY)


def has_mark(path: str | os.PathLike[str], mark: bytes, at: int = 0) -> bool:
    """Whether these bytes stand at a place of a file; no error is raised."""
    try:
        with open_input(path) as file:
            return file.read(at + len(mark))[at:] == mark
    except (OSError, AdapterkitError):
        return False

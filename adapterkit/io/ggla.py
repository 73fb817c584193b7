"""Read `ggla` files, the format of llama.cpp's LoRA adapters before GGUF. Every size is checked.

Format: convert-lora-to-ggml.py, part of llama.cpp until 2024.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import Malformed, Unsupported, storage_error
from .inputs import open_input
from .lazy import DTYPES, Lazy, Span
from .magic_bytes import GGLA

TYPES = {0: "F32", 1: "F16"}


@dataclass(frozen=True, slots=True, eq=False)
class Ggla:
    """The content of a file: rank, alpha, and the tensors by name, with axes in numpy's order."""

    rank: int
    alpha: int
    tensors: Mapping[str, Lazy]


def read_ggla(path: str | os.PathLike[str]) -> Ggla:
    """Read the headers of all tensors.

    Raises:
        Malformed: a size is out of range, or tensor data lies outside the file.
        Unsupported: the version is unknown, or a tensor is quantized.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            return _read(file, os.fspath(path), os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise storage_error(error, path) from error


def _read(file: BinaryIO, path: str, size: int) -> Ggla:
    def damaged(why: str) -> Malformed:
        return Malformed(why, path=path, where=f"byte {file.tell()}", cure="Fetch or write the file again")

    def numbers(count: int) -> tuple[int, ...]:
        data = file.read(4 * count)
        if len(data) != 4 * count:
            raise damaged("the file ends too early")
        return struct.unpack(f"<{count}i", data)

    if file.read(4) != GGLA:
        raise damaged("this is not a ggla file")
    version, rank, alpha = numbers(3)
    if version != 1:
        raise Unsupported(f"the file has ggla version {version}", path=path, cure="Convert the adapter to GGUF")
    if rank < 1:
        raise damaged(f"the rank is {rank}")
    tensors: dict[str, Lazy] = {}
    while file.tell() < size:
        axes, length, kind = numbers(3)
        if not 1 <= axes <= 4 or not 1 <= length <= 1 << 12:
            raise damaged(f"a tensor has {axes} axes and a name of {length} bytes")
        shape = numbers(axes)[::-1]
        name = file.read(length).decode("utf-8", "replace")
        if kind not in TYPES:
            raise Unsupported(f"the tensor has type {kind}", path=path, where=name, cure="Convert it to F32 or F16")
        # The writer aligns each tensor's data to 32 bytes.
        start = -(-file.tell() // 32) * 32
        nbytes = math.prod(shape) * DTYPES[TYPES[kind]].itemsize
        if min(shape) < 1 or start + nbytes > size or name in tensors:
            raise damaged(f"{name!r} {list(shape)} does not fit the file, or occurs twice")
        span = Span(path, start, nbytes)
        tensors[name] = Lazy(shape, DTYPES[TYPES[kind]], None, span)
        file.seek(start + nbytes)
    return Ggla(rank, alpha, tensors)

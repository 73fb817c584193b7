"""Read and write `.npy` and `.npz` files. Arrays are read lazily. Nothing is unpickled, and every size is checked.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, BinaryIO

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, Malformed, Unsupported, shown, storage_error
from .atomic import replacing
from .inputs import NPY, open_input
from .lazy import DTYPES, DType, Lazy, Span

MAX_HEADER = 1 << 16
MAX_MEMBERS = 1 << 17
MAX_MEMBER = 8 << 30
UNPACKED = 64 << 20
EXPANDED = 64
"""An archive may expand to `UNPACKED` bytes, or to `EXPANDED` times its size if that is more.

Without a limit, an archive of 1 MB could expand to 1 GB.
"""

BY_NUMPY: dict[str, DType] = {}
for _dtype in DTYPES.values():
    if _dtype.numpy[1] != "u" or not _dtype.floating:
        BY_NUMPY.setdefault(_dtype.numpy, _dtype)
BY_NUMPY["|V2"] = DTYPES["BF16"]
"""A map from the `descr` in a numpy header to the element type.

numpy has no bfloat16. TensorRT-LLM saves bfloat16 arrays as `|V2`, which means two bytes without a type.
"""

_DESCR = {dtype.name: descr for descr, dtype in BY_NUMPY.items()}


def read_npy(path: Path) -> Lazy:
    """Return the array in a `.npy` file.

    Raises:
        Malformed: the file is not a `.npy` file, or its length does not match the shape and dtype in its header.
        Unsupported: the dtype is not in `BY_NUMPY` (objects, records or big-endian numbers, for example), or the array
            is in Fortran order.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            shape, dtype, start = _header(file, str(path))
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise storage_error(error, path) from error
    span = Span(os.fspath(path), start, math.prod(shape) * dtype.itemsize)
    if start + span.nbytes != size:
        why = f"shape {list(shape)} in {dtype} needs {span.nbytes} bytes, but {size - start} bytes follow the header"
        raise _damaged(str(path), why)
    return Lazy(shape, dtype, None, span)


def write_npy(path: Path, tensor: Lazy) -> None:
    """Write an array atomically, with the same bytes as numpy."""
    with replacing(path) as file:
        file.write(_head(tensor))
        file.write(tensor.fetch())


def read_npz(path: Path) -> dict[str, Lazy]:
    """Return the arrays in a `.npz` archive by name; each array is read when it is fetched.

    Raises:
        Malformed: as for `read_npy`; or the archive is damaged or too large, or an entry is not a `.npy` file.
        Unsupported, StorageError: as for `read_npy`.
    """
    tensors: dict[str, Lazy] = {}
    try:
        with open_input(path) as file, zipfile.ZipFile(file) as archive:
            most = max(UNPACKED, EXPANDED * os.fstat(file.fileno()).st_size)
            total = sum(info.file_size for info in archive.infolist())
            if total > most:
                raise _damaged(str(path), f"the arrays take {total:,} bytes; the limit is {most:,}", "directory")
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in tensors or len(tensors) >= MAX_MEMBERS:
                    why = f"the entry is not a .npy file or occurs twice, or there are over {MAX_MEMBERS:,} entries"
                    raise _damaged(str(path), why, info.filename)
                tensors[name] = _member(archive, info, path)
    # `zipfile` raises NotImplementedError if it does not know the compression or the version of the archive.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, struct.error) as error:
        raise _damaged(str(path), f"the file is not an archive of arrays ({str(error)[:80]})") from None
    except OSError as error:
        raise storage_error(error, path) from error
    return tensors


def write_npz(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write an archive like that of `numpy.savez`, atomically and with one array in memory at a time."""
    with replacing(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, tensor in tensors.items():
            # Use a fixed date, so that the same arrays give the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as member:
                member.write(_head(tensor))
                member.write(tensor.fetch())


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Lazy:
    if info.file_size > MAX_MEMBER:
        raise _damaged(str(path), f"the array has {info.file_size:,} bytes; the limit is {MAX_MEMBER:,}", info.filename)
    try:
        with archive.open(info) as file:
            shape, dtype, start = _header(file, str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(str(path), str(error)[:80], info.filename) from None
    size = math.prod(shape) * dtype.itemsize
    if start + size != info.file_size:
        have = info.file_size - start
        why = f"shape {list(shape)} in {dtype} needs {size} bytes, but {have} bytes follow the header"
        raise _damaged(str(path), why, info.filename)

    def fetch() -> bytes:
        try:
            # Open the archive again at each fetch, so that no file stays open between fetches.
            with zipfile.ZipFile(path) as again, again.open(info.filename) as file:
                file.read(start)
                return file.read(size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise _damaged(str(path), str(error)[:80], info.filename) from None

    return Lazy(shape, dtype, fetch)


def _header(file: BinaryIO | IO[bytes], path: str) -> tuple[tuple[int, ...], DType, int]:
    head = file.read(8)
    if len(head) < 8 or head[:6] != NPY or head[6] not in (1, 2, 3):
        raise _damaged(path, "the file is not a numpy array")
    wide = head[6] > 1
    length = file.read(4 if wide else 2)
    count = struct.unpack("<I" if wide else "<H", length)[0] if len(length) == (4 if wide else 2) else MAX_HEADER + 1
    if count > MAX_HEADER:
        raise _damaged(path, f"the header is cut short, or has more than {MAX_HEADER:,} bytes")
    try:
        # The format defines the header as a Python literal. literal_eval runs no code, and the length is limited above.
        fields = ast.literal_eval(file.read(count).decode("utf-8").strip())
        shape, descr, fortran = fields["shape"], fields["descr"], fields["fortran_order"]
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError):
        raise _damaged(path, "the header is invalid") from None
    if (
        not isinstance(shape, tuple)
        or len(shape) > 32
        or any(type(n) is not int or not 0 <= n < 1 << 63 for n in shape)
    ):
        raise _damaged(path, f"the shape {shown(shape)} is invalid")
    if not isinstance(descr, str) or descr not in BY_NUMPY or fortran:
        order = " in Fortran order" if fortran else ""
        why = f"arrays of dtype {shown(descr)}{order} are not supported"
        cure = "Save the array in C order, with a little-endian float or integer dtype"
        raise Unsupported(why, path=path, where="header", cure=cure)
    return shape, BY_NUMPY[descr], len(head) + len(length) + count


def _head(tensor: Lazy) -> bytes:
    descr = _DESCR.get(tensor.dtype.name)
    if descr is None:
        raise Unsupported(f"numpy has no element type {tensor.dtype}", cure="Convert the adapter to F32 first")
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
    # Pad the header as numpy does: the data starts at a multiple of 64 bytes, so that memory maps are aligned.
    room = -(len(text) + 11) % 64
    return NPY + b"\1\0" + struct.pack("<H", len(text) + room + 1) + text.encode() + b" " * room + b"\n"


def _damaged(path: str, why: str, where: str = "header") -> Malformed:
    return Malformed(why, path=path, where=where, cure=DOWNLOAD_OR_WRITE_AGAIN)

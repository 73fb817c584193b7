"""Read state dicts from torch's `.bin`, `.pt` and `.pth` files, without torch and without running code from the files.

`torch.save` writes one of two containers: a zip archive (since torch 1.6), or a sequence of pickles (before).

The module `torch_pickle` interprets the pickles. Format: torch/serialization.py (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, TypeVar

from ..errors import AdapterkitError, Malformed, Path, storage_error
from .inputs import kept, open_input
from .lazy import Lazy, Span, read_span
from .torch_pickle import ALONE, Machine, Storage, View, damaged, kind_of, refused, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .lazy import Lazy


LIMIT = 32 << 20
"""The largest size of a pickle or of a zip directory, in bytes. 32 MiB are enough for about 100,000 tensors."""


MAX_ENTRIES = 1 << 17
"""The largest number of entries in an archive. It allows one entry per tensor of the largest models (about 100,000)."""

_ENTRY = 128
"""The assumed size of an entry in the directory, in bytes. The entries that torch writes have 60 to 80 bytes."""

_TAIL = (1 << 16) + 22 + 20 + 56
"""Zip's "end of central directory" records must be in the last `_TAIL` bytes of an archive. A comment of up to 64 KiB
may follow these records."""


class Capped(io.BufferedReader):
    """A file that refuses to read more than `LIMIT` bytes at a time.

    Without this limit, `zipfile` would read as many bytes as an archive claims for its directory.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LIMIT:
            raise refused(f"a zip directory or a pickle has {size} bytes; at most {LIMIT} are read")
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        self.seek(offset)
        data = self.read(size)
        if len(data) != size:
            raise damaged("the file ends too early", f"byte {offset + len(data)}")
        return data


Contents = tuple[object, dict[str, int]]
"""The unpickled value, and a map from each storage's key to the offset of the storage's bytes in the file."""


def is_archive(file: Capped) -> bool:
    """Whether a zip archive has an entry `*/data.pkl`, as every archive of `torch.save` does.

    Raises:
        Malformed: the file is not a zip archive.
    """
    return bool(_roots(info.filename for info in _entries(file)))


def read_zip(file: Capped, size: int) -> Contents:
    """Return the content of an archive of torch 1.6 or later.

    Raises:
        Malformed: the archive is not as `torch.save` writes it.
        Unsupported: data is compressed or big-endian, or the pickle has an opcode or global that no state dict needs.
    """
    entries = _distinct(_entries(file))
    roots = _roots(entries)
    if len(roots) != 1:
        raise damaged(f"the archive has {len(roots)} entries named */data.pkl; it must have one", "directory")
    root = roots[0]
    _check_byteorder(file, entries.get(f"{root}/byteorder"), size)
    value, storages = _read_pickle(file, entries[f"{root}/data.pkl"], size)
    return value, {
        key: _storage_offset(file, entries.get(f"{root}/data/{key}"), storage, size)
        for key, storage in storages.items()
    }


def _read_pickle(file: Capped, info: zipfile.ZipInfo, size: int) -> tuple[object, dict[str, Storage]]:
    stream = io.BytesIO(file.at(_data_offset(file, info, size), info.file_size))
    machine = Machine(short(info.filename))
    value = machine.load(stream)
    if stream.read(1):
        raise damaged("bytes follow the end of the pickle", machine.place)
    return value, machine.storages


def _entries(file: Capped) -> list[zipfile.ZipInfo]:
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    # `zipfile` raises NotImplementedError if it does not know the compression or the version of the archive.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, struct.error) as error:
        raise damaged(f"the zip archive is broken: {short(str(error))}", "directory") from error


def _check_directory(file: Capped) -> None:
    """Check the number of entries in an archive before `zipfile` creates an object of 600 bytes for each of them.

    Raises:
        Malformed: the archive has no directory at its end.
        Unsupported: the archive has too many entries.
    """
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - _TAIL)
    tail = file.at(start, size - start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise damaged("the zip archive is broken: it has no directory at its end", "directory")
    count, length = struct.unpack_from("<HI", tail, at + 10)
    wide = tail.rfind(b"PK\6\6", 0, at)
    if wide >= 0 and len(tail) - wide >= 56:
        count, length = struct.unpack_from("<QQ", tail, wide + 32)
    # Limit the directory's length too, because the stated number of entries can be forged.
    if max(count, length // _ENTRY) > MAX_ENTRIES:
        raise refused(f"the archive has {count:,} entries; at most {MAX_ENTRIES:,} are read", "directory")


def _distinct(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the entries, keyed by name. Refuse duplicate names, and names that lead outside the archive."""
    for name in (info.orig_filename for info in infos):
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise damaged(f"an entry named {short(name)} leads outside the archive", "directory")
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise damaged("two entries have the same name", "directory")
    return entries


def _roots(names: Iterable[str]) -> list[str]:
    return [name[: -len("/data.pkl")] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]


def _check_byteorder(file: Capped, info: zipfile.ZipInfo | None, size: int) -> None:
    if info is None:
        return
    order = file.at(_data_offset(file, info, size), min(info.file_size, 16))
    if order != b"little":
        raise refused(f"the byte order is {short(order.decode('latin-1'))}", "byteorder")


def _data_offset(file: Capped, info: zipfile.ZipInfo, size: int) -> int:
    """Return the offset of an entry's bytes. They follow the entry's local header, whose length varies."""
    where = short(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise refused("an entry is compressed or encrypted, which torch.save never does", where)
    if not 0 <= info.header_offset < size:
        raise damaged("the entry's header is outside the file", where)
    signature, name, extra = struct.unpack("<4s22xHH", file.at(info.header_offset, 30))
    offset = int(info.header_offset + 30 + name + extra)
    if signature != b"PK\3\4" or info.compress_size != info.file_size or offset + info.file_size > size:
        raise damaged("the entry's header is invalid, or its data extends beyond the end of the file", where)
    return offset


def _storage_offset(file: Capped, info: zipfile.ZipInfo | None, storage: Storage, size: int) -> int:
    if info is None:
        raise damaged("the archive has no entry for this storage", storage.where)
    if info.file_size // storage.dtype.itemsize != storage.numel:
        why = f"the pickle gives the storage {storage.numel} elements, but its entry has {info.file_size} bytes"
        raise damaged(why, storage.where)
    return _data_offset(file, info, size)


def read_legacy(file: Capped, size: int) -> Contents:
    """Return the content of a file from torch before 1.6: a sequence of pickles. The errors are those of `read_zip`."""
    # The file begins with the pickles, but does not state their length. So read the first `LIMIT` bytes of the file;
    # longer pickles are not supported.
    stream = io.BytesIO(file.at(0, min(size, LIMIT)))
    machine = Machine("pickles")
    magic, version, system, value, keys = (machine.load(stream) for _ in range(5))
    if magic != MAGIC or version != 1001 or type(system) is not dict:
        raise damaged("the file does not begin with the header that torch.save writes", "pickles")
    if system.get("little_endian") is not True:
        raise refused("the file is not marked as little-endian", "pickles")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise damaged("the storages' keys are not a list of distinct strings", "pickles")
    if set(keys) != set(machine.storages):
        raise damaged("the listed storages differ from the storages that the tensors use", "pickles")
    return value, _walk(file, [machine.storages[key] for key in keys], stream.tell(), size)


def _walk(file: Capped, storages: list[Storage], offset: int, size: int) -> dict[str, int]:
    """Return the offset of each storage's bytes.

    In the file, an int64 with the storage's number of elements comes before the storage's bytes.
    """
    places = {}
    for storage in storages:
        count = int.from_bytes(file.at(offset, 8), "little")
        places[storage.key] = offset + 8
        offset += 8 + storage.nbytes
        if count != storage.numel or offset > size:
            why = (
                f"the storage has {storage.numel} elements in the pickle and {count} in its header, or it extends "
                f"beyond the end of the file at byte {size}"
            )
            raise damaged(why, storage.where)
    if offset != size:
        raise damaged(f"{size - offset} bytes follow the last storage", f"byte {offset}")
    return places


# Convert the unpickled value of a torch file: to a checked state dict of lazy tensors, or to nested dicts and lists.


Places = Mapping[str, int]
"""A map from the key of each storage to the offset of its bytes in the file."""

_DEEPEST = 8
"""The largest number of levels of nested dicts and lists."""
_VALUES = 1 << 20
"""The largest number of values in a pickle. This is ten times the number of tensors in the largest files."""
_EXPANDED = 256 << 20
"""The largest size of tensors with overlapping elements, in bytes. A tensor's size here is its size as a contiguous
tensor. `state_dict` limits the total size of these tensors in a file. `nested` limits the size of each tensor."""
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def state_dict(path: str, value: object, places: Places) -> dict[str, Lazy]:
    """Return the tensors of a state dict by name.

    Raises:
        Malformed: the value is not a state dict, or its tensors with overlapping elements are too large.
    """
    return _lazies(path, _checked(value), places)


def nested(path: str, value: object, places: Places) -> object:
    """Return an unpickled value with lazy tensors. The value may consist of nested dicts, lists and tuples.

    Raises:
        Malformed: there are too many values or levels, or a tensor with overlapping elements is too large. A value is
            counted each time that the pickle refers to it: a few hundred bytes of references can describe billions of
            values.
    """
    left = [_VALUES]

    def plain(value: object, depth: int) -> object:
        left[0] -= 1
        if depth > _DEEPEST or left[0] < 0:
            raise damaged(f"there are more than {_VALUES:,} values, or more than {_DEEPEST} nested levels", "top level")
        if type(value) is View:
            return _lazies(path, {"tensor": value}, places)["tensor"]
        if type(value) is dict:
            return {name: plain(inner, depth + 1) for name, inner in value.items()}
        if type(value) is list:
            return [plain(inner, depth + 1) for inner in value]
        if type(value) is tuple:
            return tuple(plain(inner, depth + 1) for inner in value)
        return value

    return plain(value, 0)


def _checked(value: object) -> dict[str, View]:
    if type(value) is dict:
        value = _unwrapped(value)
    if type(value) is not dict:
        raise Malformed(
            f"the file holds a value of type {kind_of(value)}, not a dict of tensors", where="top level", cure=ALONE
        )
    for name, view in value.items():
        if type(name) is not str or not name.isprintable():
            raise Malformed("the entry's name is not printable text", where=f"entry {short(str(name))}", cure=ALONE)
        if type(view) is not View:
            raise Malformed(f"the entry has type {kind_of(view)}, not tensor", where=f"entry {short(name)}", cure=ALONE)
    return value


def _unwrapped(value: Mapping[object, object]) -> object:
    wrapper = next((name for name in _WRAPPERS if type(value.get(name)) is dict), None)
    if wrapper is None:
        return value
    if len(value) > 1:
        beside = next(name for name in value if name != wrapper)
        why = f"the file has this entry next to the dict {wrapper!r}, which must be the only entry"
        raise Malformed(why, where=f"entry {short(str(beside))}", cure=ALONE)
    return value[wrapper]


def _lazies(path: str, views: dict[str, View], places: Places) -> dict[str, Lazy]:
    lazies = {name: _lazy(path, view, places[view.storage.key]) for name, view in views.items()}
    # Limit the size of tensors with overlapping elements. With a stride of 0, a few bytes can describe gigabytes.
    expanded = {name: lazies[name].nbytes for name, view in views.items() if prod(view.shape) > view.extent}
    if sum(expanded.values()) > _EXPANDED:
        largest = max(expanded, key=lambda name: expanded[name])
        why = f"tensors with overlapping elements would take {sum(expanded.values())} bytes, more than {_EXPANDED}"
        cure = "Before you save the tensors, call `.clone()` on each, or save them as they were before `expand`"
        raise Malformed(why, where=f"entry {short(largest)}", cure=cure)
    return lazies


def _lazy(path: str, view: View, place: int) -> Lazy:
    itemsize = view.dtype.itemsize
    first = place + (view.offset * itemsize if view.extent else 0)
    span = Span(path, first, view.extent * itemsize)
    if view.contiguous:
        return Lazy(view.shape, view.dtype, None, span)
    return Lazy(view.shape, view.dtype, partial(_gather, span, view))


def _gather(span: Span, view: View) -> bytes:
    import numpy as np

    data = np.frombuffer(read_span(span), dtype=view.dtype.numpy)
    steps = tuple(step * view.dtype.itemsize for step in view.stride)
    return np.lib.stride_tricks.as_strided(data, view.shape, steps, writeable=False).tobytes()


# Open a torch file, detect which of the two containers it has, and call the functions above to read it.


T = TypeVar("T")

MAGIC = 0x1950A86A20F9469CFC6C
"""The value of the first pickle in a file from torch before 1.6."""

HEAD = 64
"""The number of bytes that are read from the start of a file to identify its container."""


def is_torch_file(path: Path) -> bool:
    """Whether a file looks as if `torch.save` wrote it. Only its first bytes and a zip archive's directory are read.

    Raises:
        StorageError: the file cannot be read.
    """
    return os.path.isfile(path) and kept("torch", path, lambda: _is_torch_file(path))


def _is_torch_file(path: Path) -> bool:
    try:
        with open_input(path) as file:
            head = file.read(HEAD)
        if _is_legacy(head):
            return True
        if head[:2] != b"PK":
            return False
        with Capped(open_input(path, 0)) as archive:  # type: ignore[arg-type]
            return is_archive(archive)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError:
        return False


def read_torch_file(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a saved state dict, keyed by name, in the file's order. No tensor data is read yet.

    If the only entry of the saved dict is `state_dict`, `model` or `model_state_dict`, this entry is the state dict. A
    module's `_metadata` is dropped, because it contains version numbers of code. If several tensors share a storage,
    all of them are returned. The `span` of a contiguous tensor is its byte range in the file. If a tensor is not
    contiguous, its `fetch` gathers the elements. The file is closed between fetches.

    Raises:
        Malformed: the file is not as `torch.save` writes it, a tensor extends beyond its storage, an entry is not a
            tensor, or tensors with overlapping elements are too large.
        Unsupported: the pickle has a global or an opcode that no state dict needs, or data is compressed or
            big-endian.
        StorageError: the file cannot be read. `fetch` can also raise this error, or `Corrupt` if the file has shrunk.
    """

    def read() -> dict[str, Lazy]:
        return _opened(path, lambda value, places: state_dict(os.fspath(path), value, places))

    return dict(kept("state dict", path, read))


def read_torch_value(path: Path) -> object:
    """Return the value in a torch file: nested dicts, lists and tuples, with lazy tensors. It need not be a state dict.

    Raises:
        Malformed: as for `read_torch_file`, except that an entry need not be a tensor. This error is also raised if
            there are too many values or nested levels.
        Unsupported: as for `read_torch_file`.
        StorageError: as for `read_torch_file`.
    """
    return _opened(path, lambda value, places: nested(os.fspath(path), value, places))


def _opened(path: Path, convert: Callable[[object, dict[str, int]], T]) -> T:
    try:
        # Pass the unbuffered file, because `Capped` adds a buffer.
        with Capped(open_input(path, 0)) as file:  # type: ignore[arg-type]
            head = file.read(HEAD)
            container = read_zip if head[:2] == b"PK" else read_legacy if _is_legacy(head) else None
            if container is None:
                raise damaged("torch.save did not write this file", "first bytes")
            return convert(*container(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        error.at(path)
        raise


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and MAGIC.to_bytes(10, "little") in head[:32]

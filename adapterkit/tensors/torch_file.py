"""State dicts in torch's `.bin`, `.pt` and `.pth` files, read without torch and without running anything in them.

Both containers of `torch.save`: the zip archive (torch >= 1.6) and the row of pickles before it. What their pickles say
is worked out by `torch_pickle`.
Format: torch/serialization.py (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AdapterkitError, Malformed, Path, storage_error
from .lazy import Lazy, Span, read_span
from .torch_pickle import Machine
from .torch_values import ALONE, Storage, View, damaged, kind_of, refused, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

T = TypeVar("T")

_DEEPEST = 8
"""Dicts inside each other that are read."""
_LIMIT = 32 << 20
"""Bytes that a pickle, or the directory of an archive, may take: some 100,000 tensors."""
_EXPANDED = 256 << 20
"""Bytes that all tensors with overlapping elements may take together once they are written out."""
_MAGIC = 0x1950A86A20F9469CFC6C
_WRAPPERS = ("state_dict", "model", "model_state_dict")


def is_torch_file(path: Path) -> bool:
    """Whether `path` is a file with the marks of `torch.save`; looks at its first bytes and an archive's directory.

    Raises:
        StorageError: the file cannot be read.
    """
    if not os.path.isfile(path):
        return False
    try:
        with _open(path) as file:
            head = file.read(64)
            return _is_legacy(head) or (head[:2] == b"PK" and bool(_roots(info.filename for info in _entries(file))))
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError:
        return False


def read_torch_file(path: Path) -> dict[str, Lazy]:
    """The tensors of a state dict that `torch.save` wrote, by name, in the file's order; no tensor data is read yet.

    A lone `state_dict`, `model` or `model_state_dict` entry around the state dict is taken off, and a module's
    `_metadata` is dropped: it holds versions of code, not weights. Names that share a storage all come back. A tensor
    that is contiguous has a `span`; any other view is gathered by its `fetch`. Files stay closed between fetches.

    Raises:
        Malformed: the file breaks the rules of its container, a view leaves its storage, or an entry is not a tensor.
        Unsupported: the pickle asks for a global or an opcode that no state dict needs, or data is compressed or
            big-endian.
        StorageError: the file cannot be read. A `fetch` raises it too, and `Corrupt` where the file has shrunk.
    """
    return _opened(path, lambda value, places: _lazies(os.fspath(path), _state_dict(value), places))


def read_torch_value(path: Path) -> Any:
    """What `torch.save` wrote, where that is more than a state dict: dicts and plain values, with lazy tensors in them.

    Raises:
        Malformed: as `read_torch_file`; here entries need not be tensors.
        Unsupported: likewise.
        StorageError: likewise.
    """
    return _opened(path, lambda value, places: _nested(os.fspath(path), value, places, 0))


def _nested(path: str, value: Any, places: dict[str, int], depth: int) -> Any:
    if depth > _DEEPEST:
        raise damaged(f"more than {_DEEPEST} dicts inside each other", "top level")
    if type(value) is View:
        return _lazies(path, {"tensor": value}, places)["tensor"]
    if type(value) is dict:
        return {name: _nested(path, inner, places, depth + 1) for name, inner in value.items()}
    return value


def _opened(path: Path, made: Callable[[object, dict[str, int]], T]) -> T:
    try:
        with _open(path) as file:
            head = file.read(64)
            container = _read_zip if head[:2] == b"PK" else _read_legacy if _is_legacy(head) else None
            if container is None:
                raise damaged("not a file that torch.save writes", "first bytes")
            return made(*container(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        error.at(path)
        raise


class _Capped(io.BufferedReader):
    """A file that refuses to read absurd amounts at once: `zipfile` asks for as much as an archive claims."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LIMIT:
            raise refused(f"a directory or pickle of {size} bytes; at most {_LIMIT} are read")
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        self.seek(offset)
        data = self.read(size)
        if len(data) != size:
            raise damaged("the file ends too early", f"byte {offset + len(data)}")
        return data


def _open(path: Path) -> _Capped:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise Malformed("not a regular file", path=path, cure="Give the path of the file itself")
    return _Capped(io.FileIO(path))


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in head[:32]


# Containers: the unpickled value, and the offset in the file of each storage's bytes.

_Contents = tuple[object, dict[str, int]]


def _read_zip(file: _Capped, size: int) -> _Contents:
    entries = _distinct(_entries(file))
    roots = _roots(entries)
    if len(roots) != 1:
        raise damaged(f"{len(roots)} entries named */data.pkl in the archive, not one", "directory")
    root = roots[0]
    _check_byteorder(file, entries.get(f"{root}/byteorder"), size)
    value, storages = _read_pickle(file, entries[f"{root}/data.pkl"], size)
    return value, {
        key: _storage_offset(file, entries.get(f"{root}/data/{key}"), storage, size)
        for key, storage in storages.items()
    }


def _read_pickle(file: _Capped, info: zipfile.ZipInfo, size: int) -> tuple[object, dict[str, Storage]]:
    stream = io.BytesIO(file.at(_data_offset(file, info, size), info.file_size))
    machine = Machine(short(info.filename))
    value = machine.load(stream)
    if stream.read(1):
        raise damaged("bytes after the end of the pickle", machine.place)
    return value, machine.storages


def _entries(file: _Capped) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, struct.error) as error:
        raise damaged(f"a broken zip archive: {short(str(error))}", "directory") from error


def _distinct(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Entries by name, once no two share one and none points out of the archive."""
    for name in (info.orig_filename for info in infos):
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise damaged(f"an entry named {short(name)} leaves the archive", "directory")
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise damaged("two entries of one name", "directory")
    return entries


def _roots(names: Iterable[str]) -> list[str]:
    return [name[: -len("/data.pkl")] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]


def _check_byteorder(file: _Capped, info: zipfile.ZipInfo | None, size: int) -> None:
    if info is None:
        return
    order = file.at(_data_offset(file, info, size), min(info.file_size, 16))
    if order != b"little":
        raise refused(f"byte order {short(order.decode('latin-1'))}", "byteorder")


def _data_offset(file: _Capped, info: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of an entry start; the local header alone knows how long it is itself."""
    where = short(info.filename)
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise refused("a compressed or encrypted entry; torch stores tensors as they are", where)
    if not 0 <= info.header_offset < size:
        raise damaged("a header outside the file", where)
    signature, name, extra = struct.unpack("<4s22xHH", file.at(info.header_offset, 30))
    offset = int(info.header_offset + 30 + name + extra)
    if signature != b"PK\3\4" or info.compress_size != info.file_size or offset + info.file_size > size:
        raise damaged("headers that disagree, or data beyond the end of the file", where)
    return offset


def _storage_offset(file: _Capped, info: zipfile.ZipInfo | None, storage: Storage, size: int) -> int:
    if info is None:
        raise damaged("no entry holds this storage", storage.where)
    if info.file_size // storage.dtype.itemsize != storage.numel:
        why = f"{storage.numel} elements claimed, {info.file_size} bytes there"
        raise damaged(why, storage.where)
    return _data_offset(file, info, size)


def _read_legacy(file: _Capped, size: int) -> _Contents:
    stream = io.BytesIO(file.at(0, min(size, _LIMIT)))
    machine = Machine("pickles")
    magic, version, system, value, keys = (machine.load(stream) for _ in range(5))
    if magic != _MAGIC or version != 1001 or type(system) is not dict:
        raise damaged("not the header that torch.save writes", "pickles")
    if system.get("little_endian") is not True:
        raise refused("not marked as little-endian", "pickles")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise damaged("the list of storages is not one of distinct keys", "pickles")
    if set(keys) != set(machine.storages):
        raise damaged("the storages listed are not those used", "pickles")
    return value, _walk(file, [machine.storages[key] for key in keys], stream.tell(), size)


def _walk(file: _Capped, storages: list[Storage], offset: int, size: int) -> dict[str, int]:
    """Offsets of storages that follow each other, an int64 count of elements before each."""
    places = {}
    for storage in storages:
        count = int.from_bytes(file.at(offset, 8), "little")
        places[storage.key] = offset + 8
        offset += 8 + storage.nbytes
        if count != storage.numel or offset > size:
            why = f"{storage.numel} elements claimed, {count} counted, {size} bytes in the file"
            raise damaged(why, storage.where)
    if offset != size:
        raise damaged(f"{size - offset} bytes after the last storage", f"byte {offset}")
    return places


# From views to lazy tensors.


def _state_dict(value: object) -> dict[str, View]:
    if type(value) is dict:
        value = _unwrapped(value)
    if type(value) is not dict:
        raise Malformed(
            f"the file holds a value of type {kind_of(value)}, not a dict of tensors", where="top level", cure=ALONE
        )
    for name, view in value.items():
        if type(name) is not str or not name.isprintable():
            raise Malformed("a name that is not printable text", where=f"entry {short(str(name))}", cure=ALONE)
        if type(view) is not View:
            raise Malformed(f"is of type {kind_of(view)}, not a tensor", where=f"entry {short(name)}", cure=ALONE)
    return value


def _unwrapped(value: dict[Any, Any]) -> object:
    wrapper = next((name for name in _WRAPPERS if type(value.get(name)) is dict), None)
    if wrapper is None:
        return value
    if len(value) > 1:
        beside = next(name for name in value if name != wrapper)
        raise Malformed(f"stands beside the dict {wrapper!r}", where=f"entry {short(str(beside))}", cure=ALONE)
    return value[wrapper]


def _lazies(path: str, views: dict[str, View], places: dict[str, int]) -> dict[str, Lazy]:
    lazies = {name: _lazy(path, view, places[view.storage.key]) for name, view in views.items()}
    expanded = {name: lazies[name].nbytes for name, view in views.items() if prod(view.shape) > view.extent}
    if sum(expanded.values()) > _EXPANDED:
        largest = max(expanded, key=lambda name: expanded[name])
        why = f"tensors whose elements overlap would take {sum(expanded.values())} bytes, more than {_EXPANDED}"
        raise Malformed(
            why, where=f"entry {short(largest)}", cure="Save them with `.clone()`, or before expanding them"
        )
    return lazies


def _lazy(path: str, view: View, place: int) -> Lazy:
    itemsize = view.dtype.itemsize
    first = place + (view.offset * itemsize if view.extent else 0)
    span = Span(path, first, view.extent * itemsize)
    if view.contiguous:
        return Lazy(view.shape, view.dtype, partial(read_span, span), span)
    return Lazy(view.shape, view.dtype, partial(_gather, span, view))


def _gather(span: Span, view: View) -> bytes:
    import numpy as np

    data = np.frombuffer(read_span(span), dtype=view.dtype.numpy)
    steps = tuple(step * view.dtype.itemsize for step in view.stride)
    return np.lib.stride_tricks.as_strided(data, view.shape, steps, writeable=False).tobytes()

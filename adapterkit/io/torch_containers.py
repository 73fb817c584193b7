"""The two containers of `torch.save`: the zip archive (torch >= 1.6) and the older sequence of pickles.

`torch_pickle` interprets their pickles. Format: torch/serialization.py (`_save`, `_legacy_save`).
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING

from .torch_file import MAGIC
from .torch_pickle import Machine
from .torch_values import Storage, damaged, refused, short

if TYPE_CHECKING:
    from collections.abc import Iterable

LIMIT = 32 << 20
"""Largest pickle or archive directory in bytes; enough for some 100,000 tensors."""


MAX_ENTRIES = 1 << 17
"""Most entries of an archive, one per tensor; the largest models have some 100,000."""

_ENTRY = 128
"""Assumed bytes per directory entry, mostly its name; torch's entries have 60 to 80."""

_TAIL = (1 << 16) + 22 + 20 + 56
"""Bytes at the end of an archive that locate its directory, including a comment of up to 64 KiB."""


class Capped(io.BufferedReader):
    """A file that refuses huge reads: `zipfile` reads as many bytes as an archive claims to have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LIMIT:
            raise refused(f"a directory or pickle of {size} bytes; at most {LIMIT} are read")
        return super().read(size)

    def at(self, offset: int, size: int) -> bytes:
        self.seek(offset)
        data = self.read(size)
        if len(data) != size:
            raise damaged("the file ends too early", f"byte {offset + len(data)}")
        return data


Contents = tuple[object, dict[str, int]]
"""The unpickled value, and storage key -> offset of its bytes in the file."""


def is_archive(file: Capped) -> bool:
    """Whether a zip archive has the entries that `torch.save` writes.

    Raises:
        Malformed: the file is not a zip archive.
    """
    return bool(_roots(info.filename for info in _entries(file)))


def read_zip(file: Capped, size: int) -> Contents:
    """Return the content of an archive of torch 1.6 or later.

    Raises:
        Malformed: the archive breaks the rules of the container.
        Unsupported: compressed or big-endian data, or a pickle that uses more than a state dict needs.
    """
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


def _read_pickle(file: Capped, info: zipfile.ZipInfo, size: int) -> tuple[object, dict[str, Storage]]:
    stream = io.BytesIO(file.at(_data_offset(file, info, size), info.file_size))
    machine = Machine(short(info.filename))
    value = machine.load(stream)
    if stream.read(1):
        raise damaged("bytes after the end of the pickle", machine.place)
    return value, machine.storages


def _entries(file: Capped) -> list[zipfile.ZipInfo]:
    _check_directory(file)
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, IndexError, struct.error) as error:
        raise damaged(f"a broken zip archive: {short(str(error))}", "directory") from error


def _check_directory(file: Capped) -> None:
    """Check how many entries an archive claims, because `zipfile` first creates a 600-byte object for each.

    Raises:
        Malformed: there is no directory at the end.
        Unsupported: there are too many entries.
    """
    size = file.seek(0, io.SEEK_END)
    start = max(0, size - _TAIL)
    tail = file.at(start, size - start)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < 22:
        raise damaged("a broken zip archive: no directory at the end", "directory")
    count, length = struct.unpack_from("<HI", tail, at + 10)
    wide = tail.rfind(b"PK\6\6", 0, at)
    if wide >= 0 and len(tail) - wide >= 56:
        count, length = struct.unpack_from("<QQ", tail, wide + 32)
    # The count can be forged, the length cannot: each entry takes at least 46 bytes of it.
    if max(count, length // _ENTRY) > MAX_ENTRIES:
        raise refused(f"an archive of {count:,} entries; at most {MAX_ENTRIES:,} are read", "directory")


def _distinct(infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return entries by name; refuse duplicate names and names that leave the archive."""
    for name in (info.orig_filename for info in infos):
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise damaged(f"an entry named {short(name)} leaves the archive", "directory")
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise damaged("two entries of one name", "directory")
    return entries


def _roots(names: Iterable[str]) -> list[str]:
    return [name[: -len("/data.pkl")] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]


def _check_byteorder(file: Capped, info: zipfile.ZipInfo | None, size: int) -> None:
    if info is None:
        return
    order = file.at(_data_offset(file, info, size), min(info.file_size, 16))
    if order != b"little":
        raise refused(f"byte order {short(order.decode('latin-1'))}", "byteorder")


def _data_offset(file: Capped, info: zipfile.ZipInfo, size: int) -> int:
    """Return the offset of an entry's bytes. Only the local header knows its own length."""
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


def _storage_offset(file: Capped, info: zipfile.ZipInfo | None, storage: Storage, size: int) -> int:
    if info is None:
        raise damaged("no entry holds this storage", storage.where)
    if info.file_size // storage.dtype.itemsize != storage.numel:
        why = f"{storage.numel} elements claimed, {info.file_size} bytes there"
        raise damaged(why, storage.where)
    return _data_offset(file, info, size)


def read_legacy(file: Capped, size: int) -> Contents:
    """Return the content of the older container, a sequence of pickles; raises the same as `read_zip`."""
    # The pickles come first and have no length field, so read as much as they may take.
    stream = io.BytesIO(file.at(0, min(size, LIMIT)))
    machine = Machine("pickles")
    magic, version, system, value, keys = (machine.load(stream) for _ in range(5))
    if magic != MAGIC or version != 1001 or type(system) is not dict:
        raise damaged("not the header that torch.save writes", "pickles")
    if system.get("little_endian") is not True:
        raise refused("not marked as little-endian", "pickles")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise damaged("the list of storages is not one of distinct keys", "pickles")
    if set(keys) != set(machine.storages):
        raise damaged("the storages listed are not those used", "pickles")
    return value, _walk(file, [machine.storages[key] for key in keys], stream.tell(), size)


def _walk(file: Capped, storages: list[Storage], offset: int, size: int) -> dict[str, int]:
    """Return the offsets of consecutive storages, each preceded by an int64 count of elements."""
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

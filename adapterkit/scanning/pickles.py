"""Find the functions that pickles would call: in plain files, in archives, in arrays of objects, and compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickletools
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, cast

from ..errors import shown
from ..io.torch_pickle import KNOWN
from .findings import Finding

MOST = 20
"""The largest number of reported findings of one rule in one file: a pickle may contain thousands of calls."""

LARGEST = 32 << 20
"""The number of bytes of a file, or of an entry of an archive, that are scanned for pickles."""

_LARGEST_SUM = 256 << 20
_DEEPEST = 4
_MOST_ENTRIES = 10_000

CODE = frozenset({
    ".py", ".pyc", ".pyd", ".pyw", ".pyx", ".pyz", ".so", ".dll", ".dylib", ".exe", ".com", ".scr", ".msi", ".sh",
    ".bash", ".bat", ".cmd", ".ps1", ".vbs", ".js", ".mjs", ".cjs", ".node", ".wasm", ".ipynb", ".cu", ".cuh", ".cpp",
    ".cxx", ".cc", ".ptx", ".jar", ".class", ".whl", ".egg", ".lua", ".rb",
})  # fmt: skip
"""Suffixes of files that a program may run."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".dat", ".data")
"""Suffixes of files that programs unpickle; pickles of protocol 0 and 1 have no first bytes of their own."""

_STORAGE = re.compile(r"(?:.*/)?data/\d+")
"""Entries of torch's archives with the bytes of a tensor, which nothing unpickles."""

_GLOBAL = re.compile(r"[^\W\d][\w.]* [^\W\d][\w.<>]*")
_ASCII = bytes(range(128)) + b"?" * 128
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00")
"""First bytes of gzip, bzip2 and xz."""

_OPCODES = frozenset(ord(opcode.code) for opcode in pickletools.opcodes)


_Stream = IO[bytes] | io.BufferedIOBase


def is_pickle(head: bytes) -> bool:
    """Whether these are the first bytes of a pickle of protocol 2 or later.

    The length of a safetensors header may begin with the same bytes; the header itself begins with `{`.
    """
    if len(head) < 3 or head[0] != 0x80 or not 2 <= head[1] <= 5 or head[2] not in _OPCODES:
        return False
    return head[8:9] != b"{" or any(head[4:8])


def _header_size(head: bytes) -> int:
    """Return the number of bytes before the values in a file of numpy."""
    wide = 2 if head[6:7] == b"\x01" else 4
    return min(8 + wide + int.from_bytes(head[8 : 8 + wide], "little"), LARGEST)


def _unpacked(head: bytes, stream: _Stream) -> _Stream:
    if head[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=stream)
    return bz2.BZ2File(stream) if head[:3] == b"BZh" else lzma.LZMAFile(cast("IO[bytes]", stream))


def is_tar(head: bytes) -> bool:
    """Whether these are the first bytes of a tar archive."""
    return head[257:262] == b"ustar"


def in_pickles(name: str, file: Path, unread: list[str]) -> Iterator[Finding]:
    """Yield the globals in a file's pickles, except those that a state dict needs.

    Args:
        name: the file's name in findings.
        file: the file.
        unread: gets a line for each part that could not be scanned.
    """
    with file.open("rb") as stream:
        yield from _Reader(name, unread).part("", file.name, stream)


@dataclass
class _Reader:
    """Scans one file and the archives in it; `left` bounds the bytes that it decompresses."""

    name: str
    unread: list[str]
    left: int = field(default=_LARGEST_SUM)

    def part(self, place: str, called: str, stream: _Stream, depth: int = 0) -> Iterator[Finding]:
        """Yield the findings in a file or in an entry of an archive."""
        head = stream.read(512)
        suffix = PurePosixPath(called).suffix.lower()
        compressed = head.startswith(_COMPRESSED)
        archive = head[:2] == b"PK" or is_tar(head)
        if not (archive or compressed or is_pickle(head) or head[:6] == b"\x93NUMPY" or suffix in _PICKLED):
            return
        if depth > _DEEPEST:
            self.skip(place, f"archives nested more than {_DEEPEST} deep")
            return
        if self.left <= 0:
            self.skip(place, f"more than {_LARGEST_SUM:,} bytes of this archive were scanned before")
            return
        whole, data, cut = stream, head, False
        if depth == 0 and (archive or compressed):
            stream.seek(0)
        else:
            most = LARGEST
            if head[:6] == b"\x93NUMPY":
                head += stream.read(_header_size(head) - len(head)) if _header_size(head) > len(head) else b""
                most = LARGEST if b"|O" in head[: _header_size(head)] else 0
            data = head + stream.read(most)
            self.left -= len(data)
            cut = bool(stream.read(1))
            whole = io.BytesIO(data)
        try:
            if head[:2] == b"PK":
                yield from self.zip(place, whole, depth)
            elif is_tar(head):
                yield from self.tar(place, whole, depth)
            elif compressed:
                with _unpacked(head, whole) as unpacked:
                    yield from self.part(place, PurePosixPath(called).stem, unpacked, depth + 1)
            elif head[:6] == b"\x93NUMPY":
                yield from self.array(place, data, cut)
            else:
                yield from self.calls(place, data, cut)
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, RuntimeError,
                NotImplementedError, ValueError) as error:  # fmt: skip
            self.skip(place, f"this archive cannot be read: {error}")

    def skip(self, place: str, why: str) -> None:
        """Note that a part was not scanned."""
        self.unread.append(f"{self.name}{f' ({place})' if place else ''}: {why}")

    def zip(self, place: str, stream: _Stream, depth: int) -> Iterator[Finding]:
        """Yield the findings in the entries of a zip archive."""
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_ENTRIES:
                self.skip(place, f"only {_MOST_ENTRIES:,} of {len(entries):,} entries were scanned")
            for entry in entries[:_MOST_ENTRIES]:
                where = f"{place}/{entry.filename}" if place else entry.filename
                yield from self.entry(where, entry.filename)
                if not entry.is_dir() and not _STORAGE.fullmatch(entry.filename):
                    with archive.open(entry) as inside:
                        yield from self.part(where, entry.filename, inside, depth + 1)

    def tar(self, place: str, stream: _Stream, depth: int) -> Iterator[Finding]:
        """Yield the findings in the entries of a tar archive."""
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for number, entry in enumerate(archive):
                if number >= _MOST_ENTRIES:
                    self.skip(place, f"only {_MOST_ENTRIES:,} entries were scanned")
                    return
                where = f"{place}/{entry.name}" if place else entry.name
                yield from self.entry(where, entry.name)
                if entry.issym() or entry.islnk():
                    yield from self.link(where, entry.linkname)
                inside = archive.extractfile(entry) if entry.isreg() else None
                if inside is not None:
                    # torch.load reads entries of these names as pickles.
                    called = "storages.pkl" if entry.name in ("pickle", "storages", "tensors") else entry.name
                    yield from self.part(where, called, inside, depth + 1)

    def link(self, where: str, target: str) -> Iterator[Finding]:
        """Yield a finding if a link of an archive may leave the folder into which the archive is unpacked."""
        if target.startswith("/") or ".." in PurePosixPath(target).parts:
            yield Finding("link", self.name, where, f"it points to {shown(target)}")

    def entry(self, where: str, named: str) -> Iterator[Finding]:
        """Yield findings for the name of an entry of an archive."""
        if named.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", named):
            yield Finding(
                "hidden-file", self.name, where, "its name leaves the folder into which the archive is unpacked"
            )
        if PurePosixPath(where).suffix.lower() in CODE:
            yield Finding("code-file", self.name, where, "a file of code in the archive")

    def array(self, place: str, data: bytes, cut: bool) -> Iterator[Finding]:
        """Yield the findings in a file of numpy; an array of objects is a pickle after the header."""
        end = _header_size(data)
        if b"|O" in data[:end]:
            yield from self.calls(place, data[end:], cut)

    def calls(self, place: str, data: bytes, cut: bool) -> Iterator[Finding]:
        """Yield the globals that the pickles in some bytes ask for.

        pickletools decodes text as ASCII, but unpicklers also accept other bytes, so the bytes of protocols 0 and 1 are
        scanned a second time without the bytes outside ASCII.
        """
        yield from self.globals_of(place, data, cut)
        if data[:1] != b"\x80" and not data.isascii():
            yield from self.globals_of(place, data.translate(_ASCII), cut)

    def globals_of(self, place: str, data: bytes, cut: bool) -> Iterator[Finding]:
        """Yield the globals of successive pickles."""
        stream, found, start = io.BytesIO(data), 0, 0
        while (start := stream.tell()) < len(data) and found < MOST:
            marked = is_pickle(data[start : start + 16])
            try:
                for asked, position in _globals(stream):
                    # Bytes that are no pickle rarely contain a name.
                    if asked in KNOWN or not (marked or _GLOBAL.fullmatch(asked)):
                        continue
                    found += 1
                    where = f"{place} byte {position}".strip()
                    yield Finding("pickle-call", self.name, where, f"it asks for {shown(asked.replace(' ', '.', 1))}")
                    if found >= MOST:
                        return
            except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
                # In files of torch before 1.6, the bytes after the last pickle are data.
                if marked:
                    why = f"a pickle of more than {LARGEST:,} bytes" if cut else f"it cannot be parsed: {error}"
                    yield Finding("pickle-call", self.name, f"{place} byte {start}".strip(), shown(why))
                elif cut and stream.tell() >= len(data):
                    self.skip(place, f"only its first {LARGEST:,} bytes were scanned")
                return


def _globals(stream: io.BytesIO) -> Iterator[tuple[str, int]]:
    """Yield each global that one pickle asks for, as `module name`, with its position."""
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = [None, None]
    for opcode, argument, position in pickletools.genops(stream):
        kind = opcode.name
        number = argument if isinstance(argument, int) else 0
        at = position if position is not None else 0
        if kind in ("GLOBAL", "INST"):
            yield str(argument), at
            pushed.append(None)
        elif kind == "STACK_GLOBAL":
            module, name = pushed[-2:]
            yield ("a name that is computed" if module is None or name is None else f"{module} {name}"), at
            pushed.append(None)
        elif kind in ("EXT1", "EXT2", "EXT4"):
            yield "a registered extension", at
            pushed.append(None)
        elif kind == "MEMOIZE":
            memo[len(memo)] = pushed[-1]
        elif kind in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[number] = pushed[-1]
        elif kind in ("GET", "BINGET", "LONG_BINGET"):
            pushed.append(memo.get(number))
        elif kind not in ("PROTO", "FRAME"):
            # After any other opcode, the value on the stack is not known here.
            pushed.append(argument if isinstance(argument, str) and opcode.stack_after else None)
        del pushed[:-2]


def appended_archive(file: Path) -> bool:
    """Whether a zip archive follows the content of a file that is not a zip archive itself."""
    with suppress(OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                return bool(archive.infolist())
    return False

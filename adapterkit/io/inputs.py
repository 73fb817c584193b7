"""Open untrusted files if they are regular files, limit the size of documents, and recognize types by magic bytes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, BinaryIO, TypeVar, TypeVarTuple, cast

from ..errors import DOWNLOAD_OR_WRITE_AGAIN, AdapterkitError, Malformed, Path, storage_error

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_DOCUMENT = 64 << 20
"""The largest size of a document that is read, in bytes. In practice, the largest JSON document is an index of 100,000
tensors, with about 10 MB."""

_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


def open_input(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading in binary mode.

    The file type is checked with `stat` before the file is opened. Otherwise, opening a pipe would block forever, and
    opening some devices changes their state. A device such as /dev/zero has no end. Symbolic links are followed.

    Raises:
        Malformed: the path is a pipe, a socket or a device.
        OSError: the path is a folder, or cannot be opened.
    """
    _check_regular(os.stat(path).st_mode, path)

    def opener(name: str, flags: int) -> int:
        # A pipe may have replaced the file since the check. With O_NONBLOCK, opening the pipe does not block.
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", buffering, opener=opener)  # noqa: SIM115 - returned open
    try:
        _check_regular(os.fstat(file.fileno()).st_mode, path)
    except BaseException:
        file.close()
        raise
    return file


def read_input(path: Path, limit: int = MAX_DOCUMENT) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        Malformed: the file has more than `limit` bytes, or is not a regular file.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            # Do not rely on the size from `stat`: a file may grow, and files in /proc have the size 0.
            data = file.read(limit + 1)
    except OSError as error:
        raise storage_error(error, path) from error
    if len(data) > limit:
        why = f"the file is larger than {limit:,} bytes, the limit for this kind of file"
        raise Malformed(why, path=path, cure=DOWNLOAD_OR_WRITE_AGAIN)
    return data


def _check_regular(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "not a file")
        raise Malformed(
            f"the path is {kind}, not a regular file", path=path, cure="Save the content to a file, and pass this file"
        )


@contextmanager
def inputs_kept() -> Iterator[None]:
    """Cache the results of `kept` inside the block, because many modules read the same header to detect a format."""
    token = _KEPT.set({} if _KEPT.get() is None else _KEPT.get())
    try:
        yield
    finally:
        _KEPT.reset(token)


def kept(what: str, path: Path, read: Callable[[*Ts], T], *args: *Ts) -> T:
    """Return `read(*args)`. Inside `inputs_kept`, cache the result or the error for each pair of `what` and file."""
    known = _KEPT.get()
    if known is None:
        return read(*args)
    key = (what, os.fspath(path))
    if key not in known:
        try:
            known[key] = (read(*args), None)
        # Cache errors too, because several format modules ask for the same damaged header.
        except Exception as error:
            known[key] = (None, error)
    value, failure = known[key]
    if failure is not None:
        raise failure
    return cast(T, value)


_KEPT: ContextVar[dict[tuple[str, str], tuple[Any, Exception | None]] | None] = ContextVar("_KEPT", default=None)

# Recognize the type of a tensor file by its magic bytes, without importing a reader.


GGUF = b"GGUF"
GGLA = b"algg"
"""The letters of `ggla` in reverse order, because the file stores the integer 0x67676c61 in little-endian order."""
NPY = b"\x93NUMPY"


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a GGUF file; never raises an error."""
    return has_mark(path, GGUF)


def is_ggla(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a `ggla` file, llama.cpp's adapter format before GGUF; never raises an error."""
    return has_mark(path, GGLA)


def is_npy(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins like a `.npy` file; never raises an error."""
    return has_mark(path, NPY)


def has_mark(path: str | os.PathLike[str], mark: bytes, at: int = 0) -> bool:
    """Whether a file has the bytes `mark` at the offset `at`; never raises an error."""
    try:
        with open_input(path) as file:
            return file.read(at + len(mark))[at:] == mark
    except (OSError, AdapterkitError):
        return False


def decimal_number(text: str) -> int | None:
    """Parse a decimal number from a file, a server or a user; return None if the text is not a valid number.

    A valid number consists of 1 to 18 digits from 0 to 9. A check with `str.isdigit` is not enough: it also accepts `²`
    and texts of more than 4,300 digits, and `int` refuses both.

    >>> decimal_number("12"), decimal_number("1e3"), decimal_number("²")
    (12, None, None)
    """
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None

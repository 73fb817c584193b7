"""What a finished output was made from, so that the same command again finds its work done.

A record holds one digest of everything that decided the output (inputs, options, versions) and a fingerprint of every
file that was written. It is an extended attribute of the output, `user.adapterkit`. So nothing is added to a folder
that another tool reads, nothing is uploaded with it, and the record moves into place with the output, in the same
rename. File systems without such attributes (NFS before 4.2, FAT, Windows) get a hidden file beside the output instead.
A record that is lost, by a copy for example, only means that the output is not recognised.

The fingerprint of a file of up to 16 MiB is its content. A larger one is told by its size, the time of its last change
and its first MiB, where formats keep their headers: to read a model of 100 GB again takes minutes, and a file whose
header, size and time in nanoseconds are the same was not written since. The inode number is left out: network and
overlay file systems give another one after a mount, and a restarted container must still find its work done.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .atomic import write_bytes

ATTRIBUTE = "user.adapterkit"

WHOLE = 16 << 20
"""Bytes of a file up to which its fingerprint is its content."""

HEAD = 1 << 20
"""Bytes of a larger file that are in its fingerprint."""

LARGEST = 1 << 20
"""Bytes of a record that is read."""


def fingerprint(file: Path) -> str:
    """A short text that changes when a file changes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(file, "rb") as opened:
        status = os.fstat(opened.fileno())
        if status.st_size <= WHOLE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        return f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(opened.read(HEAD)).hexdigest()}"


def digest_of(decided: Any) -> str:
    """One digest of plain data: what decided an output."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()


def record_of(made_from: str, files: Mapping[str, Path]) -> bytes:
    """The record of an output.

    Args:
        made_from: the digest of what decided it.
        files: name, relative to the folder that the output is in -> the file that was written.
    """
    told = {"made_from": made_from, "files": {name: fingerprint(file) for name, file in files.items()}}
    return zlib.compress(json.dumps(told, sort_keys=True).encode())


def attach(record: bytes, output: Path, beside: Path) -> None:
    """Keep a record with an output.

    Args:
        record: the record.
        output: the file or folder, staged or in place.
        beside: the hidden file that holds the record where the file system has no extended attributes.
    """
    try:
        os.setxattr(output, ATTRIBUTE, record)
    except (AttributeError, OSError):  # Not on this system, not on this file system, or more than it has room for.
        write_bytes(beside, record)
    else:
        beside.unlink(missing_ok=True)


def has_record(target: Path, beside: Path) -> bool:
    """Whether a record is kept with an output."""
    try:
        return bool(_read(target, beside))
    except OSError:
        return False


def is_finished(target: Path, beside: Path, made_from: str) -> bool:
    """Whether an output was made from this, and every file of it is as it was written."""
    if not os.path.lexists(target):
        return False
    try:
        record = json.loads(zlib.decompressobj().decompress(_read(target, beside), LARGEST))
        files = {target.parent / name: told for name, told in record["files"].items()}
        same = bool(files) and record["made_from"] == made_from
        return same and all(fingerprint(file) == told for file, told in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error):
        return False


def _read(target: Path, beside: Path) -> bytes:
    try:
        return os.getxattr(target, ATTRIBUTE)
    except (AttributeError, OSError):
        with open(beside, "rb") as file:
            return file.read(LARGEST)


def listed(files: Iterable[Path]) -> list[list[str]]:
    """Files by name and fingerprint, for `digest_of`."""
    return [[file.name, fingerprint(file)] for file in files]

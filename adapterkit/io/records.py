"""Records of how an output was made, so that running the same command again finds the work done.

A record holds one digest of everything that decided the output (inputs, options, versions) and a fingerprint of every
file written. It is stored as an extended attribute of the output, `user.adapterkit`. So it adds no file to a folder
that other tools read, is not uploaded with it, and moves into place with the output in the same rename. On file systems
without extended attributes (NFS before 4.2, FAT, Windows) it is a hidden file beside the output. If a record gets lost,
for example by a copy, the output is just not recognised.

The fingerprint of a file of up to 16 MiB is a hash of its content. For a larger file it consists of the size, the
modification time and a hash of the first MiB, where formats have their headers. Reading a model of 100 GB again would
take minutes, and a file with the same header, size and nanosecond time was not written since. The inode number is left
out: network and overlay file systems change it at a mount, and a restarted container must still find its work done.
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
"""Files up to this many bytes are fingerprinted by their whole content."""

HEAD = 1 << 20
"""Bytes of a larger file that are hashed."""

LARGEST = 1 << 20
"""Largest record that is read, in bytes."""


def fingerprint(file: Path) -> str:
    """Return a short text that changes when the file changes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(file, "rb") as opened:
        status = os.fstat(opened.fileno())
        if status.st_size <= WHOLE:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        return f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(opened.read(HEAD)).hexdigest()}"


def digest_of(decided: Any) -> str:
    """Return one digest of plain data, for everything that decided an output."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True, default=str).encode()).hexdigest()


def record_of(made_from: str, files: Mapping[str, Path]) -> bytes:
    """Return the record of an output.

    Args:
        made_from: the digest of everything that decided it.
        files: name relative to the output's folder -> the written file.
    """
    told = {"made_from": made_from, "files": {name: fingerprint(file) for name, file in files.items()}}
    return zlib.compress(json.dumps(told, sort_keys=True).encode())


def attach(record: bytes, output: Path, beside: Path) -> None:
    """Store a record with an output.

    Args:
        record: the record.
        output: the file or folder, staged or in place.
        beside: the hidden file to use if the file system has no extended attributes.
    """
    try:
        os.setxattr(output, ATTRIBUTE, record)
    except (AttributeError, OSError):  # Not supported by the system or file system, or no room for it.
        write_bytes(beside, record)
    else:
        beside.unlink(missing_ok=True)


def has_record(target: Path, beside: Path) -> bool:
    """Whether a record is stored with an output."""
    try:
        return bool(_read(target, beside))
    except OSError:
        return False


def is_finished(target: Path, beside: Path, made_from: str) -> bool:
    """Whether an output was made from this, and all its files are unchanged."""
    if not os.path.lexists(target):
        return False
    try:
        # Limit the output, because a damaged record could inflate to any size.
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
    """Return the names and fingerprints of files, for `digest_of`."""
    return [[file.name, fingerprint(file)] for file in files]

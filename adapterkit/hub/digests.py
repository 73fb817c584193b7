"""Digests of local files in the two ways in which a hub names content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import storage_error

CHUNK = 1 << 20


def digests(file: Path) -> tuple[int, str, str]:
    """A file's bytes, `sha256:...` and `git:...`, in one reading.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        size = file.stat().st_size
        whole, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(file, "rb") as handle:
            while chunk := handle.read(CHUNK):
                whole.update(chunk)
                git.update(chunk)
    except OSError as error:
        raise storage_error(error, file) from error
    return size, f"sha256:{whole.hexdigest()}", f"git:{git.hexdigest()}"


def same(file: Path, size: int, digest: str) -> bool:
    """Whether a local file is the one that a hub lists."""
    if not file.is_file() or file.stat().st_size != size:
        return False
    return digest in digests(file)[1:]

"""Digests of local files in the forms that hubs use, and checks against what a hub lists."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Corrupt, storage_error

if TYPE_CHECKING:
    from .remote import Content, Digests, Remote

CHUNK = 1 << 20


def digests(file: Path) -> tuple[int, str, str]:
    """Return a file's size in bytes, `sha256:...` and `git:...`, from one pass over the file.

    Raises:
        StorageError: the file cannot be read.
    """
    # Hubs list large (LFS) files by sha256 and small ones by git's blob hash, which covers a header with the size.
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


def digests_of(content: Content) -> Digests:
    """Return the digests of a file or of bytes that are pushed as one."""
    if isinstance(content, Path):
        return digests(content)
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return len(content), f"sha256:{hashlib.sha256(content).hexdigest()}", f"git:{git}"


def hasher(digest: str, size: int) -> hashlib._Hash | None:
    """Return a hash object for a digest's kind; None if the digest (`unknown:...`) does not hash the content."""
    # Builds of Python in FIPS mode refuse sha1 and md5 unless they are marked as not for security.
    kind = digest.partition(":")[0]
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(kind, usedforsecurity=False) if kind in ("sha256", "md5") else None


def same(file: Path, size: int, digest: str) -> bool:
    """Whether a local file matches the size and digest that a hub lists; False if the hub lists no digest."""
    made = hasher(digest, size)
    if made is None or not file.is_file() or file.stat().st_size != size:
        return False
    with open(file, "rb") as handle:
        while chunk := handle.read(CHUNK):
            made.update(chunk)
    return made.hexdigest() == digest.partition(":")[2]


def check_listed(there: Remote, found: Mapping[str, Digests]) -> None:
    """Check that the hub lists every pushed file with its local digest.

    Raises:
        Corrupt: a file is missing or has another digest.
    """
    listed = {file.path: file for file in there.files}
    for name, (size, *names) in found.items():
        file = listed.get(name)
        if file is None or file.size != size or file.digest not in names:
            cure = "A file changed here during the push, or the hub damaged it: push again with --overwrite (in Python "
            cure += "overwrite=True)"
            raise Corrupt("the hub does not list what was pushed", path=str(there.uri), where=name, cure=cure)

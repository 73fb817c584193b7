"""Download files, resume interrupted downloads, and verify the files' digests.

This module also manages the local folders for files from hubs: the cache, scratch folders, and locks on folders.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import AdapterkitError, Corrupt, NetworkError, StorageError, storage_error
from .remote import Placed, Remote, RemoteFile
from .web import ATTEMPTS, Passing, pause

if TYPE_CHECKING:
    from .remote import Content, Digests


def cache_folder() -> Path:
    """Return the cache folder: `$ADAPTERKIT_CACHE`, or `adapterkit` in the user's cache folder."""
    root = os.environ.get("ADAPTERKIT_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adapterkit")
    return Path(root)


@contextmanager
def locked(stage: Path) -> Iterator[None]:
    """Create a folder if it is missing, and hold the folder's lock until the block ends.

    Raises:
        StorageError: another process holds the lock.
    """
    stage.mkdir(exist_ok=True)
    with open(stage / "lock", "wb") as lock:
        if not _lock(lock):
            raise StorageError("another process is writing here", path=stage, cure="Wait until that process ends")
        yield


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder during the block; wait while another process on this machine holds the lock.

    The folder need not exist.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.turn"), "wb") as lock:
        _lock(lock, wait=True)
        yield


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder in the cache and remove it afterwards.

    Folders that killed processes have left behind are removed first.

    Raises:
        StorageError: the cache folder is not writable.
    """
    root, name = cache_folder() / "scratch", secrets.token_hex(8)
    with ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            # Hold the lock of the parent folder until the new lock file is locked. Otherwise another process could
            # find the new lock file unlocked, and remove it.
            with open(root / "lock", "wb") as gate:
                _lock(gate, wait=True)
                _sweep(root)
                lock = stack.enter_context(open(root / f"{name}.lock", "wb"))
                _lock(lock)
            (root / name).mkdir()
        except OSError as error:
            raise storage_error(error, error.filename or root) from error
        stack.callback(_forget, root / f"{name}.lock")
        yield root / name


def _sweep(root: Path) -> None:
    """Remove the folders that no process has locked: the processes that made them have died. Do nothing on Windows."""
    if not _has_locks():
        return
    for file in root.glob("*.lock"):
        with open(file, "r+b") as lock:
            if _lock(lock):
                _forget(file)


def _forget(lock: Path) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def _has_locks() -> bool:
    return os.name == "posix"


def _lock(file: BinaryIO, *, wait: bool = False) -> bool:
    """Lock an open file until it is closed. If another process holds the lock, wait (`wait=True`) or return False."""
    if not _has_locks():
        # Windows has no flock, so return True without a lock. The folder is protected in another way: Windows refuses
        # to rename a folder that contains open files.
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


HASHED_AT_ONCE = 1 << 20


def digests(file: Path) -> tuple[int, str, str]:
    """Return a file's size in bytes, its `sha256:...` digest and its `git:...` digest. The file is read only once.

    Raises:
        StorageError: the file cannot be read.
    """
    # Compute both digests, because a hub lists only one of them: the sha256 for a large (LFS) file, and git's digest
    # for a small file. Git's digest is the sha1 of a short header and the content.
    try:
        size = file.stat().st_size
        whole, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with open(file, "rb") as handle:
            while chunk := handle.read(HASHED_AT_ONCE):
                whole.update(chunk)
                git.update(chunk)
    except OSError as error:
        raise storage_error(error, file) from error
    return size, f"sha256:{whole.hexdigest()}", f"git:{git.hexdigest()}"


def digests_of(content: Content) -> Digests:
    """Return the size and the digests of a pushed file, given as a path, as bytes, or as an uploaded file."""
    if isinstance(content, Placed):
        return content.digests
    if isinstance(content, Path):
        return digests(content)
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return len(content), f"sha256:{hashlib.sha256(content).hexdigest()}", f"git:{git}"


def hasher(digest: str, size: int) -> hashlib._Hash | None:
    """Return a hash object for a digest's algorithm; None for `unknown:...`, which is not computed from the content."""
    # Tell hashlib that sha1 and md5 are not used for security. Otherwise Python in FIPS mode refuses them.
    kind = digest.partition(":")[0]
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    return hashlib.new(kind, usedforsecurity=False) if kind in ("sha256", "md5") else None


def same(file: Path, size: int, digest: str) -> bool:
    """Whether a local file matches the size and digest that a hub lists; False if the hub lists no digest."""
    hash_ = hasher(digest, size)
    if hash_ is None or not file.is_file() or file.stat().st_size != size:
        return False
    with open(file, "rb") as handle:
        while chunk := handle.read(HASHED_AT_ONCE):
            hash_.update(chunk)
    return hash_.hexdigest() == digest.partition(":")[2]


def check_listed(there: Remote, digests: Mapping[str, Digests]) -> None:
    """Check that the hub lists every pushed file with the size and the digest of the local file.

    Raises:
        Corrupt: a file is missing, or has another size or digest.
    """
    listed = {file.path: file for file in there.files}
    for name, (size, *names) in digests.items():
        file = listed.get(name)
        if file is None or file.size != size or file.digest not in names:
            cure = "The local file changed during the push, or the hub damaged it: push again with --overwrite "
            cure += "(in Python overwrite=True)"
            why = "after the push, this file is missing on the hub, or its size or digest differs from the local file's"
            raise Corrupt(why, path=str(there.uri), where=name, cure=cure)


# Download a file into a partial file, and verify the complete file. A later process can resume the download.


CHUNK = 1 << 20
ASKED = 16 << 20
"""The total size of the range requests that run at the same time, in bytes. A killed process loses at most this much.

If one request asked for the whole rest of a file, a killed process could lose more: all bytes that are in the buffers
of the local machine, the hub and the network. These buffers can be large.
"""

ANEW = 3
"""The maximum number of times that a file is downloaded if its digest is wrong each time."""


def fetch(remote: Remote, file: RemoteFile, part: Path, count: Callable[[int], None], asked: int = ASKED) -> None:
    """Complete a partial file: download the missing bytes, sync the file to disk, and verify its digest.

    Args:
        remote: the repository.
        file: the file to download.
        part: the partial file. The bytes that it already has are hashed, but not downloaded again.
        count: a progress callback, which gets the number of bytes done since its last call. The bytes that are
            already in `part` are counted as done. If bytes must be downloaded again, the number is negative. The
            callback may raise an error to stop the download.
        asked: the number of bytes in one request. The next request is made when all these bytes are in the file.

    Raises:
        Corrupt: the file does not have the digest that the hub lists, even after `ANEW` downloads.
        NetworkError: the hub is not reachable, or refuses the request.
        StorageError: the partial file is not writable.
    """
    for _ in range(ANEW):
        if _Fetching(remote, file, count, asked).into(part):
            return
        # Subtract the partial file's bytes from the progress, because these bytes are downloaded again.
        count(-part.stat().st_size)
        part.unlink()
    why = f"the downloaded bytes do not have the digest {file.digest} that the hub lists"
    raise Corrupt(why, path=str(remote.uri.at(remote.commit)), where=file.path, cure=_DAMAGED)


def read_range(remote: Remote, file: RemoteFile, start: int, length: int) -> bytes:
    """Return `length` bytes of a file, starting at byte `start`.

    The bytes are not verified, because hubs list digests only for whole files.

    Raises:
        NetworkError: the hub is not reachable, refuses the request, or sends another range.
    """

    def act() -> bytes:
        with remote.opened(file, start, start + length) as (begin, chunks):
            if begin != start:
                raise Passing("the hub did not send the requested range")
            data = b""
            for chunk in chunks:
                data += chunk
                if len(data) > length:
                    break
        data = data[:length]
        if len(data) != length:
            raise Passing(f"the hub sent {len(data)} bytes instead of {length}")
        return data

    return remote.call(act) if length else b""


class _Fetching:
    """One attempt to download a file: hash the bytes of the partial file, then request the rest piece by piece."""

    def __init__(self, remote: Remote, file: RemoteFile, count: Callable[[int], None], asked: int) -> None:
        self.remote, self.file, self.count, self.asked = remote, file, count, asked
        self.digest, self.done = hasher(file.digest, file.size), 0

    def into(self, part: Path) -> bool:
        """Download the missing bytes; return whether the complete file has the listed digest."""
        try:
            # In append mode, every write goes to the end of the file, even after `_replay` has read from its start.
            with open(part, "a+b") as target:
                self._replay(target)
                self._rest(target)
                os.fsync(target.fileno())
        except OSError as error:
            raise storage_error(error, part) from error
        return self.digest is None or self.digest.hexdigest() == self.file.digest.partition(":")[2]

    def _replay(self, target: BinaryIO) -> None:
        """Hash the bytes of the partial file. If the partial file is larger than the remote file, empty it first."""
        if target.seek(0, os.SEEK_END) > self.file.size:
            target.truncate(0)
        target.seek(0)
        while chunk := target.read(CHUNK):
            self._lock(chunk)

    def _rest(self, target: BinaryIO) -> None:
        """Download the remaining bytes. Give up after `ATTEMPTS` attempts in a row without progress."""
        attempt = 0
        while self.done < self.file.size:
            before, end = self.done, min(self.done + self.asked, self.file.size)
            met = self._piece(target, end)
            # An attempt makes progress only if it adds at least a megabyte or completes the piece. If a few bytes were
            # enough, a server that sends a few bytes per attempt could keep this loop running forever.
            attempt = 0 if self.done >= min(end, before + CHUNK) else attempt + 1
            if self.done < end and (attempt >= ATTEMPTS or not pause(attempt, met.wait)):
                raise NetworkError(f"gave up: {met}", path=str(self.remote.uri), where=self.file.path, cure=_AGAIN)

    def _piece(self, target: BinaryIO, end: int) -> Passing:
        """Make one request and append the received bytes.

        Returns:
            The temporary failure of the request. If the request raised no error, this is a `Passing` that says that the
            connection ended early; the caller ignores it if no bytes are missing.
        """
        try:
            for chunk in _chunks(self.remote, self.file, self.done, end):
                _written(target, chunk)
                self._lock(chunk)
        except AdapterkitError:
            raise
        except Exception as error:
            met = self.remote.passing(error)
            if met is None:
                raise self.remote.failure(error) or error from None
            return met
        finally:
            # Flush even after an error, so that the next process finds all bytes that have arrived.
            target.flush()
        return Passing("the connection ended early")

    def _lock(self, chunk: bytes) -> None:
        if self.digest is not None:
            self.digest.update(chunk)
        self.done += len(chunk)
        self.count(len(chunk))


def _written(target: BinaryIO, chunk: bytes) -> None:
    """Write bytes to a file.

    A disk error becomes a StorageError. As an OSError, it would look like a network error to callers, because network
    errors may be OSErrors too.
    """
    try:
        target.write(chunk)
    except OSError as error:
        raise storage_error(error, Path(target.name)) from error


def _chunks(remote: Remote, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
    """Request the bytes from `start` to `end`. If the hub sends the whole file, skip the bytes before `start`."""
    with remote.opened(file, start, end if end < file.size else None) as (begin, coming):
        if not 0 <= begin <= start:
            raise Passing("the hub did not send the requested range")
        skip, left = start - begin, file.size - start
        for chunk in coming:
            wanted = chunk[skip : skip + left]
            skip = max(0, skip - len(chunk))
            left -= len(wanted)
            if wanted:
                yield wanted
            if left <= 0:
                return


_AGAIN = "Run the same command again: it continues where it stopped"
_DAMAGED = "Use another network, or tell the repository's owner: the hub or a proxy damages the file"

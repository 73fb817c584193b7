"""One file from a hub into a partial file: continued where it stopped, by whatever process, and verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import AdapterkitError, Corrupt, NetworkError, storage_error
from .digests import hasher
from .remote import Remote, RemoteFile
from .retries import ATTEMPTS, Passing, pause

CHUNK = 1 << 20
ANEW = 3
"""How often a file whose bytes came wrong is fetched from its start."""


def fetch(remote: Remote, file: RemoteFile, part: Path, count: Callable[[int], None]) -> None:
    """Fetches a file into `part`, from where `part` ends; when this returns, the file is whole, right and durable.

    Args:
        remote: the repository.
        file: what to fetch.
        part: the partial file; what it holds already is hashed, not fetched again.
        count: told the bytes that are done, and negative numbers where some must be fetched again; raises to stop.

    Raises:
        Corrupt: the bytes do not have the promised digest, however often they are fetched.
        NetworkError: the hub cannot be reached or refuses.
        StorageError: the partial file cannot be written.
    """
    for _ in range(ANEW):
        if _fetched(remote, file, part, count):
            return
        count(-part.stat().st_size)
        part.unlink()
    why = f"its bytes do not have the digest {file.digest} that the hub lists"
    raise Corrupt(why, path=str(remote.uri.at(remote.commit)), where=file.path, cure=_DAMAGED)


def read_range(remote: Remote, file: RemoteFile, start: int, length: int) -> bytes:
    """`length` bytes of a file from byte `start`; a part of a file has no digest to verify it by.

    Raises:
        NetworkError: the hub cannot be reached, refuses, or does not answer with that range.
    """

    def act() -> bytes:
        with remote.opened(file, start, start + length) as (begin, chunks):
            if begin != start:
                raise Passing("the hub did not send the range that was asked for")
            data = b""
            for chunk in chunks:
                data += chunk
                if len(data) > length:
                    break
        data = data[:length]
        if len(data) != length:
            raise Passing(f"the hub sent {len(data)} bytes where {length} were asked for")
        return data

    return remote.call(act) if length else b""


def _fetched(remote: Remote, file: RemoteFile, part: Path, count: Callable[[int], None]) -> bool:
    """Fetches what is missing; whether the whole then has its digest."""
    digest = hasher(file.digest, file.size)
    try:
        with open(part, "a+b") as target:
            _replay(target, file, digest, count)
            _rest(remote, file, target, digest, count)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise storage_error(error, part) from error
    return digest is None or bool(digest.hexdigest() == file.digest.partition(":")[2])


def _replay(target: Any, file: RemoteFile, digest: Any, count: Callable[[int], None]) -> None:
    """Hashes what an earlier run left; more than the whole file cannot be right and is thrown away."""
    if target.seek(0, os.SEEK_END) > file.size:
        target.truncate(0)
    target.seek(0)
    while chunk := target.read(CHUNK):
        if digest is not None:
            digest.update(chunk)
        count(len(chunk))


def _rest(remote: Remote, file: RemoteFile, target: Any, digest: Any, count: Callable[[int], None]) -> None:
    """Streams the rest. Attempts are counted anew whenever some bytes came: a bad line is slow, not hopeless."""
    done, attempt = target.tell(), 0
    while done < file.size:
        before = done
        try:
            for chunk in _chunks(remote, file, done):
                target.write(chunk)
                if digest is not None:
                    digest.update(chunk)
                done += len(chunk)
                count(len(chunk))
            met: Passing | None = Passing("the connection ended early")
        except AdapterkitError:
            raise
        except Exception as error:
            met = remote.passing(error)
            if met is None:
                raise _failed(remote, error) from None
        attempt = 0 if done - before >= CHUNK else attempt + 1
        if done < file.size and (attempt >= ATTEMPTS or not pause(attempt, met.wait if met else None)):
            raise NetworkError(f"gave up: {met}", path=str(remote.uri), where=file.path, cure=_AGAIN)


def _failed(remote: Remote, error: Exception) -> Exception:
    return remote.failure(error) or error


def _chunks(remote: Remote, file: RemoteFile, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start`, never more than it has."""
    with remote.opened(file, start, None) as (begin, coming):
        if not 0 <= begin <= start:
            raise Passing("the hub did not send the range that was asked for")
        skip, left = start - begin, file.size - start
        for chunk in coming:
            wanted = chunk[skip : skip + left]
            skip = max(0, skip - len(chunk))
            left -= len(wanted)
            if wanted:
                yield wanted
            if left <= 0:
                return


_AGAIN = "Run the same command again: it goes on where it stopped"
_DAMAGED = "The hub or something on the way damages it: try another network, or tell the repository's owner"

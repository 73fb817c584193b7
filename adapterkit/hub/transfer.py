"""One file from a hub into a partial file: continued where it stopped, by whatever process, and verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import AdapterkitError, Corrupt, NetworkError, storage_error
from .digests import hasher
from .remote import Remote, RemoteFile
from .retries import ATTEMPTS, Passing, pause

CHUNK = 1 << 20
ASKED = 16 << 20
"""Bytes that are asked for and not yet here, at most, of all files together: what a kill can cost.

An open answer would be sent ahead into the buffers of both ends and of the line, which nobody bounds.
"""

ANEW = 3
"""How often a file whose bytes came wrong is fetched from its start."""


def fetch(remote: Remote, file: RemoteFile, part: Path, count: Callable[[int], None], asked: int = ASKED) -> None:
    """Fetches a file into `part`, from where `part` ends; when this returns, the file is whole, right and durable.

    Args:
        remote: the repository.
        file: what to fetch.
        part: the partial file; what it holds already is hashed, not fetched again.
        count: told the bytes that are done, and negative numbers where some must be fetched again; raises to stop.
        asked: bytes of one request; none is made before those of the last one are in the file.

    Raises:
        Corrupt: the bytes do not have the promised digest, however often they are fetched.
        NetworkError: the hub cannot be reached or refuses.
        StorageError: the partial file cannot be written.
    """
    for _ in range(ANEW):
        if _Fetching(remote, file, count, asked).into(part):
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


class _Fetching:
    """One try at a file: what its partial file holds is hashed, and the rest is asked for, piece by piece."""

    def __init__(self, remote: Remote, file: RemoteFile, count: Callable[[int], None], asked: int) -> None:
        self.remote, self.file, self.count, self.asked = remote, file, count, asked
        self.digest, self.done = hasher(file.digest, file.size), 0

    def into(self, part: Path) -> bool:
        """Fetches what is missing; whether the whole then has its digest."""
        try:
            with open(part, "a+b") as target:
                self._replay(target)
                self._rest(target)
                os.fsync(target.fileno())
        except OSError as error:
            raise storage_error(error, part) from error
        return self.digest is None or self.digest.hexdigest() == self.file.digest.partition(":")[2]

    def _replay(self, target: BinaryIO) -> None:
        """Hashes what an earlier run left; more than the whole file cannot be right and is thrown away."""
        if target.seek(0, os.SEEK_END) > self.file.size:
            target.truncate(0)
        target.seek(0)
        while chunk := target.read(CHUNK):
            self._held(chunk)

    def _rest(self, target: BinaryIO) -> None:
        """Attempts are counted anew whenever some bytes came: a bad line is slow, not hopeless."""
        attempt = 0
        while self.done < self.file.size:
            before, end = self.done, min(self.done + self.asked, self.file.size)
            met = self._piece(target, end)
            attempt = 0 if self.done >= min(end, before + CHUNK) else attempt + 1
            if self.done < end and (attempt >= ATTEMPTS or not pause(attempt, met.wait)):
                raise NetworkError(f"gave up: {met}", path=str(self.remote.uri), where=self.file.path, cure=_AGAIN)

    def _piece(self, target: BinaryIO, end: int) -> Passing:
        """Takes what comes of one request; what ended it, if it ended early."""
        try:
            for chunk in _chunks(self.remote, self.file, self.done, end):
                _written(target, chunk)
                self._held(chunk)
        except AdapterkitError:
            raise
        except Exception as error:
            met = self.remote.passing(error)
            if met is None:
                raise self.remote.failure(error) or error from None
            return met
        finally:
            # What came is to be found by the next process, whatever becomes of this one.
            target.flush()
        return Passing("the connection ended early")

    def _held(self, chunk: bytes) -> None:
        if self.digest is not None:
            self.digest.update(chunk)
        self.done += len(chunk)
        self.count(len(chunk))


def _written(target: BinaryIO, chunk: bytes) -> None:
    """Writes; a fault of the disk is told from one of the line, which may be of the same kind."""
    try:
        target.write(chunk)
    except OSError as error:
        raise storage_error(error, Path(target.name)) from error


def _chunks(remote: Remote, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `start` to `end`, or to its own end where the hub heeds no ranges; never more."""
    with remote.opened(file, start, end if end < file.size else None) as (begin, coming):
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

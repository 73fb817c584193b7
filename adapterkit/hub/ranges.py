"""Read a base on a hub by byte ranges: a temporary folder has sparse files, whose bytes are downloaded when needed.

A task on a cluster needs only a few of hundreds of weight files, or only parts of these files. If a task needs almost
all bytes of a file, the whole file is downloaded and verified by its digest. Ranges cannot be verified, because hubs
list no digests of ranges.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import Corrupt, Unsupported, storage_error
from ..io.lazy import ELSEWHERE, Span
from .folders import scratch
from .hubs import parse
from .pulling import CONNECTIONS, source_at
from .reading import MAX_SMALL, needed, outline, remote_of
from .remote import Remote, RemoteFile
from .transfer import fetch, read_range

WHOLE = 0.9
"""If a task needs at least this share of a file's bytes, the whole file is downloaded, because it can be verified."""

AHEAD = 8 << 20
"""The smallest number of bytes per request. Packed weights are read in many small consecutive pieces, so one request
serves many of them."""

Run = tuple[int, int]
"""The offset of a range's first byte, and the offset after its last byte."""


def pinned(name: str) -> str:
    """Return a uri with its current commit, so that other machines read the same files.

    Raises:
        AdapterkitError: as for `pull`.
    """
    uri = parse(name)
    return str(uri.at(remote_of(uri).commit))


class RangedFile:
    """One weight file: a sparse local file, and the ranges of bytes that have been downloaded.

    Args:
        remote: the repository.
        file: the remote file.
        path: the sparse file.
        start: the first bytes of the file, including the whole header; the sparse file already contains these bytes.
    """

    def __init__(self, remote: Remote, file: RemoteFile, path: Path, start: bytes) -> None:
        self.remote, self.file, self.path = remote, file, path
        self.header = start[: 8 + int.from_bytes(start[:8], "little")]
        self.held: list[Run] = [(0, len(self.header))]
        self.lock, self.stamp = threading.Lock(), os.stat(path).st_mtime_ns

    def read(self, span: Span) -> bytearray:
        """Return the bytes of a range; if bytes are missing, download them, and some bytes after the range."""
        begin, end = span.offset, span.offset + span.nbytes
        with self.lock:
            if missing := gaps(self.held, [(begin, end)]):
                self._download(gaps(self.held, [(missing[0][0], min(self.file.size, max(end, begin + AHEAD)))]))
        data = bytearray(span.nbytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(begin)
            done = 0
            while done < len(data) and (count := file.readinto(memoryview(data)[done:])):
                done += count
        return data

    def bring(self, wanted: list[Run]) -> None:
        """Download ranges, or the whole file if the ranges cover almost all of it."""
        with self.lock:
            missing = gaps(self.held, wanted)
            if sum(end - begin for begin, end in missing) >= WHOLE * (self.file.size - len(self.header)):
                self._download_whole()
            else:
                self._download(missing)

    def drop(self) -> None:
        """Free the disk space of all bytes except the header."""
        with self.lock:
            os.truncate(self.path, len(self.header))
            os.truncate(self.path, self.file.size)
            self._keep_time()
            self.held = [(0, len(self.header))]

    def _download(self, missing: list[Run]) -> None:
        pieces = [(at, min(at + AHEAD, end)) for begin, end in missing for at in range(begin, end, AHEAD)]
        with open(self.path, "r+b", buffering=0) as target, ThreadPoolExecutor(CONNECTIONS) as pool:

            def one(piece: Run) -> None:
                data = read_range(self.remote, self.file, piece[0], piece[1] - piece[0])
                with writing:
                    target.seek(piece[0])
                    target.write(data)

            writing = threading.Lock()
            # Read all results, which raises the first exception of a worker.
            for _ in pool.map(one, pieces):
                pass
        self.held = joined([*self.held, *missing])
        self._keep_time()

    def _download_whole(self) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        part.unlink(missing_ok=True)
        fetch(self.remote, self.file, part, lambda _: None)
        with open(part, "rb") as whole:
            same = whole.read(len(self.header)) == self.header
        if not same:
            why = "the header was damaged in the first transfer, so the plan made from it is wrong"
            raise Corrupt(why, path=str(self.remote.uri), where=self.file.path, cure="Run the same command again")
        os.replace(part, self.path)
        self.held = [(0, self.file.size)]
        self._keep_time()

    def _keep_time(self) -> None:
        # Restore the file's time, which `outline` derived from the digest: a plan identifies its inputs by size and
        # time.
        os.utime(self.path, ns=(self.stamp, self.stamp))


def joined(runs: Iterable[Run]) -> list[Run]:
    """Return the ranges in order; adjacent and overlapping ranges are joined."""
    result: list[Run] = []
    for begin, end in sorted(runs):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def gaps(held: list[Run], wanted: Iterable[Run]) -> list[Run]:
    """Return the parts of the wanted ranges that are outside the ranges that have been downloaded."""
    missing: list[Run] = []
    for begin, end in joined(wanted):
        for first, last in held:
            if first >= end or last <= begin:
                continue
            if first > begin:
                missing.append((begin, first))
            begin = max(begin, last)
        if begin < end:
            missing.append((begin, end))
    return missing


class Ranged:
    """A base whose weight files are downloaded by ranges.

    Attributes:
        path: the local folder, or the single file, with all headers.
        uri: the base's uri, pinned to its commit.
    """

    def __init__(self, remote: Remote, folder: Path, *, whole: bool) -> None:
        self.uri, self.path, self.files = str(remote.uri.at(remote.commit)), folder, dict[str, RangedFile]()
        wanted = needed(remote)
        weights = {name: file for name, file in wanted.items() if name.endswith(".safetensors")}
        if not weights:
            cure = "Pull it onto a disk that all nodes share ('adapterkit pull'), and name the folder"
            raise Unsupported("only safetensors files can be read by ranges", path=str(remote.uri), cure=cure)
        for name, file in wanted.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name not in weights and (whole or (name.endswith(".json") and file.size <= MAX_SMALL)):
                fetch(remote, file, folder / name, lambda _: None)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            starts = pool.map(lambda name: outline(remote, weights[name], folder / name), weights)
            for (name, file), start in zip(weights.items(), starts, strict=True):
                held = RangedFile(remote, file, folder / name, start)
                self.files[str(folder / name)] = held
                ELSEWHERE[str(folder / name)] = held.read
        source_at(remote).save(folder)
        inside = PurePosixPath(remote.uri.path).name
        if inside and (folder / inside).is_file():
            self.path = folder / inside

    def bring(self, spans: Iterable[Span]) -> None:
        """Download ranges of the weight files, so that the local files can be read directly.

        Raises:
            Corrupt: a file that was downloaded whole does not have the listed digest.
            NetworkError: the hub is not reachable, or refuses.
            StorageError: the disk is full.
        """
        wanted: dict[str, list[Run]] = defaultdict(list)
        for span in spans:
            if span.path in self.files:
                wanted[span.path].append((span.offset, span.offset + span.nbytes))
        for path, runs in wanted.items():
            try:
                self.files[path].bring(runs)
            except OSError as error:
                raise storage_error(error, error.filename or path) from error

    def drop(self) -> None:
        """Free the disk space of all downloaded ranges."""
        for file in self.files.values():
            file.drop()

    def close(self) -> None:
        """Unregister the files."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@contextmanager
def ranged(name: str, *, whole: bool) -> Iterator[Ranged]:
    """Yield a base on a hub that is read by byte ranges; its temporary folder is removed at the end of the block.

    Args:
        name: the uri.
        whole: also download the files that are not weights, such as the tokenizer.

    Raises:
        Unsupported: the base has no safetensors files.
        AdapterkitError: as for `pull`.
    """
    with scratch() as folder:
        base = Ranged(remote_of(parse(name)), folder, whole=whole)
        try:
            yield base
        finally:
            base.close()

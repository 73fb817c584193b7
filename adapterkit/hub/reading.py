"""Read from a hub in one of three ways: whole files through a cache, only byte ranges, or one weight file at a time."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from ..errors import (
    AdapterkitError,
    Corrupt,
    Malformed,
    NetworkError,
    StorageError,
    Unsupported,
    UsageError,
    storage_error,
)
from ..io.lazy import ELSEWHERE, Span
from ..io.locations import NOTE
from ..io.safetensors import MAX_HEADER
from .hubs import parse, remote_at
from .pulling import CONNECTIONS, bring, choose, source_at
from .remote import Remote, RemoteFile, Uri
from .transfer import cache_folder, fetch, locked, read_range, scratch, turn

OTHER_FORMS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz"}
"""Suffixes of weights in other formats. Such files are not downloaded if the uri also has safetensors files."""

WEIGHTS = OTHER_FORMS | {".safetensors"}
COMPANIONS = ("adapter_config.json", "config.json")
"""If a uri names a single weight file, these files next to it are downloaded too: the weights need their config."""

FIRST_READ = 1 << 16
MAX_SMALL = 16 << 20
FRESH = 60.0
"""How long the commit of a branch is remembered, in seconds, so that all accesses in a command see the same commit."""

_seen: dict[tuple[str, str], tuple[float, Remote]] = {}


def fetched(name: str) -> Path:
    """Return the local path of an adapter or a model on a hub. If it is not in the cache, download and verify it.

    The cache is the folder `$ADAPTERKIT_CACHE`, or `adapterkit` in the user's cache folder. It has a subfolder for each
    commit. If the uri has safetensors files, weights in other formats are not downloaded. If it has weights at its top
    level, the weights in subfolders are not downloaded. In offline mode, a branch means its last known commit.

    Raises:
        AdapterkitError: as for `pull`.
    """
    uri = parse(name)
    commit = _commit(uri)
    folder = _cache(uri) / commit.replace(":", "-") / hashlib.sha256(uri.path.encode()).hexdigest()[:16]
    inside = PurePosixPath(uri.path).name
    # If the record of the origin exists, all files exist: `bring` renames the folder into place when it is complete.
    if not (folder / NOTE).is_file():
        # Lock the folder: several tasks of a cluster may start on this machine together, and need the same adapter.
        with _turn(folder):
            if not (folder / NOTE).is_file():
                remote = remote_of(uri)
                bring(remote, source_at(remote), needed(remote), folder, None)
    return folder / inside if inside and (folder / inside).is_file() else folder


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    try:
        with turn(folder):
            yield
    except OSError as error:
        raise storage_error(error, error.filename or folder) from error


def needed(remote: Remote) -> dict[str, RemoteFile]:
    """Return the files that are needed to read the adapter or model at a uri."""
    chosen = choose(remote)
    path = remote.uri.path
    if len(chosen) == 1 and path and next(iter(chosen.values())).path == path:
        beside = {str(PurePosixPath(path).with_name(name)): name for name in COMPANIONS}
        companions = {beside[file.path]: file for file in remote.files if file.path in beside}
        return chosen | companions | _data_of(remote, PurePosixPath(path))
    suffixes = {name: PurePosixPath(name).suffix for name in chosen}
    if ".safetensors" in suffixes.values():
        chosen = {name: file for name, file in chosen.items() if suffixes[name] not in OTHER_FORMS}
    if any("/" not in name and suffixes[name] in WEIGHTS for name in chosen):
        chosen = {name: file for name, file in chosen.items() if "/" not in name or suffixes[name] not in WEIGHTS}
    return chosen


def _data_of(remote: Remote, graph: PurePosixPath) -> dict[str, RemoteFile]:
    """Return the files that may contain the external data of an ONNX graph: their name starts with the graph's name."""
    if graph.suffix != ".onnx":
        return {}
    near = [file for file in remote.files if PurePosixPath(file.path).parent == graph.parent]
    return {name: file for file in near if (name := PurePosixPath(file.path).name).startswith(graph.stem)}


@contextmanager
def headers(name: str) -> Iterator[Path]:
    """Yield a local folder or file with real headers but sparse data, for code that reads only headers.

    JSON files are downloaded whole and verified. The headers of safetensors files are fetched by range requests. If the
    block reads tensor data, the data is also fetched by range requests. Ranges cannot be verified. A repository without
    safetensors files is downloaded whole.

    Raises:
        AdapterkitError: as for `pull`.
    """
    remote = remote_of(parse(name))
    wanted = needed(remote)
    if not any(file.path.endswith(".safetensors") for file in wanted.values()):
        yield fetched(name)
        return
    with scratch() as folder:
        try:
            _sketch(remote, wanted, folder)
            inside = folder / PurePosixPath(remote.uri.path).name
            yield inside if remote.uri.path and inside.is_file() else folder
        finally:
            for file in wanted:
                ELSEWHERE.pop(str(folder / file), None)


def _sketch(remote: Remote, wanted: Mapping[str, RemoteFile], folder: Path) -> None:
    for name, file in wanted.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            outline(remote, file, target)
        # Skip other files, such as tokenizers: they are not needed to read headers.
        elif name.endswith(".json") and file.size <= MAX_SMALL:
            fetch(remote, file, target, lambda _: None)
    source_at(remote).save(folder)


def outline(remote: Remote, file: RemoteFile, target: Path) -> bytes:
    """Write a sparse file with the real header of a remote file. Each read of its data fetches the data from the hub.

    The modification time of the sparse file is computed from the remote file's digest. A merge plan identifies its
    inputs by size and modification time. So a merge can be resumed only if the remote file is unchanged.

    Returns:
        The first bytes of the file: the header, and any data that came in the same request.
    """
    start = read_range(remote, file, 0, min(FIRST_READ, file.size))
    length = 8 + (struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0)
    if length > min(file.size, MAX_HEADER + 8):
        why = f"the header claims {length - 8} bytes, but the file has {file.size}"
        raise Malformed(why, path=str(remote.uri), where=file.path, cure="Tell the repository's owner")
    if length > len(start):
        start += read_range(remote, file, len(start), length - len(start))
    try:
        with open(target, "xb") as sketch:
            sketch.write(start[:length])
            sketch.truncate(file.size)
        stamp = int.from_bytes(hashlib.sha256(file.digest.encode()).digest()[:4], "big")
        os.utime(target, (stamp, stamp))
    except OSError as error:
        raise storage_error(error, target) from error

    def read(span: Span) -> bytearray:
        end = span.offset + span.nbytes
        if end <= length:  # A file that is copied unchanged: its header is already in memory.
            return bytearray(start[span.offset : end])
        return bytearray(read_range(remote, file, span.offset, span.nbytes))

    ELSEWHERE[str(target)] = read
    return start


def remote_of(uri: Uri) -> Remote:
    """Return the repository of a uri with its commit resolved. The hub is asked for a commit at most once a minute."""
    key, now = (os.environ.get("HF_ENDPOINT", ""), str(uri)), time.monotonic()
    when, remote = _seen.get(key, (0.0, None))
    if remote is None or now - when > FRESH:
        remote = remote_at(uri)
        # Resolve the commit first: if this fails, the remote is not cached.
        _ = remote.commit
        _seen[key] = (now, remote)
    return remote


def _commit(uri: Uri) -> str:
    """Return the commit of a uri, and remember it for offline mode."""
    from huggingface_hub import constants

    reference = _cache(uri) / "refs" / quote(uri.revision or "main", safe="")
    if constants.is_offline_mode():
        try:
            return reference.read_text("utf-8").strip()
        except OSError:
            cure = "Unset HF_HUB_OFFLINE, or pass a local path"
            raise NetworkError("offline mode is on; the cache lacks this revision", path=str(uri), cure=cure) from None
    commit = remote_of(uri).commit
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, "utf-8")
    except OSError as error:
        raise storage_error(error, reference) from error
    return commit


def _cache(uri: Uri) -> Path:
    """Return the cache folder of a repository.

    For schemes other than `hf`, the folder's name ends with a digest, because replacing `:` and `/` can make different
    names equal.
    """
    folder_name = uri.name.replace("://", "--").replace(":", "-").replace("/", "--")
    apart = "" if uri.scheme == "hf" else f"-{hashlib.sha256(uri.name.encode()).hexdigest()[:8]}"
    return cache_folder() / "hub" / (folder_name + apart)


# Stream a base from a hub: fetch only the headers of all weight files, then download and verify each file when it is
# needed.


NOT_STREAMED = "Omit --stream (stream=), so that the whole base is downloaded first"


class Shards:
    """A base on a hub whose local weight files are sparse until they are downloaded.

    Attributes:
        path: the base's local path.
        begun: True if the download of a weight file has started; a later run can continue this download.
    """

    def __init__(self, remote: Remote, folder: Path) -> None:
        self.remote, self.folder, self.files = remote, folder, dict[str, RemoteFile]()
        self.starts: dict[str, bytes] = {}
        self.begun = False
        inside = PurePosixPath(remote.uri.path).name
        self.path = folder / "base"
        self._sketch()
        if inside and (self.path / inside).is_file():
            self.path = self.path / inside

    def _sketch(self) -> None:
        wanted = needed(self.remote)
        if not any(name.endswith(".safetensors") for name in wanted):
            raise Unsupported("only safetensors files can be streamed", path=str(self.remote.uri), cure=NOT_STREAMED)
        # Keep the downloads of an interrupted run, which are in `parts`. Write the sparse files again, which is fast.
        shutil.rmtree(self.folder / "base", ignore_errors=True)
        (self.folder / "parts").mkdir(exist_ok=True)
        for name, file in wanted.items():
            target = self.folder / "base" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                self.starts[str(target)] = outline(self.remote, file, target)
                self.files[str(target)] = file
            else:
                fetch(self.remote, file, target, lambda _: None)
        source_at(self.remote).save(self.folder / "base")

    def bring(self, paths: Iterable[str]) -> None:
        """Download weight files that are still sparse; reuse bytes that were fetched together with the header.

        Raises:
            Corrupt: the bytes do not have the listed digest, or the header differs from the one that was fetched first.
            NetworkError: the hub is not reachable, or refuses.
        """
        for path in paths:
            if path in ELSEWHERE:
                self._bring(path, self.files[path])

    def _bring(self, path: str, file: RemoteFile) -> None:
        self.begun = True
        part = self.folder / "parts" / file.digest.replace(":", "-")
        start = self.starts[path]
        try:
            if not part.exists():
                part.write_bytes(start)
            fetch(self.remote, file, part, lambda _: None)
            # The plan was made from the sparse file's header, which was fetched by a range request and could not be
            # verified. Compare this header with that of the verified file.
            with open(part, "rb") as whole:
                header = start[: 8 + int.from_bytes(start[:8], "little")]
                same = whole.read(len(header)) == header
            # Keep the sparse file's modification time: plans and resumed merges identify their inputs by size and time.
            stamp = os.stat(path)
            os.utime(part, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            os.replace(part, path)
        except OSError as error:
            raise storage_error(error, error.filename or part) from error
        if not same:
            why = "the header was damaged in the first transfer, so the plan made from it is wrong"
            raise Corrupt(why, path=str(self.remote.uri), where=file.path, cure="Run the same command again")
        del ELSEWHERE[path]

    def drop(self, paths: Iterable[str]) -> None:
        """Free the disk space of weight files."""
        for path in paths:
            os.truncate(path, 0)

    def close(self) -> None:
        """Stop reading sparse files through the hub."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@contextmanager
def streamed(name: str | os.PathLike[str], out: Path) -> Iterator[Shards]:
    """Yield a base on a hub for the duration of a merge. Its weight files are in a hidden folder next to `out`.

    If an interrupted run left a partly downloaded weight file, its download is continued.

    Raises:
        UsageError: `name` is a local path.
        Unsupported: the base is not made of safetensors files.
        AdapterkitError: as for `pull`.
    """
    from ..io.locations import is_remote

    if not is_remote(name):
        raise UsageError("only a base on a hub can be streamed", path=name, cure="Omit --stream (stream=)")
    folder = out.parent / f".{out.name}.streaming"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            shards = Shards(remote_of(parse(os.fspath(name))), folder)
            try:
                yield shards
            except StorageError:
                if not shards.begun:  # Nothing was downloaded that a later run could use.
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                shards.close()
    # Keep the downloaded files: a later run can continue after these errors.
    except (NetworkError, StorageError):
        raise
    except AdapterkitError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise storage_error(error, error.filename or folder) from error
    shutil.rmtree(folder, ignore_errors=True)


# Read a base on a hub in byte ranges. The weight files are sparse files in a temporary folder. Their bytes are
# downloaded when they are needed.
#
# A task on a cluster needs only a few of hundreds of weight files, or only parts of these files. If a task needs almost
# all bytes of a file, the whole file is downloaded and verified by its digest. Ranges cannot be verified, because hubs
# list no digests of ranges.


WHOLE = 0.9
"""If a task needs at least this share of a file's bytes, the whole file is downloaded, because it can be verified."""

AHEAD = 8 << 20
"""The size of a request, in bytes. Longer ranges are split into several requests. `RangedFile.read` fetches at least
this many bytes at once, because packed weights are read in many small consecutive pieces."""

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
        self.present: list[Run] = [(0, len(self.header))]
        self.lock, self.stamp = threading.Lock(), os.stat(path).st_mtime_ns

    def read(self, span: Span) -> bytearray:
        """Return the bytes of a range. If some are missing, download them, together with bytes after the range."""
        begin, end = span.offset, span.offset + span.nbytes
        with self.lock:
            if missing := gaps(self.present, [(begin, end)]):
                self._download(gaps(self.present, [(missing[0][0], min(self.file.size, max(end, begin + AHEAD)))]))
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
            missing = gaps(self.present, wanted)
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
            self.present = [(0, len(self.header))]

    def _download(self, missing: list[Run]) -> None:
        pieces = [(at, min(at + AHEAD, end)) for begin, end in missing for at in range(begin, end, AHEAD)]
        with open(self.path, "r+b", buffering=0) as target, ThreadPoolExecutor(CONNECTIONS) as pool:

            def one(piece: Run) -> None:
                data = read_range(self.remote, self.file, piece[0], piece[1] - piece[0])
                with writing:
                    target.seek(piece[0])
                    target.write(data)

            writing = threading.Lock()
            # Read all results: this raises the first exception of a worker.
            for _ in pool.map(one, pieces):
                pass
        self.present = joined([*self.present, *missing])
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
        self.present = [(0, self.file.size)]
        self._keep_time()

    def _keep_time(self) -> None:
        # Restore the modification time that `outline` computed from the digest, because a merge plan identifies its
        # inputs by size and time.
        os.utime(self.path, ns=(self.stamp, self.stamp))


def joined(runs: Iterable[Run]) -> list[Run]:
    """Sort ranges, and join adjacent and overlapping ones."""
    result: list[Run] = []
    for begin, end in sorted(runs):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def gaps(present: list[Run], wanted: Iterable[Run]) -> list[Run]:
    """Return the parts of the wanted ranges that are not in `present`, the ranges that have been downloaded."""
    missing: list[Run] = []
    for begin, end in joined(wanted):
        for first, last in present:
            if first >= end or last <= begin:
                continue
            if first > begin:
                missing.append((begin, first))
            begin = max(begin, last)
        if begin < end:
            missing.append((begin, end))
    return missing


class Ranged:
    """A base whose weight files are downloaded in byte ranges.

    Attributes:
        path: the local folder or single file; all headers are complete.
        uri: the base's uri, pinned to its commit.
    """

    def __init__(self, remote: Remote, folder: Path, *, whole: bool) -> None:
        self.uri, self.path, self.files = str(remote.uri.at(remote.commit)), folder, dict[str, RangedFile]()
        wanted = needed(remote)
        weights = {name: file for name, file in wanted.items() if name.endswith(".safetensors")}
        if not weights:
            cure = "Pull it onto a disk that all nodes share ('adapterkit pull'), and pass the folder"
            raise Unsupported("only safetensors files can be read in byte ranges", path=str(remote.uri), cure=cure)
        for name, file in wanted.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name not in weights and (whole or (name.endswith(".json") and file.size <= MAX_SMALL)):
                fetch(remote, file, folder / name, lambda _: None)
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            starts = pool.map(lambda name: outline(remote, weights[name], folder / name), weights)
            for (name, file), start in zip(weights.items(), starts, strict=True):
                ranged_file = RangedFile(remote, file, folder / name, start)
                self.files[str(folder / name)] = ranged_file
                ELSEWHERE[str(folder / name)] = ranged_file.read
        source_at(remote).save(folder)
        inside = PurePosixPath(remote.uri.path).name
        if inside and (folder / inside).is_file():
            self.path = folder / inside

    def bring(self, spans: Iterable[Span]) -> None:
        """Download ranges of the weight files, so that these ranges can be read from the local files.

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
        """Stop reading the sparse files through the hub."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@contextmanager
def ranged(name: str, *, whole: bool) -> Iterator[Ranged]:
    """Yield a base on a hub that is read in byte ranges. At the end of the block, its temporary folder is removed.

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

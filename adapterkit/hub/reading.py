"""Read from a hub in one of three ways: whole files through a cache, only byte ranges, or one weight file at a time."""

from __future__ import annotations

import hashlib
import os
import re
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

from ..core.arguments import checks_types
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
"""Suffixes of weight files that are not safetensors. They are not downloaded if the uri also has safetensors files."""

WEIGHTS = OTHER_FORMS | {".safetensors"}
COMPANIONS = ("adapter_config.json", "config.json")
"""If a uri names a single weight file, these files in its folder are also downloaded, because the weights need a
config."""

_OLD = re.compile(r"(?:adapter_model|pytorch_adapter|pytorch_model(?:-\d+-of-\d+)?)\.bin")
"""Matches the weight files that PEFT, AdapterHub and transformers wrote before they used safetensors."""

FIRST_READ = 1 << 16
MAX_SMALL = 16 << 20
FRESH = 60.0
"""The number of seconds for which a branch's commit is cached. During this time, all reads of the branch use the same
commit."""

_COMMIT = re.compile(r"[0-9a-f]{40}|(?:sha256:)?[0-9a-f]{64}")
"""Matches a commit of a repository, the digest of a manifest, and the digest of a list of files."""

_seen: dict[tuple[str, str], tuple[float, Remote]] = {}


@checks_types
def fetched(name: str) -> Path:
    """Return the local path of an adapter or a model from a hub. Download and verify files that are not in the cache.

    The cache is the folder `$ADAPTERKIT_CACHE`, or `adapterkit` in the user's cache folder. It has a subfolder for each
    commit. If the uri has safetensors files, weight files in other formats are not downloaded. If the uri's top folder
    has weight files, weight files in its subfolders are not downloaded. In offline mode, a branch's last known commit
    is used. A uri with a commit that is in the cache needs no connection.

    Raises:
        AdapterkitError: as for `pull`.
    """
    uri = parse(name)
    # A uri with a commit needs no request if the commit is in the cache, because the files of a commit never change.
    folder = _cached(uri, uri.revision or "")
    if not (_COMMIT.fullmatch(uri.revision or "") and (folder / NOTE).is_file()):
        folder = _cached(uri, _commit(uri))
    inside = PurePosixPath(uri.path).name
    # The file `NOTE` records the uri and the commit. If it exists, the download is complete, because `bring` downloads
    # all files into a temporary folder, and renames the temporary folder at the end.
    if not (folder / NOTE).is_file():
        # Lock the folder: several tasks of a cluster may start on this machine together and need the same adapter.
        with _turn(folder):
            if not (folder / NOTE).is_file():
                remote = remote_of(uri)
                bring(remote, source_at(remote), needed(remote), folder, None)
    return folder / inside if inside and (folder / inside).is_file() else folder


def _cached(uri: Uri, commit: str) -> Path:
    """Return the cache folder of a uri's files at a commit."""
    return _cache(uri) / commit.replace(":", "-") / hashlib.sha256(uri.path.encode()).hexdigest()[:16]


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
    if any(_OLD.fullmatch(name) for name in chosen):
        # Safetensors files in subfolders, such as checkpoints, do not replace the weights in the top folder.
        suffixes = {name: suffix for name, suffix in suffixes.items() if "/" not in name or suffix not in WEIGHTS}
        chosen = {name: chosen[name] for name in suffixes}
    if ".safetensors" in suffixes.values():
        chosen = {name: file for name, file in chosen.items() if suffixes[name] not in OTHER_FORMS}
    if any("/" not in name and suffixes[name] in WEIGHTS for name in chosen):
        chosen = {name: file for name, file in chosen.items() if "/" not in name or suffixes[name] not in WEIGHTS}
    return chosen


def _data_of(remote: Remote, graph: PurePosixPath) -> dict[str, RemoteFile]:
    """Return the files that may contain an ONNX graph's external data, keyed by file name.

    For `model.onnx`, these are the files in the same folder whose names start with `model`.
    """
    if graph.suffix != ".onnx":
        return {}
    near = [file for file in remote.files if PurePosixPath(file.path).parent == graph.parent]
    return {name: file for file in near if (name := PurePosixPath(file.path).name).startswith(graph.stem)}


@checks_types
@contextmanager
def headers(name: str) -> Iterator[Path]:
    """Yield the local path of an adapter or a model whose safetensors files have headers but no tensor data.

    JSON files are downloaded whole and verified. The headers of safetensors files are fetched by range requests, and
    written to sparse files. If the block reads tensor data, the data is also fetched by range requests. Bytes that come
    from range requests cannot be verified. If the uri has no safetensors files, all needed files are downloaded, as by
    `fetched`.

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
        # Download small JSON files, such as configs. Skip all other files, because they are not needed to read headers.
        elif name.endswith(".json") and file.size <= MAX_SMALL:
            fetch(remote, file, target, lambda _: None)
    source_at(remote).save(folder)


def outline(remote: Remote, file: RemoteFile, target: Path) -> bytes:
    """Write a local sparse file with only the header of a remote file. Tensors are fetched from the hub when read.

    The modification time of the sparse file is computed from the remote file's digest. A merge plan identifies its
    inputs by size and modification time. So an interrupted merge can be resumed only if the remote file is unchanged.

    Returns:
        The first bytes of the remote file: the header, and any tensor data that came in the same request.
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
        # If a caller copies the whole file, it also asks for the header. Return the header from memory.
        if end <= length:
            return bytearray(start[span.offset : end])
        return bytearray(read_range(remote, file, span.offset, span.nbytes))

    ELSEWHERE[str(target)] = read
    return start


def remote_of(uri: Uri) -> Remote:
    """Return the remote of a uri. The commit is requested from the hub at most once in `FRESH` seconds."""
    key, now = (os.environ.get("HF_ENDPOINT", ""), str(uri)), time.monotonic()
    when, remote = _seen.get(key, (0.0, None))
    if remote is None or now - when > FRESH:
        remote = remote_at(uri)
        # Ask for the commit before the remote is cached: if the request fails, the remote must not be cached.
        _ = remote.commit
        _seen[key] = (now, remote)
    return remote


def _commit(uri: Uri) -> str:
    """Return the commit of a uri, and save it on disk for offline mode. In offline mode, return the saved commit."""
    from huggingface_hub import constants

    reference = _cache(uri) / "refs" / quote(uri.revision or "main", safe="")
    if constants.is_offline_mode():
        try:
            return reference.read_text("utf-8").strip()
        except OSError:
            cure = "Unset HF_HUB_OFFLINE, or pass a local path"
            why = "offline mode is on, and the uri's revision is not in the cache"
            raise NetworkError(why, path=str(uri), cure=cure) from None
    commit = remote_of(uri).commit
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit, "utf-8")
    except OSError as error:
        raise storage_error(error, reference) from error
    return commit


def _cache(uri: Uri) -> Path:
    """Return the cache folder of a repository.

    The folder's name is the repository's name with `:` and `/` replaced, so two names could give the same folder. For
    schemes other than `hf`, a digest of the repository's name is appended to prevent this.
    """
    folder_name = uri.name.replace("://", "--").replace(":", "-").replace("/", "--")
    apart = "" if uri.scheme == "hf" else f"-{hashlib.sha256(uri.name.encode()).hexdigest()[:8]}"
    return cache_folder() / "hub" / (folder_name + apart)


# Stream a base from a hub: first fetch only the headers of all weight files. Later, when a merge needs the tensors of a
# weight file, download and verify this file.


NOT_STREAMED = "Omit --stream (stream=), so that the whole base is downloaded first"


class Shards:
    """A base that is streamed from a hub. Each local weight file has only its header until `bring` downloads the file.

    Attributes:
        path: the base's local path.
        begun: True if the download of a weight file has started, in this run or in an earlier one. Then a later run can
            continue the download.
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
        # Keep the folder `parts`, which has the downloads of an interrupted run. Write all files in `base` again.
        shutil.rmtree(self.folder / "base", ignore_errors=True)
        parts = self.folder / "parts"
        parts.mkdir(exist_ok=True)
        self.begun = any(parts.iterdir())
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
        """Download the given weight files, except those that have already been downloaded.

        Raises:
            Corrupt: a file does not have the digest that the hub lists, or its header differs from the header in the
                sparse file.
            NetworkError: the hub is not reachable, or refuses the request.
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
            # The merge plan was made from the sparse file's header. That header was fetched by a range request, so it
            # could not be verified then. Compare it with the header of the verified file.
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
            why = "the header that was fetched earlier to plan the merge was damaged"
            raise Corrupt(why, path=str(self.remote.uri), where=file.path, cure="Run the same command again")
        del ELSEWHERE[path]

    def drop(self, paths: Iterable[str]) -> None:
        """Empty the given weight files, to free their disk space."""
        for path in paths:
            os.truncate(path, 0)

    def close(self) -> None:
        """Remove the sparse files from `ELSEWHERE`. Later reads no longer fetch their data from the hub."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@checks_types
@contextmanager
def streamed(name: str | os.PathLike[str], out: Path) -> Iterator[Shards]:
    """Yield a base on a hub, whose weight files are downloaded one by one into a hidden folder next to `out`.

    After an error of the network or the disk, the downloaded files are kept, so that a later run can continue. After
    success or any other AdapterkitError, the folder is removed.

    Raises:
        UsageError: `name` is a local path, not a uri.
        Unsupported: the base has no safetensors files.
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
                if not shards.begun:  # There is no download that a later run could continue.
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                shards.close()
    # Keep the downloaded files: after these two kinds of errors, a later run can continue.
    except (NetworkError, StorageError):
        raise
    except AdapterkitError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise storage_error(error, error.filename or folder) from error
    shutil.rmtree(folder, ignore_errors=True)


# Read a base on a hub in byte ranges. The weight files are sparse files in a temporary folder. Each range of bytes is
# downloaded when it is needed.
#
# A base may have hundreds of weight files. A task on a cluster needs only a few of them, or only parts of these few. If
# a task needs almost all bytes of a file, the whole file is downloaded and verified by its digest. Ranges cannot be
# verified, because hubs list no digests of ranges.


WHOLE = 0.9
"""If a task must download at least this share of a file's tensor data, the whole file is downloaded, so that it can be
verified."""

AHEAD = 8 << 20
"""The largest size of a request, in bytes. Longer ranges are split into several requests. If a range is shorter,
`RangedFile.read` extends it to this size with the bytes that follow, because packed weights are read in many small
consecutive pieces."""

Run = tuple[int, int]
"""A range of bytes: the offset of the first byte, and the offset after the last byte."""


@checks_types
def pinned(name: str) -> str:
    """Return a uri with its revision replaced by the current commit, so that other machines read the same files.

    Raises:
        AdapterkitError: as for `pull`.
    """
    uri = parse(name)
    return str(uri.at(remote_of(uri).commit))


class RangedFile:
    """A weight file on a hub, with a sparse local file and a list of the byte ranges that have been downloaded.

    Args:
        remote: the repository.
        file: the remote file.
        path: the sparse file.
        start: the first bytes of the remote file, with at least the whole header. The sparse file already contains the
            header.
    """

    def __init__(self, remote: Remote, file: RemoteFile, path: Path, start: bytes) -> None:
        self.remote, self.file, self.path = remote, file, path
        self.header = start[: 8 + int.from_bytes(start[:8], "little")]
        self.present: list[Run] = [(0, len(self.header))]
        self.lock, self.stamp = threading.Lock(), os.stat(path).st_mtime_ns

    def read(self, span: Span) -> bytearray:
        """Return the bytes of a range. If bytes are missing, download them and the bytes after them (see `AHEAD`)."""
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
        """Download the missing bytes of the given ranges. If they are almost the whole file, download all of it."""
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
            # Iterate over all results: this raises the first exception of a worker.
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
            why = "the header that was fetched earlier to plan the merge was damaged"
            raise Corrupt(why, path=str(self.remote.uri), where=self.file.path, cure="Run the same command again")
        os.replace(part, self.path)
        self.present = [(0, self.file.size)]
        self._keep_time()

    def _keep_time(self) -> None:
        # Restore the modification time that `outline` computed from the digest, because a merge plan identifies its
        # inputs by size and time.
        os.utime(self.path, ns=(self.stamp, self.stamp))


def joined(runs: Iterable[Run]) -> list[Run]:
    """Sort ranges, and join those that overlap or touch."""
    result: list[Run] = []
    for begin, end in sorted(runs):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def gaps(present: list[Run], wanted: Iterable[Run]) -> list[Run]:
    """Return the ranges of bytes that are in `wanted` but not in `present`, which lists the downloaded ranges."""
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
        path: the local folder, or the local file if the uri names a single file. At first, each local weight file is
            sparse and contains only the header.
        uri: the base's uri, pinned to its commit.
    """

    def __init__(self, remote: Remote, folder: Path, *, whole: bool) -> None:
        self.uri, self.path, self.files = str(remote.uri.at(remote.commit)), folder, dict[str, RangedFile]()
        wanted = needed(remote)
        weights = {name: file for name, file in wanted.items() if name.endswith(".safetensors")}
        if not weights:
            cure = "Run 'adapterkit pull' with a folder on a disk that all nodes share, and pass the folder's path"
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
        """Download the given ranges of the weight files, so that they can be read from the local files.

        Raises:
            Corrupt: a file that was downloaded whole does not have the digest that the hub lists, or its header differs
                from the header in the sparse file.
            NetworkError: the hub is not reachable, or refuses the request.
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
        """Remove the sparse files from `ELSEWHERE`. Later reads no longer fetch missing bytes from the hub."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@checks_types
@contextmanager
def ranged(name: str, *, whole: bool) -> Iterator[Ranged]:
    """Yield a base whose weights are read from a hub in byte ranges.

    The base has a temporary folder, which is removed at the end of the block.

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

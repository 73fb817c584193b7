"""Download a repository, or one of its folders or files. The target appears when all files are complete and verified.

During a pull, the files are in the folder `.NAME.pulling` next to the target. Incomplete files are in `parts/`, named
by digest. Complete files are in `out/` under their own names. When all files are complete, `out/` is renamed to the
target. A later call continues an interrupted pull.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.arguments import checks_types
from ..errors import AdapterkitError, RemoteNotFound, StorageError, public
from ..io.atomic import write_bytes
from ..io.locations import NOTE, Source, path_text, source_of
from ..io.staging import Staging, check_free, clear, take_over
from .hubs import parse, remote_at
from .remote import Remote, RemoteFile, Uri, largest_first
from .transfer import ASKED, fetch

Progress = Callable[[int, int], None]

SUFFIX = "pulling"
CONNECTIONS = 4
HEADROOM = 1 << 20
"""Disk space that a pull needs in addition to the sizes of the files, in bytes: for folders, and for the file that
records the commit."""

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Pulled:
    """The result of a pull, or of a dry run.

    Attributes:
        uri: the requested uri, pinned to the commit.
        out: the folder that was (or would be) written.
        files: a map from each file's name in the folder to its size in bytes and its digest.
        fetched: the number of bytes that this call downloaded, without the bytes that an interrupted run downloaded.
            After a dry run, this is the total size of the files.
        dry: True if the pull was a dry run, which writes nothing.
        already: True if the folder already contained the same files, unchanged, from an earlier pull.
    """

    uri: str
    out: Path
    files: Mapping[str, tuple[int, str]]
    fetched: int
    dry: bool = False
    already: bool = False

    def record(self) -> dict[str, JsonValue]:
        """Return the result as a dict that can be written as JSON."""
        files: list[JsonValue] = [
            {"name": name, "bytes": size, "digest": digest} for name, (size, digest) in self.files.items()
        ]
        return {
            "uri": self.uri, "out": str(self.out), "files": files,
            "bytes": sum(size for size, _ in self.files.values()),
            "fetched": self.fetched, "dry_run": self.dry, "already_done": self.already,
        }  # fmt: skip


class Stopped(Exception):
    """Raised in a worker to end its download, because another worker failed or the user interrupted the pull."""


@checks_types
def pull(
    uri: str | Uri,
    dest: str | os.PathLike[str],
    *,
    include: Sequence[str] = (),
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    token: str | None = None,
) -> Pulled:
    """Download a repository, or one of its folders or files, into the folder `dest`.

    If the hub lists a file's digest, the downloaded file is compared with the digest. A file that does not match is
    downloaded again. When all files are complete, they are moved to `dest` by a rename. To continue an interrupted
    pull, make the same call again. A file in `dest` records the commit; `adapterkit.read` adds the commit to the
    adapter's lineage.

    Args:
        uri: `hf://org/repo[@revision][/path]`, `org/repo`, or a uri of another hub.
        dest: the folder to write. Without `overwrite`, the folder must be missing, be empty, or contain an earlier pull
            of the same uri at the same commit, with all files unchanged.
        include: patterns such as `*.safetensors`; only files whose name matches a pattern are downloaded.
        overwrite: replace the content of `dest`.
        dry_run: list the files, and write nothing.
        progress: a function that is called as `progress(bytes_done, bytes_in_total)`, in the calling thread.
        token: the access token; if absent, the token that the hub's own tools use.

    Raises:
        NetworkError: the repository, revision or file does not exist, access is denied, or the hub is not reachable.
        Malformed: the path of a file in the repository, such as `../name`, leads outside the folder.
        Corrupt: the bytes do not have the digest that the hub lists, even after several downloads.
        StorageError: the disk is full, writing is not permitted, or `dest` has other content.
    """
    remote = remote_at(uri if isinstance(uri, Uri) else parse(path_text(uri)), token)
    target = Path(path_text(dest))
    source = source_at(remote)
    wanted = choose(remote, include)
    listing = {name: (file.size, file.digest) for name, file in wanted.items()}
    if dry_run:
        return Pulled(source.uri, target, listing, sum(size for size, _ in listing.values()), dry=True)
    if not overwrite and _is_there(target, source, listing):
        take_over(target, SUFFIX)
        return Pulled(source.uri, target, listing, 0, already=True)
    check_free(target, overwrite or Staging(target, SUFFIX).folder.is_dir())
    fetched = bring(remote, source, wanted, target, progress, overwrite=overwrite)
    return Pulled(source.uri, target, listing, fetched)


def source_at(remote: Remote) -> Source:
    """Return the origin of a remote's files: the repository's name, the commit, and the uri pinned to this commit."""
    return Source(public(str(remote.uri.at(remote.commit))), public(remote.uri.name), remote.commit)


def choose(remote: Remote, include: Sequence[str] = ()) -> dict[str, RemoteFile]:
    """Return the files to download for a uri. The key of each file is its path in the local folder.

    Raises:
        RemoteNotFound: the uri's path does not exist, or no file there matches `include`.
    """
    path = remote.uri.path
    files = remote.below(path)
    single = len(files) == 1 and files[0].path == path
    start = (path.rfind("/") + 1) if single else len(path) + 1 if path else 0
    chosen = {file.path[start:]: file for file in files if file.path[start:] != NOTE}
    if include:
        chosen = {n: file for n, file in chosen.items() if any(fnmatch.fnmatchcase(n, pattern) for pattern in include)}
    if not chosen:
        cure = f"Change --include (include=). Files in the repository: {', '.join(file.path for file in files[:5])}"
        raise RemoteNotFound("the repository has no matching file", path=str(remote.uri), cure=cure)
    return chosen


def bring(
    remote: Remote, source: Source, wanted: Mapping[str, RemoteFile], target: Path, progress: Progress | None,
    *, overwrite: bool = True,
) -> int:  # fmt: skip
    """Download files into a staging folder, then move them to `target`; return the number of downloaded bytes."""
    stage = Staging(target, SUFFIX)
    with stage.locked():
        check_free(stage.target, overwrite)
        if stage.is_published:  # An earlier run completed the target, but was killed before its cleanup.
            clear(stage.folder, keep={"lock"})
        _lay_out(stage.folder, wanted)
        _check_space(stage.folder, wanted)
        sent = _Transfer(remote, stage.folder, wanted, progress).run()
        source.save(stage.out)
        if stage.inside:
            old = [entry for entry in stage.target.iterdir() if entry != stage.folder]
            stage.publish([(entry, stage.target / entry.name) for entry in sorted(stage.out.iterdir())], old)
        else:
            stage.publish([(stage.out, stage.target)])
        stage.discard()
        return sent


class _Transfer:
    """Download files over several connections. If one download fails, all other downloads stop.

    The calling thread reports the progress.
    """

    def __init__(
        self, remote: Remote, stage: Path, wanted: Mapping[str, RemoteFile], progress: Progress | None
    ) -> None:
        self.remote, self.stage, self.progress = remote, stage, progress
        self.names: dict[str, list[str]] = {}
        # If several files have equal content, download one of them and copy it.
        for name, file in wanted.items():
            self.names.setdefault(file.digest, []).append(name)
        self.files = largest_first(list({file.digest: file for file in wanted.values()}.values()))
        self.total, self.done, self.present_bytes, self.asked = sum(file.size for file in self.files), 0, 0, ASKED
        self.lock, self.stop = threading.Lock(), threading.Event()

    def run(self) -> int:
        """Download all missing files; return the number of downloaded bytes."""
        missing = [file for file in self.files if not self._finished(file)]
        self.asked = ASKED // max(1, min(CONNECTIONS, len(missing)))
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                self._watch({pool.submit(self._one, file) for file in missing})
            finally:
                # Tell the workers to stop; they check `stop` after each chunk. Otherwise the end of the `with` block
                # would wait until the running downloads are complete.
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        return self.done - self.present_bytes

    def _watch(self, running: set[Future[None]]) -> None:
        while running:
            done, running = wait(running, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if self.progress is not None:
                self.progress(self.done, self.total)

    def _finished(self, file: RemoteFile) -> bool:
        names = self.names[file.digest]
        if not all((self.stage / "out" / name).exists() for name in names):
            return False
        self.done += file.size
        self.present_bytes += file.size
        return True

    def _one(self, file: RemoteFile) -> None:
        part = self.stage / "parts" / file.digest.replace(":", "-")
        left = part.stat().st_size if part.exists() else 0
        with self.lock:
            # Do not count the bytes of a partial file that is longer than the listed size. Such a file is wrong, and
            # `fetch` downloads it again.
            self.present_bytes += left if left <= file.size else 0
        fetch(self.remote, file, part, self._count, self.asked)
        first, *others = [self.stage / "out" / name for name in self.names[file.digest]]
        for copy in others:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part, copy)
        first.parent.mkdir(parents=True, exist_ok=True)
        # Rename last. If the process is killed before the rename, the next run finds the complete file in `parts` and
        # does not download it again.
        os.replace(part, first)

    def _count(self, change: int) -> None:
        with self.lock:
            self.done += change
        if self.stop.is_set():
            raise Stopped


def _lay_out(stage: Path, wanted: Mapping[str, RemoteFile]) -> None:
    """Prepare the staging folder; remove files of an earlier run that this pull does not need."""
    names = {f"{file.digest.replace(':', '-')} {name}" for name, file in wanted.items()}
    plan, names_text = stage / "plan", "\n".join(sorted(names))
    same = plan.exists() and plan.read_text("utf-8") == names_text
    if not same:
        shutil.rmtree(stage / "out", ignore_errors=True)
    for folder in ("out", "parts"):
        (stage / folder).mkdir(exist_ok=True)
    for part in (stage / "parts").iterdir():
        if part.name not in {file.digest.replace(":", "-") for file in wanted.values()}:
            part.unlink()
    if not same:
        # Write the plan atomically. Otherwise a crash could leave an incomplete plan. The next run would find that this
        # plan differs from its own plan, and would delete the finished files in `out`.

        write_bytes(plan, names_text.encode())


def _check_space(stage: Path, wanted: Mapping[str, RemoteFile]) -> None:
    # Subtract the bytes that an interrupted run has already written to the disk.
    present = sum(entry.stat().st_size for entry in stage.rglob("*") if entry.is_file())
    needed = sum(file.size for file in wanted.values()) - present + HEADROOM
    free = shutil.disk_usage(stage).free
    if needed > free:
        cure = "Free some disk space, write to another disk, or download fewer files with --include (include=)"
        raise StorageError(f"the pull needs {needed:,} more bytes, but {free:,} are free", path=stage.parent, cure=cure)


def _is_there(target: Path, source: Source, listing: Mapping[str, tuple[int, str]]) -> bool:
    """Whether the target contains an earlier pull of the same commit, with every file unchanged."""
    from .transfer import same

    if not target.is_dir() or source_of(target) != source:
        return False
    try:
        return all(same(target / name, size, digest) for name, (size, digest) in listing.items())
    except AdapterkitError:
        return False

"""Stream a base from a hub: fetch headers first, then each weight file when it is needed, verified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import AdapterkitError, Corrupt, NetworkError, StorageError, Unsupported, UsageError, storage_error
from ..io.lazy import ELSEWHERE
from .folders import locked
from .pulling import source_at
from .reading import needed, outline, remote_of
from .remote import Remote, RemoteFile
from .transfer import fetch
from .uris import parse

NOT_STREAMED = "Leave --stream out: it is fetched whole first"


class Shards:
    """A base whose weight files are sparse until they are downloaded.

    Attributes:
        path: the base's local path.
        begun: True if the download of a weight file was started; a later run can continue with it.
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
        # The sparse files are cheap to write again. Only `parts` are worth keeping from an interrupted run.
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
        """Download the given weight files unless they are there; bytes that came with the header are reused.

        Raises:
            Corrupt: the bytes do not have the listed digest, or their header differs from the one fetched first.
            NetworkError: the hub cannot be reached or refuses.
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
            # The plan was made from a header that came by a range request, which has no digest. Compare it with the
            # header of the verified file.
            with open(part, "rb") as whole:
                header = start[: 8 + int.from_bytes(start[:8], "little")]
                same = whole.read(len(header)) == header
            # Keep the sketch's times: plans and resumed merges identify their inputs by size and time.
            stamp = os.stat(path)
            os.utime(part, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
            os.replace(part, path)
        except OSError as error:
            raise storage_error(error, error.filename or part) from error
        if not same:
            why = "its header came damaged, and what was planned by it is wrong"
            raise Corrupt(why, path=str(self.remote.uri), where=file.path, cure="Run the same command again")
        del ELSEWHERE[path]

    def drop(self, paths: Iterable[str]) -> None:
        """Free the disk space of weight files."""
        for path in paths:
            os.truncate(path, 0)

    def close(self) -> None:
        """Unregister the files that were never downloaded."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@contextmanager
def streamed(name: str | os.PathLike[str], out: Path) -> Iterator[Shards]:
    """Yield the shards of a base on a hub for the length of a merge; they are in a hidden folder beside `out`.

    A shard that an interrupted run had downloaded in part is continued.

    Raises:
        UsageError: `name` is a local path.
        Unsupported: the base is not made of safetensors files.
        AdapterkitError: as for `pull`.
    """
    from ..io.locations import is_remote

    if not is_remote(name):
        raise UsageError("only a base on a hub can be streamed", path=name, cure="Leave --stream out")
    folder = out.parent / f".{out.name}.streaming"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            shards = Shards(remote_of(parse(os.fspath(name))), folder)
            try:
                yield shards
            except StorageError:
                if not shards.begun:  # The output is blocked and nothing was downloaded: nothing is worth keeping.
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                shards.close()
    # A later run can continue after these errors, so the downloaded parts are kept.
    except (NetworkError, StorageError):
        raise
    except AdapterkitError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise storage_error(error, error.filename or folder) from error
    shutil.rmtree(folder, ignore_errors=True)

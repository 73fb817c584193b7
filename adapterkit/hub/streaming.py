"""A base on a hub, a shard at a time: headers first, then each weight file when it is wanted, verified."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import AdapterkitError, Corrupt, NetworkError, StorageError, Unsupported, UsageError, storage_error
from ..tensors.lazy import ELSEWHERE
from .folders import locked
from .pulling import source_at
from .reading import needed, outline, remote_of
from .remote import Remote, RemoteFile
from .transfer import fetch
from .uris import parse

NOT_STREAMED = "Leave --stream out: it is fetched whole first"


class Shards:
    """The weight files of a base that looks whole: its data are holes until they are brought.

    Attributes:
        path: of the base.
        begun: whether a weight file was fetched, or begun to be, that a later run can go on with.
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
        """Fetches weight files, those that are not there yet; what came for the header is not fetched again.

        Raises:
            Corrupt: the bytes do not have the promised digest, or the header that came first was another.
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
            with open(part, "rb") as whole:
                header = start[: 8 + int.from_bytes(start[:8], "little")]
                same = whole.read(len(header)) == header
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
        """Gives the space of weight files back."""
        for path in paths:
            os.truncate(path, 0)

    def close(self) -> None:
        """Forgets the files that were never brought."""
        for path in self.files:
            ELSEWHERE.pop(path, None)


@contextmanager
def streamed(name: str | os.PathLike[str], out: Path) -> Iterator[Shards]:
    """The shards of a base on a hub, for the length of a merge; they lie in a hidden folder beside `out`.

    What an interrupted run left of a shard is used again.

    Raises:
        UsageError: it is a local path.
        Unsupported: it is not made of safetensors files.
        AdapterkitError: as for `pull`.
    """
    from ..tensors.locations import is_remote

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
                if not shards.begun:  # Something is in the way of the output: there is nothing to go on with.
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            finally:
                shards.close()
    except (NetworkError, StorageError):
        raise
    except AdapterkitError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise storage_error(error, error.filename or folder) from error
    shutil.rmtree(folder, ignore_errors=True)

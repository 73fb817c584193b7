"""Write to a hub from many machines: each machine uploads whole weight files, and one process makes them visible.

The process that makes the files visible does not have the weights. It builds the output in a local folder, in which
each weight file is replaced by a sketch: a sparse file with the real header. For each uploaded weight file, a small
file next to the folder records the hub's answer. With these records, the same command can resume after the process was
killed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..errors import StorageError, storage_error
from ..io.atomic import write_bytes
from ..io.strict_json import load_json
from .hubs import parse, remote_at
from .pushing import begun, push_placed
from .remote import Placed, Remote, lost
from .transfer import digests

SKETCHED = (".safetensors", ".gguf")


class Placing:
    """An output whose weight files are uploaded to a hub one by one, before the output becomes visible.

    Attributes:
        path: the local folder with the sketches and all other files.
        uri: the uri to upload weight files to.
    """

    def __init__(self, remote: Remote, folder: Path, overwrite: bool) -> None:
        self.remote, self.folder, self.overwrite = remote, folder, overwrite
        self.path, self.uri = folder / "out", str(remote.uri)
        self.notes = folder / "placed"

    def begin(self, names: Iterable[str]) -> None:
        """Claim the target on the hub for weight files with these names, before tasks upload the files.

        Raises:
            StorageError: the hub already has files there, and `overwrite` is not set.
            NetworkError: access is denied, or the hub is not reachable.
        """
        there = self.remote.there() or {}
        met = sorted(there if self.remote.whole else {self._inside(name) for name in names} & there.keys())
        if met and not self.overwrite:
            # Check for existing files now. On hubs without commits, tasks replace existing files, and the check at the
            # end would be too late.
            shown = ", ".join(met[:5]) + (", ..." if len(met) > 5 else "")
            cure = "Write to another repository, branch or folder, or pass --overwrite (in Python overwrite=True)"
            raise StorageError(f"the hub already has these files: {shown}", path=self.uri, cure=cure)
        self.remote.begin()

    def took(self, name: str, placed: object) -> None:
        """Record on disk that a weight file was uploaded."""
        assert isinstance(placed, Placed)
        self._note(name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self._note(name), json.dumps(asdict(placed)).encode())

    def holds(self, name: str) -> bool:
        """Whether a weight file was uploaded and the hub still has it."""
        placed = self._placed(name)
        return placed is not None and self.remote.holds(placed)

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of weight files that will be uploaded again."""
        for name in names:
            self._note(name).unlink(missing_ok=True)

    def check(self) -> None:
        """Remove the finished local folder if the hub no longer has its files, so that the merge runs again."""
        if self.path.exists() and not all(self.holds(name) for name in self._sketches()):
            shutil.rmtree(self.path)

    def push(self) -> bool:
        """Make the output visible; return whether anything changed at the hub.

        Raises:
            Corrupt: the hub no longer has an uploaded file.
            AdapterkitError: as for `push`.
        """
        found = {name: self._placed(name) for name in self._sketches()}
        placed = {name: each for name, each in found.items() if each is not None}
        if missing := sorted(found.keys() - placed.keys()):
            raise lost(self.uri, missing[0])
        pushed = push_placed(self.path, placed, self.remote, self.overwrite)
        return bool(pushed.added or pushed.replaced or pushed.removed)

    def _sketches(self) -> list[str]:
        return [file.name for file in sorted(self.path.iterdir()) if file.suffix in SKETCHED]

    def _inside(self, name: str) -> str:
        """Return a file's path in the repository."""
        path = self.remote.uri.path
        return f"{path}/{name}" if path else name

    def _note(self, name: str) -> Path:
        return self.notes / f"{name}.json"

    def _placed(self, name: str) -> Placed | None:
        try:
            told = load_json(self._note(name).read_text("utf-8"))
            size, sha256, git = told["digests"]
            return Placed(str(told["path"]), (int(size), str(sha256), str(git)), str(told["mark"]))
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None


@contextmanager
def placing(name: str, overwrite: bool = False, unchanged: Callable[[], object] = lambda: None) -> Iterator[Placing]:
    """Yield an output whose weight files are uploaded one by one; make the output visible when the block ends.

    The local folder with the sketches is kept, so that the same command recognises the finished output.

    Args:
        name: the uri.
        overwrite: replace existing files.
        unchanged: a function to call if nothing was pushed, because the hub already had all files.

    Raises:
        AdapterkitError: as for `push`; a missing permission is reported before anything is written.
    """
    remote, folder = begun(name, "placing")
    place = Placing(remote, folder, overwrite)
    try:
        place.check()
    except OSError as error:
        raise storage_error(error, folder) from error
    yield place
    if not place.push():
        unchanged()


def put(uri: str, name: str, file: Path) -> Placed:
    """Upload one weight file of an output; another process makes the output visible.

    Args:
        uri: the output's uri.
        name: the name of the file in the output.
        file: the local file.

    Raises:
        NetworkError: access is denied, or the hub is not reachable.
        Corrupt: the hub received bytes that differ from the local file.
    """
    remote = remote_at(parse(uri))
    path = f"{remote.uri.path}/{name}" if remote.uri.path else name
    return remote.place(path, file, digests(file))

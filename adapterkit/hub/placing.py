"""Write to a hub from many machines: each puts whole weight files there, and one process makes them visible at the end.

The process that makes the output visible never has the weights. It builds the output in a local folder in which the
weight files are sketches: their real headers, and nothing after them. Notes beside the folder say what the hub answered
for each file, so that the same command continues after the process was killed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from ..errors import StorageError, storage_error
from ..io.atomic import write_bytes
from ..io.strict_json import load_json
from .folders import cache_folder
from .hubs import parse, remote_at
from .pushing import push_placed
from .remote import Placed, Remote, lost
from .transfer import digests

SKETCHED = (".safetensors", ".gguf")


class Placing:
    """An output whose weight files are put at a hub one at a time.

    Attributes:
        path: the local folder of everything else.
        uri: the uri to put files at.
    """

    def __init__(self, remote: Remote, folder: Path, overwrite: bool) -> None:
        self.remote, self.folder, self.overwrite = remote, folder, overwrite
        self.path, self.uri = folder / "out", str(remote.uri)
        self.notes = folder / "placed"

    def begin(self, names: Iterable[str]) -> None:
        """Claim the place for weight files of these names, which tasks will then put there.

        Raises:
            StorageError: files are there already, and `overwrite` is not set.
            NetworkError: access is denied, or the hub is not reachable.
        """
        there = self.remote.there() or {}
        met = sorted(there if self.remote.whole else {self._inside(name) for name in names} & there.keys())
        if met and not self.overwrite:
            # Refuse now, not after the comparison at the end: tasks replace files on hubs that have no commits.
            shown = ", ".join(met[:5]) + (", ..." if len(met) > 5 else "")
            cure = "Write to another repository, branch or folder, or pass --overwrite (in Python overwrite=True)"
            raise StorageError(f"the hub already has these files: {shown}", path=self.uri, cure=cure)
        self.remote.begin()

    def took(self, name: str, placed: object) -> None:
        """Note that a weight file is at the hub."""
        assert isinstance(placed, Placed)
        self._note(name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self._note(name), json.dumps(asdict(placed)).encode())

    def holds(self, name: str) -> bool:
        """Whether a weight file was put at the hub, and is still there."""
        placed = self._placed(name)
        return placed is not None and self.remote.holds(placed)

    def forget(self, names: Iterable[str]) -> None:
        """Forget weight files, which will be put again."""
        for name in names:
            self._note(name).unlink(missing_ok=True)

    def check(self) -> None:
        """Remove a finished output that the hub no longer has, so that it is made again."""
        if self.path.exists() and not all(self.holds(name) for name in self._sketches()):
            shutil.rmtree(self.path)

    def push(self) -> bool:
        """Make the output visible; return whether anything changed at the hub.

        Raises:
            Corrupt: the hub no longer has a file that was put there.
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
    """Yield an output whose weight files are put at a hub one at a time; make it visible when the block ends.

    The local folder stays, without the weights, so that the same command recognises its finished output.

    Args:
        name: the uri.
        overwrite: replace existing files.
        unchanged: a function to call if the hub already had everything, so that nothing was pushed.

    Raises:
        AdapterkitError: as for `push`; a missing permission is reported before anything is written.
    """
    uri = parse(name)
    remote = remote_at(uri)
    remote.check_writable()
    # Look at the target now, so that a refusal comes before the work, not after hours of it.
    _ = remote.there()
    folder = cache_folder() / "placing" / hashlib.sha256(str(uri).encode()).hexdigest()[:16]
    place = Placing(remote, folder, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place.check()
    except OSError as error:
        raise storage_error(error, folder) from error
    yield place
    if not place.push():
        unchanged()


def put(uri: str, name: str, file: Path) -> Placed:
    """Upload one weight file of an output that another process makes visible.

    Args:
        uri: the output's uri.
        name: the name of the file in it.
        file: the local file.

    Raises:
        NetworkError: access is denied, or the hub is not reachable.
        Corrupt: the hub received other bytes.
    """
    remote = remote_at(parse(uri))
    path = f"{remote.uri.path}/{name}" if remote.uri.path else name
    return remote.place(path, file, digests(file))

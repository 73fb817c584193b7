"""What is written to a hub: made in a folder of its own first, pushed when it is whole, and then forgotten here."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from ..errors import StorageError, storage_error
from ..tensors.locations import located
from .folders import cache_folder
from .hubs import remote_at
from .licences import Licence, licence_at
from .pushing import push
from .uris import parse


@contextmanager
def outgoing(
    name: str,
    overwrite: bool = False,
    sources: Sequence[str | PathLike[str]] = (),
    unchanged: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """A path to write to; what is there is pushed when the block ends without an error.

    After an error it stays, and the same command goes on with it.

    Args:
        name: of the place.
        overwrite: replace what is there.
        sources: what it is made from; a licence that all their cards name is passed on.
        unchanged: called where all of it was there already, and nothing was pushed.

    Raises:
        AdapterkitError: as for `push`; no access to the place is said before anything is written.
    """
    uri = parse(name)
    remote = remote_at(uri)
    remote.check_writable()
    _ = remote.there()
    folder = cache_folder() / "outgoing" / hashlib.sha256(str(uri).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    out = folder / "out"
    yield out
    try:
        pushed = push(out, uri, overwrite=overwrite, licence=_licence([*map(located, sources)]))
    except StorageError as error:
        if error.path == str(uri):
            # It is there with other content: to go on would meet the same.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    if not (pushed.added or pushed.replaced or pushed.removed):
        unchanged()


def _licence(sources: Sequence[Path]) -> Licence:
    """The one licence of all sources; none where one has none, or they differ: whoever pushes has to choose."""
    found = [licence_at(source) for source in sources]
    return found[0] if found and all(licence == found[0] for licence in found) else {}

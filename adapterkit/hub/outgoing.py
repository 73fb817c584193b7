"""Write to a hub: build the output in a local folder, push it when it is complete, then delete the folder."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from ..core.licences import Licence, licence_at
from ..errors import StorageError, storage_error
from ..io.locations import located
from .folders import cache_folder
from .hubs import remote_at
from .pushing import push
from .uris import parse


@contextmanager
def outgoing(
    name: str,
    overwrite: bool = False,
    sources: Sequence[str | PathLike[str]] = (),
    unchanged: Callable[[], object] = lambda: None,
) -> Iterator[Path]:
    """Yield a local path to write to; push its content when the block ends without an error.

    After an error the folder stays, and the same command continues with it.

    Args:
        name: the uri to push to.
        overwrite: replace existing files.
        sources: the inputs of the output; a licence that all their cards name is passed on.
        unchanged: called if the hub already had everything, so that nothing was pushed.

    Raises:
        AdapterkitError: as for `push`; a missing permission is reported before anything is written.
    """
    uri = parse(name)
    remote = remote_at(uri)
    remote.check_writable()
    # Look at the target now: a refusal should come before the work, not after hours of it.
    _ = remote.there()
    # Derived from the uri, so that the same command finds what an interrupted one left.
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
            # The hub holds other content. Continuing from this folder would only meet the same error.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    if not (pushed.added or pushed.replaced or pushed.removed):
        unchanged()


def _licence(sources: Sequence[Path]) -> Licence:
    """Return the licence of all sources; empty if one has none or they differ, because a person must choose then."""
    found = [licence_at(source) for source in sources]
    return found[0] if found and all(licence == found[0] for licence in found) else {}

"""What is written to a hub: made in a folder of its own first, pushed when it is whole, and then forgotten here."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import StorageError, storage_error
from .folders import cache_folder
from .hubs import remote_at
from .pushing import push
from .uris import parse


@contextmanager
def outgoing(name: str, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to; what is there is pushed when the block ends without an error.

    After an error it stays, and the same command goes on with it.

    Raises:
        AdapterkitError: as for `push`; no access to the place is said before anything is written.
    """
    uri = parse(name)
    remote = remote_at(uri)
    _ = remote.there()
    folder = cache_folder() / "outgoing" / hashlib.sha256(str(uri).encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
    yield folder / "out"
    try:
        push(folder / "out", uri, overwrite=overwrite)
    except StorageError as error:
        if error.path == str(uri):
            # It is there with other content: to go on would meet the same.
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)

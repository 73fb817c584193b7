"""Commands whose output is there already: the same command on the same inputs is done, and says so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ._options import Settings, stated
from ._render import View, show

PLACES = {"out", "dst", "overwrite"}
"""Parameters of commands that do not decide what is written."""


def made_from(files: Iterable[Path], packages: Sequence[str] = ()) -> str:
    """A digest of what decides the output of this command: its words, its input files, and versions.

    Args:
        files: all files that are read.
        packages: distributions beside adapterkit whose version decides, too.

    Raises:
        StorageError: a file cannot be read.
    """
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__
    from ..errors import storage_error
    from ..io.staging import digest_of, listed

    ctx = click.get_current_context()
    words = {name: value for name, value in ctx.params.items() if name not in PLACES} | stated()
    try:
        read = listed(files)
    except OSError as error:
        raise storage_error(error, error.filename or "a file") from error
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):  # onnxruntime has a package of another name for GPUs.
            versions[name] = version(name)
    return digest_of([__version__, versions, ctx.command.name, words, read])


def is_done(settings: Settings, out: str, digest: str | None, overwrite: bool) -> bool:
    """Whether the output stands there, made from the same and unchanged; then this says so on standard output."""
    from ..io.staging import Staging, take_over

    if overwrite or digest is None:
        return False
    take_over(Path(out))  # A run that was killed when its work was done leaves a stage.
    if not Staging(Path(out)).is_finished(digest):
        return False
    show(settings, {"out": out, "already_done": True}, _view)
    return True


def _view(record: Mapping[str, Any]) -> View:
    yield f"already done: {record['out']} was made from the same inputs and is unchanged"

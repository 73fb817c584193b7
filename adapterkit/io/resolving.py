"""The interface through which other packages call the hub package without importing it.

Functions that take a path also take a uri, such as `hf://org/repo`. But the packages that define these functions cannot
import the hub package, because the hub package imports them. So `adapterkit/__init__.py` calls `install` with a
function that returns the hub package, and the other packages call `hub` to get the hub package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from .lazy import Span


class StreamedBase(Protocol):
    """A base on a hub. Its weight files are downloaded one by one, when they are needed."""

    @property
    def path(self) -> Path:
        """The local folder or single file. The headers of all weight files are available from the start."""
        ...

    def bring(self, paths: Iterable[str]) -> None:
        """Download the weight files at `paths`, except those that have already been downloaded."""

    def drop(self, paths: Iterable[str]) -> None:
        """Empty the local weight files at `paths`, to free their disk space."""


class RangedBase(Protocol):
    """A base on a hub. Only the needed byte ranges of its weight files are downloaded."""

    @property
    def path(self) -> Path:
        """The local folder or single file. The headers of all weight files are available from the start."""
        ...

    @property
    def uri(self) -> str:
        """The base's uri, pinned to its commit."""
        ...

    def bring(self, spans: Iterable[Span]) -> None:
        """Download the given byte ranges of the weight files into the local files."""

    def drop(self) -> None:
        """Free the disk space of all downloaded ranges."""


class PlacedOutput(Protocol):
    """An output on a hub. Other processes upload its weight files, each file as soon as it is complete."""

    @property
    def path(self) -> Path:
        """The local path of the output. The weight files there are sparse: only their headers are stored."""
        ...

    @property
    def uri(self) -> str:
        """The uri to upload weight files to."""
        ...

    def begin(self, names: Iterable[str]) -> None:
        """Claim the target on the hub. `names` lists the weight files that will be uploaded."""

    def took(self, name: str, placed: object) -> None:
        """Record on disk that a weight file was uploaded. `placed` is the value that `Hub.put` returned for it."""

    def holds(self, name: str) -> bool:
        """Whether a weight file was uploaded and the hub still has it."""
        ...

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of files that will be uploaded again."""


class Hub(Protocol):
    """The functions of the package `adapterkit.hub` that other packages call."""

    def hub_of(self, scheme: str) -> object:
        """Return the hub that a uri scheme, such as `hf` or `s3`, refers to.

        Raises:
            UsageError: the scheme is unknown.
        """

    def fetched(self, name: str) -> Path:
        """Return a local path of an adapter or a model on a hub; download it if the cache lacks it."""
        ...

    def headers(self, name: str) -> AbstractContextManager[Path]:
        """Return a context manager that yields a local path of an adapter or a model.

        The path is for code that reads only headers.
        """
        ...

    def outgoing(
        self,
        name: str,
        overwrite: bool = False,
        sources: Sequence[str | os.PathLike[str]] = (),
        unchanged: Callable[[], object] = ...,
    ) -> AbstractContextManager[Path]:
        """Return a context manager that yields a local path to write to.

        If the block succeeds, the files at this path are pushed to the uri `name`.
        """
        ...

    def pinned(self, name: str) -> str:
        """Return the uri `name`, pinned to its current commit."""
        ...

    def ranged(self, name: str, *, whole: bool) -> AbstractContextManager[RangedBase]:
        """Return a context manager that yields a base. Only the needed byte ranges of its weight files are downloaded.

        If `whole` is True, all files of the base that are not weights are also downloaded.
        """
        ...

    def placing(
        self, name: str, overwrite: bool = False, unchanged: Callable[[], object] = ...
    ) -> AbstractContextManager[PlacedOutput]:
        """Return a context manager that yields an output on a hub. Other processes upload its weight files."""
        ...

    def put(self, uri: str, name: str, file: Path) -> object:
        """Upload one file of a `PlacedOutput`; return the value to pass to `PlacedOutput.took` as `placed`."""
        ...

    def scratch(self) -> AbstractContextManager[Path]:
        """Return a context manager that yields an empty folder and removes it at the end."""
        ...

    def streamed(self, name: str | os.PathLike[str], out: Path) -> AbstractContextManager[StreamedBase]:
        """Return a context manager that yields a base. Its weight files are downloaded one by one."""
        ...


_load: Callable[[], Hub] | None = None


def install(load: Callable[[], Hub]) -> None:
    """Set `load`, the function that imports and returns the hub package. `load` is called only if a uri is used."""
    global _load
    _load = load


def hub() -> Hub:
    """Call the function that `install` set, and return the hub package."""
    # `_load` is never None at this point: `adapterkit/__init__.py` calls `install`, and Python runs
    # `adapterkit/__init__.py` before any other module of the package.
    assert _load is not None
    return _load()

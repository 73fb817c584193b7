"""The interface through which other packages call the hub package without importing it.

Functions that take a path also take a uri, such as `hf://org/repo`. The packages that define these functions cannot
import the hub package, because the hub package imports them. So `adapterkit/__init__.py` installs a function that
returns the hub package, and these packages call this function.
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
    """A base on a hub whose weight files are downloaded one by one when they are needed."""

    @property
    def path(self) -> Path:
        """The local folder, or the single file, with all headers."""
        ...

    def bring(self, paths: Iterable[str]) -> None:
        """Download the weight files that are not present."""

    def drop(self, paths: Iterable[str]) -> None:
        """Free the disk space of weight files."""


class RangedBase(Protocol):
    """A base on a hub; only the bytes that are read are downloaded."""

    @property
    def path(self) -> Path:
        """The local folder, or the single file, with all headers."""
        ...

    @property
    def uri(self) -> str:
        """The base's uri, pinned to its commit."""
        ...

    def bring(self, spans: Iterable[Span]) -> None:
        """Download ranges of the weight files, so that the local files can be read directly."""

    def drop(self) -> None:
        """Free the disk space of all downloaded ranges."""


class PlacedOutput(Protocol):
    """An output on a hub; other processes upload its weight files, each as soon as it is complete."""

    @property
    def path(self) -> Path:
        """The local output; its weight files are sparse."""
        ...

    @property
    def uri(self) -> str:
        """The uri to upload weight files to."""
        ...

    def begin(self, names: Iterable[str]) -> None:
        """Claim the target on the hub for weight files with these names."""

    def took(self, name: str, placed: object) -> None:
        """Record on disk that a weight file was uploaded."""

    def holds(self, name: str) -> bool:
        """Whether a weight file was uploaded and the hub still has it."""
        ...

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of files that will be uploaded again."""


class Hub(Protocol):
    """The functions of the package `adapterkit.hub` that other packages call."""

    def hub_of(self, scheme: str) -> object:
        """Return the hub of a scheme.

        Raises:
            UsageError: the scheme is unknown.
        """

    def fetched(self, name: str) -> Path:
        """Return a local path of an adapter or a model on a hub; download it if the cache lacks it."""
        ...

    def headers(self, name: str) -> AbstractContextManager[Path]:
        """Return a context with a local path for reading headers."""
        ...

    def outgoing(
        self,
        name: str,
        overwrite: bool = False,
        sources: Sequence[str | os.PathLike[str]] = (),
        unchanged: Callable[[], object] = ...,
    ) -> AbstractContextManager[Path]:
        """Return a context with a local path to write to; its content is pushed to a hub at the end of the block."""
        ...

    def pinned(self, name: str) -> str:
        """Return a uri with its current commit."""
        ...

    def ranged(self, name: str, *, whole: bool) -> AbstractContextManager[RangedBase]:
        """Return a context with a base; only the bytes that are read are downloaded."""
        ...

    def placing(
        self, name: str, overwrite: bool = False, unchanged: Callable[[], object] = ...
    ) -> AbstractContextManager[PlacedOutput]:
        """Return a context with an output on a hub to which other processes upload the weight files."""
        ...

    def put(self, uri: str, name: str, file: Path) -> object:
        """Upload one file of a `PlacedOutput`; return the value for the argument of `PlacedOutput.took`."""
        ...

    def scratch(self) -> AbstractContextManager[Path]:
        """Return a context with an empty folder."""
        ...

    def streamed(self, name: str | os.PathLike[str], out: Path) -> AbstractContextManager[StreamedBase]:
        """Return a context with a base whose weight files are downloaded one by one."""
        ...


_load: Callable[[], Hub] | None = None


def install(load: Callable[[], Hub]) -> None:
    """Set the function that returns the hub package; it may import the package, because it is only called for uris."""
    global _load
    _load = load


def hub() -> Hub:
    """Call the function that `install` set, and return the hub package."""
    # `adapterkit/__init__.py` installs the hub, and Python runs that file before any other module of the package.
    assert _load is not None
    return _load()

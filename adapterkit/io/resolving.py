"""The hub's interface for lower packages: a protocol, and the hub that `adapterkit/__init__.py` installs.

Functions that take a path also take a name on a hub, such as `hf://org/repo`. The hub package imports the packages that
define these functions, so these packages cannot import it. They call the installed hub instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path


class StreamedBase(Protocol):
    """A base on a hub whose weight files are downloaded one at a time."""

    @property
    def path(self) -> Path:
        """The local folder, or the single file, with all headers."""
        ...

    def bring(self, paths: Iterable[str]) -> None:
        """Download the weight files that are not present."""

    def drop(self, paths: Iterable[str]) -> None:
        """Free the disk space of weight files."""


class Hub(Protocol):
    """The functions that resolve names on hubs; `adapterkit.hub` implements them."""

    def hub_of(self, scheme: str) -> object:
        """Return the hub of a scheme.

        Raises:
            UsageError: the scheme is unknown.
        """

    def fetched(self, name: str) -> Path:
        """Return a local path of something on a hub; download it if needed."""
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
        """Return a context with a local path whose content is pushed to a hub at the end."""
        ...

    def streamed(self, name: str | os.PathLike[str], out: Path) -> AbstractContextManager[StreamedBase]:
        """Return a context with a base whose weight files are downloaded one at a time."""
        ...


_load: Callable[[], Hub] | None = None


def install(load: Callable[[], Hub]) -> None:
    """Set the function that returns the hub. It is called for each name on a hub, so it can import the hub lazily."""
    global _load
    _load = load


def hub() -> Hub:
    """Return the installed hub."""
    # `adapterkit/__init__.py` installs the hub, and Python runs that file before any other module of the package.
    assert _load is not None
    return _load()

"""A place on a hub: what it holds, at which commit, and how its bytes come and go. Each hub is a class of this kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, TypeVar

from ..errors import AdapterkitError, Malformed, NetworkError, RemoteNotFound, Unsupported, nearest
from .names import check_names
from .retries import Passing, retrying
from .uris import Uri

T = TypeVar("T")

MAX_FILES = 100_000

Content = Path | bytes
"""What is pushed as one file."""

Digests = tuple[int, str, str]
"""A file's bytes, `sha256:...` and `git:...`."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit.

    Attributes:
        path: inside the repository.
        size: bytes.
        digest: `sha256:...` or `md5:...` of the content, or `git:...`, the sha1 that git names a small file by; where a
            hub tells none of them, `unknown:...` with whatever it tells contents apart by.
    """

    path: str
    size: int
    digest: str

    @property
    def verifiable(self) -> bool:
        """Whether its bytes can be held against its digest."""
        return not self.digest.startswith("unknown:")


class Remote(ABC):
    """A place on a hub.

    Args:
        uri: the repository, and the revision that is meant.
        token: a token; what the hub's own tools use if absent.
    """

    form: ClassVar[str]
    """How its names are written."""

    whole: ClassVar[bool] = False
    """A push leaves what was pushed alone, not beside what was there."""

    cards_below: ClassVar[bool] = False
    """A folder of the place is a place of its own, with a model card."""

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        self.uri, self.token = uri, token

    @classmethod
    @abstractmethod
    def named(cls, rest: str) -> Uri | None:
        """What stands after the scheme, read; None where it makes no sense here."""

    @property
    @abstractmethod
    def commit(self) -> str:
        """The name, for ever, of the state that the revision names now.

        Raises:
            NetworkError: there is no such repository or revision, access is denied, or the hub cannot be reached.
        """

    @abstractmethod
    def listed(self) -> Iterable[RemoteFile]:
        """The files of the commit; requests are made by way of `call`."""

    @abstractmethod
    def opened(
        self, file: RemoteFile, start: int, end: int | None
    ) -> AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """The bytes of a file from `start`, to before `end` if it is given.

        Returns:
            where the bytes that come begin, which is before `start` where the hub heeds no ranges; and the bytes.
        """

    @abstractmethod
    def passing(self, error: Exception) -> Passing | None:
        """What an exception means: a fault of the moment, or None."""

    @abstractmethod
    def failure(self, error: Exception) -> AdapterkitError | None:
        """A fault of the network or the hub in adapterkit's words, without secrets; None for any other exception."""

    @cached_property
    def files(self) -> tuple[RemoteFile, ...]:
        """All files of the commit, their names checked.

        Raises:
            Malformed: a name would leave the folder, or they cannot stand beside each other.
            NetworkError: as for `commit`.
        """
        found: list[RemoteFile] = []
        for file in self.listed():
            found.append(file)
            if len(found) > MAX_FILES:
                raise Malformed(f"more than {MAX_FILES:,} files", path=str(self.uri), cure="Name a folder of it")
        try:
            check_names(file.path for file in found)
        except AdapterkitError as error:
            raise error.at(path=str(self.uri)) from None
        return tuple(found)

    def below(self, path: str) -> tuple[RemoteFile, ...]:
        """The files of a folder of the repository, or the one file of that name.

        Raises:
            RemoteNotFound: there are none.
        """
        found = tuple(f for f in self.files if not path or f.path == path or f.path.startswith(f"{path}/"))
        if not found:
            cure = nearest(path, (file.path for file in self.files)) or "See the files with 'adapterkit pull --dry-run'"
            raise RemoteNotFound("no such file or folder in the repository", path=str(self.uri), cure=cure)
        return found

    def call(self, act: Callable[[], T]) -> T:
        """Runs a request, again where that may help.

        Raises:
            NetworkError: it failed for good.
        """
        try:
            return retrying(act, self.passing)
        except AdapterkitError:
            raise
        except Exception as error:
            failure = self.failure(error)
            if failure is None:
                raise
        # Outside of the handler: the exception caught holds the request with its headers.
        raise failure

    def there(self) -> Mapping[str, RemoteFile] | None:
        """The files that a push would meet, by path; None where there is no such place yet.

        Raises:
            NetworkError: access is denied, or the hub cannot be reached.
        """
        try:
            return {file.path: file for file in self.files}
        except RemoteNotFound:
            return None

    def check_writable(self) -> None:
        """Checks that things can be pushed to places of this kind.

        Raises:
            Unsupported: they cannot.
        """
        if type(self).send is Remote.send:
            why = f"nothing can be pushed to a place of the kind {self.uri.scheme}://"
            raise Unsupported(why, path=str(self.uri), cure="Push to hf://, oci:// or s3://")

    def send(
        self, files: Mapping[str, Content], changed: Sequence[str], found: Mapping[str, Digests], message: str,
        private: bool,
    ) -> str:  # fmt: skip
        """Puts files there so that nobody sees half of them.

        Args:
            files: all that is pushed, by path.
            changed: names of those that are not there as they are.
            found: their digests.
            message: of the commit.
            private: a place that has to be made is private.

        Returns:
            the commit.
        """
        self.check_writable()
        raise AssertionError("a class that says that it can be pushed to does it itself")

    def kept(self) -> str:
        """The commit of what is there already; a branch that has to be made is."""
        return self.commit

    def tagged(self, tag: str, commit: str) -> None:
        """Sets a tag on a commit."""
        raise Unsupported(f"{self.uri.scheme}:// knows no tags", path=str(self.uri), cure="Leave the tag out")


def largest_first(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The order in which several connections are done soonest."""
    return sorted(files, key=lambda file: (-file.size, file.path))


NOT_REACHED = "Check the connection, then run the same command again: it goes on where it stopped"


def unreachable(place: str, host: str, error: Exception) -> NetworkError:
    """The words for a connection that fails, of the kind of failure and no more: an exception may hold secrets."""
    why = f"cannot reach {host} ({type(error).__name__.removesuffix('Error')})"
    return NetworkError(str(error) if isinstance(error, Passing) else why, path=place, cure=NOT_REACHED)

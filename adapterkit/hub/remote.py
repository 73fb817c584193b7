"""A repository on a hub: what it holds, at which commit; every request retried, every fault in adapterkit's words.

huggingface_hub's environment holds: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. No text of a token, a header or a signed
address reaches an error: what a server says is shown with such parts taken out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AccessDenied, AdapterkitError, Malformed, NetworkError, RemoteNotFound
from .names import check_names
from .retries import PASSING, Passing, retry_after, retrying
from .uris import Uri

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

MAX_FILES = 100_000


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a commit.

    Attributes:
        path: inside the repository.
        size: bytes.
        digest: `sha256:...` of the content, or `git:...`, the sha1 that git names a small file by.
    """

    path: str
    size: int
    digest: str


class Remote:
    """A repository on a hub.

    Args:
        uri: the repository, and the revision that is meant.
        token: a token; the one that huggingface_hub finds if absent.
    """

    def __init__(self, uri: Uri, token: str | None = None) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.uri = uri
        self.token = token or get_token()
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.api: HfApi = HfApi(endpoint=self.endpoint, token=self.token or False)

    @cached_property
    def commit(self) -> str:
        """The commit that the revision names.

        Raises:
            NetworkError: there is no such repository or revision, access is denied, or the hub cannot be reached.
        """
        found = self.call(lambda: self.api.model_info(self.uri.repo, revision=self.uri.revision)).sha
        if not isinstance(found, str) or not re.fullmatch(r"[0-9a-f]{40,64}", found):
            raise NetworkError("the hub did not say which commit that is", path=str(self.uri), cure=_NOT_A_HUB)
        return found

    @cached_property
    def files(self) -> tuple[RemoteFile, ...]:
        """All files of the commit, their names checked.

        Raises:
            Malformed: a name would leave the folder, or they cannot stand beside each other.
            NetworkError: as for `commit`.
        """
        files = self.call(
            lambda: self._list(self.api.list_repo_tree(self.uri.repo, recursive=True, revision=self.commit))
        )
        try:
            check_names(file.path for file in files)
        except AdapterkitError as error:
            raise error.at(path=str(self.uri)) from None
        return files

    def below(self, path: str) -> tuple[RemoteFile, ...]:
        """The files of a folder of the repository, or the one file of that name.

        Raises:
            RemoteNotFound: there are none.
        """
        found = tuple(f for f in self.files if not path or f.path == path or f.path.startswith(f"{path}/"))
        if not found:
            from ..errors import nearest

            cure = nearest(path, (file.path for file in self.files)) or "See the files with 'adapterkit pull --dry-run'"
            raise RemoteNotFound("no such file or folder in the repository", path=str(self.uri), cure=cure)
        return found

    def _list(self, entries: Iterable[Any]) -> tuple[RemoteFile, ...]:
        found: list[RemoteFile] = []
        for entry in entries:
            if hasattr(entry, "blob_id"):
                found.append(self._file(entry))
            if len(found) > MAX_FILES:
                raise Malformed(f"more than {MAX_FILES:,} files", path=str(self.uri), cure="Name a folder of it")
        return tuple(found)

    def _file(self, entry: Any) -> RemoteFile:
        digest = f"git:{entry.blob_id}" if entry.lfs is None else f"sha256:{entry.lfs.sha256}"
        size = entry.size if entry.lfs is None else entry.lfs.size
        path = entry.path
        told = isinstance(path, str) and isinstance(size, int) and size >= 0
        if not told or not re.fullmatch(r"git:[0-9a-f]{40}|sha256:[0-9a-f]{64}", digest):
            raise Malformed("the hub lists a file without its size or digest", path=str(self.uri), cure=_NOT_A_HUB)
        return RemoteFile(path, size, digest)

    def call(self, act: Callable[[], T]) -> T:
        """Runs a request, again where that may help.

        Raises:
            NetworkError: it failed for good.
        """
        try:
            return retrying(act, passing)
        except AdapterkitError:
            raise
        except Exception as error:
            failure = self.failure(error)
            if failure is None:
                raise
        # Outside of the handler: the exception caught holds the request with its headers.
        raise failure

    def failure(self, error: Exception) -> NetworkError | None:
        """A fault of the network or the hub in adapterkit's words; None for any other exception."""
        from huggingface_hub import errors
        from huggingface_hub.utils import httpx

        place, error = str(self.uri), _cause(error)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return NetworkError("offline mode is on", path=place, cure="Unset HF_HUB_OFFLINE, or name a local path")
        if isinstance(error, errors.HfHubHTTPError):
            return self._refusal(error, errors)
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, Passing, TimeoutError)):
            why = f"cannot reach {_origin(self.endpoint)} ({type(error).__name__.removesuffix('Error')})"
            return NetworkError(str(error) if isinstance(error, Passing) else why, path=place, cure=_REACH)
        if isinstance(error, (errors.HFValidationError, ValueError, KeyError, TypeError, AttributeError)):
            why = f"the hub's answer makes no sense ({type(error).__name__})"
            return NetworkError(why, path=place, cure=_NOT_A_HUB)
        return None

    def _refusal(self, error: Any, errors: Any) -> NetworkError:
        place, status = str(self.uri), error.response.status_code
        known = "with this token" if self.token else "without a token"
        if isinstance(error, errors.GatedRepoError):
            cure = f"Accept its terms at {_origin(self.endpoint)}/{self.uri.repo}, and set HF_TOKEN to a token of yours"
            return AccessDenied("access to this repository is gated", path=place, cure=cure)
        if isinstance(error, errors.RevisionNotFoundError):
            cure = "Check the branch, tag or commit after the @"
            return RemoteNotFound(f"no revision {self.uri.revision or 'main'!r}", path=place, cure=cure)
        if isinstance(error, errors.EntryNotFoundError):
            return RemoteNotFound("no such file in the repository", path=place, cure="Check the spelling of the path")
        if status == 401 and self.token and not isinstance(error, errors.RepositoryNotFoundError):
            cure = "It is mistyped, expired or revoked: set HF_TOKEN to a valid one, or unset it"
            return AccessDenied("the hub does not know this token", path=place, cure=cure)
        if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
            return AccessDenied("the hub wants a token", path=place, cure=_LOGIN)
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            cure = "Check the spelling" + ("" if self.token else f". If it is private: {_LOGIN}")
            return RemoteNotFound(f"no such repository, or not visible {known}", path=place, cure=cure)
        if status == 403:
            cure = "Use a token that has the right to do this (to write, for a push)" if self.token else _LOGIN
            return AccessDenied(f"not allowed {known}", path=place, cure=cure)
        return NetworkError(f"the hub answered {status}{self._said(error)}", path=place, cure=_REACH)

    def _said(self, error: Any) -> str:
        """What the server said, tokens and addresses taken out."""
        text = " ".join(str(getattr(error, "server_message", None) or "").split())[:200]
        return f": {redacted(text, self.token)}" if text else ""


def passing(error: Exception) -> Passing | None:
    """What an exception of the HTTP stack means: a fault of the moment, or None."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    error = _cause(error)
    if isinstance(error, Passing):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return None
    if isinstance(error, HfHubHTTPError):
        response = error.response
        told = response is not None and response.status_code in PASSING
        return Passing("busy", retry_after(response.headers.get("Retry-After"))) if told else None
    return Passing("lost") if isinstance(error, (httpx.TransportError, ConnectionError)) else None


def redacted(text: str, token: str | None) -> str:
    """Text without tokens and without the queries of addresses, which may be signatures."""
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"hf_[A-Za-z0-9]+|[Bb]earer\s+\S+", "<token>", text)
    return re.sub(r"(https?://[^\s?]*)\?\S+", r"\1?...", text)


def _cause(error: Exception) -> Exception:
    """What huggingface_hub met while it uploaded a file: it wraps that into a `RuntimeError`."""
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if wrapped and isinstance(error.__cause__, Exception) else error


def largest_first(files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """The order in which several connections are done soonest."""
    return sorted(files, key=lambda file: (-file.size, file.path))


def _origin(endpoint: str) -> str:
    """An endpoint without a user's name and password."""
    return re.sub(r"//[^/@]*@", "//", endpoint)


_LOGIN = "Set HF_TOKEN, or run 'hf auth login'"
_REACH = "Check the connection and HF_ENDPOINT, then run the same command again: it goes on where it stopped"
_NOT_A_HUB = "Is HF_ENDPOINT the address of a hub?"

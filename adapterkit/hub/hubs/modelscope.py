"""ModelScope: `modelscope://org/repo[@revision][/path]`, read with the small client package modelscope-hub.

The client's environment variables MODELSCOPE_API_TOKEN and MODELSCOPE_ENDPOINT apply. Each file is verified against the
sha256 that the hub lists. If the hub lists no sha256 for a file, only the file's size is checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from ...errors import AccessDenied, AdapterkitError, NetworkError, RemoteNotFound, Unsupported
from ..remote import RemoteFile, Uri
from ..web import CHUNK, MAX_TOLD, PASSING, Passing, begins_at, range_header
from . import Listing, unknown
from .hf import HuggingFace


class ModelScope(Listing):
    """A model repository on ModelScope."""

    form = "modelscope://org/repo, modelscope://org/repo@revision or modelscope://org/repo@revision/path"

    @classmethod
    def named(cls, rest: str) -> Uri | None:
        uri = HuggingFace.named(rest)
        return uri and replace(uri, scheme="modelscope")

    @cached_property
    def _api(self) -> Any:
        try:
            from modelscope_hub import HubApi
        except ImportError:
            cure = "pip install modelscope-hub"
            raise Unsupported("modelscope:// needs the package modelscope-hub", path=str(self.uri), cure=cure) from None
        api = HubApi(token=self.token) if self.token else HubApi()
        _guard(api.legacy, str(self.uri))
        return api

    def listed(self) -> list[RemoteFile]:
        revision = self.uri.revision or "master"
        entries = self.call(lambda: self._api.list_repo_files(self.uri.repo, "model", revision=revision))
        return [self._file(entry) for entry in entries if entry.type != "tree"]

    def _file(self, entry: Any) -> RemoteFile:
        if isinstance(entry.sha256, str) and re.fullmatch("[0-9a-f]{64}", entry.sha256):
            return RemoteFile(entry.path, entry.size, f"sha256:{entry.sha256}")
        return unknown(entry.path, entry.size, entry.blob_id)

    @contextmanager
    def opened(self, file: RemoteFile, start: int, end: int | None) -> Iterator[tuple[int, Iterator[bytes]]]:
        revision, headers = self.uri.revision or "master", range_header(start, end)
        response = self._api.legacy.download_stream(self.uri.repo, "model", file.path, revision, headers)
        with response:
            yield begins_at(response), response.iter_content(CHUNK)

    def passing(self, error: Exception) -> Passing | None:
        if isinstance(error, Passing):
            return error
        lost = isinstance(error, ConnectionError) or type(error).__name__ in _LOST
        wait = getattr(error, "retry_after", None)
        return Passing("the connection was lost", wait) if lost or _status(error) in PASSING else None

    def failure(self, error: Exception) -> AdapterkitError | None:
        """Return the adapterkit error for an exception of the client.

        The exception's own message is left out, because it may contain signed urls.
        """
        place, status = str(self.uri), _status(error)
        if status in (401, 403):
            return AccessDenied("access is denied", path=place, cure="Set MODELSCOPE_API_TOKEN")
        if status == 404 or type(error).__name__ == "NotExistError":
            return RemoteNotFound(
                "the repository, revision or file does not exist", path=place, cure="Check the spelling"
            )
        return NetworkError(f"the hub cannot be read ({type(error).__name__})", path=place, cure="Try again")


def _guard(client: Any, place: str) -> None:
    """Make a client send the token only to the hub's own origin, and limit the size of all replies except files.

    The client sends the token in the `Authorization` header, and drops this header on redirects to another origin. But
    the client also sends the token in a cookie. By default, a cookie is valid for every port and scheme of a host. So
    after a redirect, the cookie could go to another port, or be sent without encryption.
    """
    home = urlsplit(client._endpoint)

    def bounded(response: Any, **_: object) -> None:
        is_file = response.status_code < 400 and urlsplit(response.url).path.endswith("/repo")
        if not is_file:
            raw, left = response.raw, [MAX_TOLD]
            read1, stream = raw.read1, raw.stream
            raw.read1 = lambda *args, **options: _counted(read1(*args, **options), left, place)
            raw.stream = lambda *args, **options: (_counted(c, left, place) for c in stream(*args, **options))

    client._ensure_session_auth()
    for session in (client._session, client._read_session):
        session.hooks["response"].append(bounded)
        for cookie in session.cookies:
            # For a url without a port, http.cookiejar assumes port 80, even if the scheme is https.
            cookie.port, cookie.port_specified, cookie.secure = str(home.port or 80), True, home.scheme == "https"


def _counted(chunk: bytes, left: list[int], place: str) -> bytes:
    left[0] -= len(chunk)
    if left[0] < 0:
        cure = "Check MODELSCOPE_ENDPOINT. If it is correct, tell the hub's owner"
        raise NetworkError(f"the hub's reply is longer than {MAX_TOLD:,} bytes", path=place, cure=cure)
    return chunk


_LOST = {"ConnectionError", "ConnectTimeout", "ReadTimeout", "ChunkedEncodingError", "NetworkError"}


def _status(error: Exception) -> int | None:
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None

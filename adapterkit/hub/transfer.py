"""One file from a hub into a partial file: continued where it stopped, by whatever process, and verified."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from ..errors import Corrupt, NetworkError, storage_error
from .remote import Remote, RemoteFile, passing
from .retries import ATTEMPTS, PASSING, Passing, pause, retry_after

if TYPE_CHECKING:
    import httpx2

CHUNK = 1 << 20
READ_TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

MAX_HOPS = 5
ANEW = 3
"""How often a file whose bytes came wrong is fetched from its start."""


def fetch(remote: Remote, file: RemoteFile, part: Path, count: Callable[[int], None]) -> None:
    """Fetches a file into `part`, from where `part` ends; when this returns, the file is whole, right and durable.

    Args:
        remote: the repository.
        file: what to fetch.
        part: the partial file; what it holds already is hashed, not fetched again.
        count: told the bytes that are done, and negative numbers where some must be fetched again; raises to stop.

    Raises:
        Corrupt: the bytes do not have the promised digest, however often they are fetched.
        NetworkError: the hub cannot be reached or refuses.
        StorageError: the partial file cannot be written.
    """
    for _ in range(ANEW):
        if _fetched(remote, file, part, count):
            return
        count(-part.stat().st_size)
        part.unlink()
    why = f"its bytes do not have the digest {file.digest} that the hub lists"
    raise Corrupt(why, path=str(remote.uri.at(remote.commit)), where=file.path, cure=_DAMAGED)


def read_range(remote: Remote, file: RemoteFile, start: int, length: int) -> bytes:
    """`length` bytes of a file from byte `start`; a part of a file has no digest to verify it by.

    Raises:
        NetworkError: the hub cannot be reached, refuses, or does not answer with that range.
    """

    def act() -> bytes:
        with stream(remote, file, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            if response.status_code != 206 or _start(response) != start:
                raise Passing("the hub did not send the range that was asked for")
            data = b""
            for chunk in response.iter_raw(CHUNK):
                data += chunk
                if len(data) > length:
                    break
        if len(data) != length:
            raise Passing(f"the hub sent {len(data)} bytes where {length} were asked for")
        return data

    return remote.call(act) if length else b""


def _fetched(remote: Remote, file: RemoteFile, part: Path, count: Callable[[int], None]) -> bool:
    """Fetches what is missing; whether the whole then has its digest."""
    digest = _hasher(file)
    try:
        with open(part, "a+b") as target:
            _replay(target, file, digest, count)
            _rest(remote, file, target, digest, count)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise storage_error(error, part) from error
    return bool(digest.hexdigest() == file.digest.partition(":")[2])


def _hasher(file: RemoteFile) -> Any:
    if file.digest.startswith("sha256:"):
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def _replay(target: Any, file: RemoteFile, digest: Any, count: Callable[[int], None]) -> None:
    """Hashes what an earlier run left; more than the whole file cannot be right and is thrown away."""
    if target.seek(0, os.SEEK_END) > file.size:
        target.truncate(0)
    target.seek(0)
    while chunk := target.read(CHUNK):
        digest.update(chunk)
        count(len(chunk))


def _rest(remote: Remote, file: RemoteFile, target: Any, digest: Any, count: Callable[[int], None]) -> None:
    """Streams the rest. Attempts are counted anew whenever some bytes came: a bad line is slow, not hopeless."""
    done, attempt = target.tell(), 0
    while done < file.size:
        before = done
        try:
            for chunk in _chunks(remote, file, done):
                target.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                count(len(chunk))
            met: Passing | None = Passing("the connection ended early")
        except Exception as error:
            met = passing(error)
            if met is None:
                raise _failed(remote, error) from None
        attempt = 0 if done - before >= CHUNK else attempt + 1
        if done < file.size and (attempt >= ATTEMPTS or not pause(attempt, met.wait if met else None)):
            raise NetworkError(f"gave up: {met}", path=str(remote.uri), where=file.path, cure=_AGAIN)


def _failed(remote: Remote, error: Exception) -> Exception:
    return remote.failure(error) or error


def _chunks(remote: Remote, file: RemoteFile, start: int) -> Iterator[bytes]:
    """The bytes of a file from `start`, never more than it has."""
    with stream(remote, file, {"Range": f"bytes={start}-"} if start else {}) as response:
        begin = _start(response)
        if not 0 <= begin <= start:
            raise Passing("the hub did not send the range that was asked for")
        skip, left = start - begin, file.size - start
        for chunk in response.iter_raw(CHUNK):
            wanted = chunk[skip : skip + left]
            skip = max(0, skip - len(chunk))
            left -= len(wanted)
            if wanted:
                yield wanted
            if left <= 0:
                return


def _start(response: httpx2.Response) -> int:
    """Where the answer's bytes begin; a server that ignores ranges begins at 0."""
    if response.status_code != 206:
        return 0
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else -1


@contextmanager
def stream(remote: Remote, file: RemoteFile, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """An open answer with a file's bytes, redirects followed; the token goes to the hub's own origin alone.

    Raises:
        Passing: the hub is busy.
        NetworkError: it refuses, or sends elsewhere than one may go.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx

    url = hf_hub_url(remote.uri.repo, file.path, revision=remote.commit, endpoint=remote.endpoint)
    home = _origin(url)
    with_token = build_hf_headers(token=remote.token or False)
    bare = {key: value for key, value in with_token.items() if key.lower() != "authorization"}
    timeout = httpx.Timeout(READ_TIMEOUT, connect=10.0)
    for _ in range(MAX_HOPS):
        sent = {**(with_token if _origin(url) == home else bare), **headers, "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=sent, follow_redirects=False, timeout=timeout) as response:
            if response.is_redirect:
                url = _next(remote, url, response.headers.get("Location", ""))
                continue
            if response.status_code in PASSING:
                raise Passing(
                    f"the hub answered {response.status_code}", retry_after(response.headers.get("Retry-After"))
                )
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            yield response
            return
    raise NetworkError("redirected too often", path=str(remote.uri), where=file.path, cure=_ELSEWHERE)


def _next(remote: Remote, url: str, location: str) -> str:
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    if new.scheme not in ("http", "https") or not new.hostname or (old.scheme == "https" and new.scheme != "https"):
        why = f"redirected to {new.scheme or 'nowhere'}://{new.hostname or ''}, which is not safe to follow"
        raise NetworkError(why, path=str(remote.uri), cure=_ELSEWHERE)
    return target


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


_AGAIN = "Run the same command again: it goes on where it stopped"
_DAMAGED = "The hub or something on the way damages it: try another network, or tell the repository's owner"
_ELSEWHERE = "Check HF_ENDPOINT, proxies and the network you are in"

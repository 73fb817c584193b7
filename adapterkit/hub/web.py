"""HTTP for all hubs: safe redirects, secrets for one origin only, bounded bodies, and typed faults."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from ..errors import NetworkError, public
from .retries import PASSING, Passing, retry_after

if TYPE_CHECKING:
    import httpx2

CHUNK = 1 << 20
READ_TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

MAX_HOPS = 5
MAX_SAID = 64 << 10
"""Bytes that are read of an error's body: hubs explain a refusal in a few hundred bytes."""

MAX_TOLD = 64 << 20
"""Bytes of any other document of a hub (a manifest, a list of files, a token).

The largest that is legitimate is one page of a repository's files, 1,000 entries of about 1 KB; S3's pages are alike.
"""


class Refused(Exception):
    """An answer that is a refusal: its status, and where the hub gives any, its own word and words for it."""

    def __init__(self, status: int, code: str = "", said: str = "") -> None:
        super().__init__(f"{status} {code}".rstrip())
        self.status, self.code, self.said = status, code, said


@contextmanager
def answered(
    method: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str], place: str,
    content: bytes | None = None,
) -> Iterator[httpx2.Response]:  # fmt: skip
    """An open answer; its body is not read yet.

    Args:
        method: of the request.
        url: of the request.
        headers: sent wherever the request goes.
        secret: headers that are sent to the url's own origin only, and not after a redirect has left it.
        place: what errors name.
        content: the body.

    Raises:
        Passing: the hub is busy.
        NetworkError: it sends elsewhere than one may go.
    """
    from huggingface_hub.utils import get_session, httpx

    home, at_home, timeout = origin(url), True, httpx.Timeout(READ_TIMEOUT, connect=10.0)
    for _ in range(MAX_HOPS):
        # A request that has left its origin gets no secret again: another server may have chosen the way back.
        at_home = at_home and origin(url) == home
        sent = {**headers, **(secret if at_home else {}), "Accept-Encoding": "identity"}
        with get_session().stream(
            method, url, headers=sent, content=content, follow_redirects=False, timeout=timeout
        ) as response:
            if response.is_redirect:
                url = _next(place, url, response.headers.get("Location", ""))
                continue
            if response.status_code in PASSING:
                wait = retry_after(response.headers.get("Retry-After"))
                raise Passing(f"the hub answered {response.status_code}", wait)
            yield response
            return
    raise NetworkError("redirected too often", path=place, cure=_ELSEWHERE)


def body_of(response: httpx2.Response, place: str, limit: int | None = None) -> bytes:
    """Read the whole body of an open response, up to `limit` bytes (`MAX_TOLD` if absent).

    All code that keeps a body in memory calls this: a server may send without end, and `Response.read` has no limit.
    The bytes are those on the wire, because `answered` asks for no compression: a body cannot grow when it is decoded.

    Raises:
        NetworkError: the body is longer than `limit`.
    """
    body, limit = bytearray(), MAX_TOLD if limit is None else limit
    for chunk in response.iter_raw(CHUNK):
        body += chunk
        if len(body) > limit:
            cure = "Check the address of the hub, and tell its owner"
            raise NetworkError(f"the hub's reply is longer than {limit:,} bytes", path=place, cure=cure)
    return bytes(body)


def said_in(response: httpx2.Response) -> bytes:
    """The beginning of an error's body, at most `MAX_SAID` bytes; the rest is not read."""
    body = bytearray()
    for chunk in response.iter_raw(MAX_SAID):
        body += chunk
        if len(body) >= MAX_SAID:
            break
    return bytes(body[:MAX_SAID])


@contextmanager
def guarded(endpoint: str, place: str) -> Iterator[None]:
    """Watch the requests that huggingface_hub makes inside the block.

    Pushes use huggingface_hub's own functions. They read replies of any length, and send the token to whatever address
    the reply to a request for an upload names, also where another server answered after a redirect. Its client is
    shared by the whole process, so downloads (`GET` outside of `/api/`) are left alone.
    """
    from huggingface_hub.utils import get_session, httpx

    home = origin(endpoint)

    class Bounded(httpx.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            length = 0
            for chunk in self.stream:
                length += len(chunk)
                if length > MAX_TOLD:
                    cure = "Check HF_ENDPOINT, and tell the hub's owner"
                    raise NetworkError(f"the hub's reply is longer than {MAX_TOLD:,} bytes", path=place, cure=cure)
                yield chunk

        def close(self) -> None:
            self.stream.close()

    def keep_token(request: httpx2.Request) -> None:
        if origin(str(request.url)) != home:
            request.headers.pop("authorization", None)

    def bound(response: httpx2.Response) -> None:
        request = response.request
        if request.method != "GET" or "/api/" in request.url.path:
            response.stream = Bounded(response.stream)  # type: ignore[arg-type]

    client = get_session()
    # New lists instead of `append`: another thread may be walking through the old ones.
    with _HOOKS:
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], keep_token], "response": [*hooks["response"], bound]
        }  # fmt: skip
    try:
        yield
    finally:
        with _HOOKS:
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [hook for hook in hooks["request"] if hook is not keep_token],
                "response": [hook for hook in hooks["response"] if hook is not bound],
            }


def begins_at(response: httpx2.Response) -> int:
    """Where the answer's bytes begin; a server that ignores ranges begins at 0."""
    if response.status_code != 206:
        return 0
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else -1


def range_header(start: int, end: int | None) -> dict[str, str]:
    """The header that asks for bytes from `start` to before `end`."""
    if not start and end is None:
        return {}
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"}


def is_transport(error: Exception) -> bool:
    """Whether an exception is a fault of the connection, and not the word of who wants none."""
    from huggingface_hub.utils import httpx

    return isinstance(error, (httpx.TransportError, ConnectionError)) and not is_offline(error)


def is_offline(error: Exception) -> bool:
    """Whether a request was not made because offline mode is on."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def offline(place: str) -> NetworkError:
    """The words for what offline mode forbids."""
    return NetworkError("offline mode is on", path=place, cure="Unset HF_HUB_OFFLINE, or name a local path")


def redacted(text: str, token: str | None) -> str:
    """Text of a server without the token that it was sent, and without secrets of addresses."""
    if token:
        text = text.replace(token, "<token>")
    return public(re.sub(r"hf_[A-Za-z0-9]+|([Bb]earer|[Bb]asic)\s+\S+", "<token>", text))


def origin(url: str) -> tuple[str, str | None, int | None]:
    """What must be the same for two addresses to be one's own."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _next(place: str, url: str, location: str) -> str:
    target = urljoin(url, location)
    old, new = urlsplit(url), urlsplit(target)
    if new.scheme not in ("http", "https") or not new.hostname or (old.scheme == "https" and new.scheme != "https"):
        why = f"redirected to {new.scheme or 'nowhere'}://{new.hostname or ''}, which is not safe to follow"
        raise NetworkError(why, path=place, cure=_ELSEWHERE)
    return target


_HOOKS = threading.Lock()
_ELSEWHERE = "Check the hub's address, proxies and the network you are in"

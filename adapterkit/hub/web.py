"""HTTP, for every hub that speaks it: redirects followed with care, secrets sent to one origin alone, faults told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from ..errors import NetworkError
from .retries import PASSING, Passing, retry_after

if TYPE_CHECKING:
    import httpx2

CHUNK = 1 << 20
READ_TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as lost."""

MAX_HOPS = 5


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
        secret: headers that are sent to the url's own origin alone.
        place: what errors name.
        content: the body.

    Raises:
        Passing: the hub is busy.
        NetworkError: it sends elsewhere than one may go.
    """
    from huggingface_hub.utils import get_session, httpx

    home, timeout = origin(url), httpx.Timeout(READ_TIMEOUT, connect=10.0)
    for _ in range(MAX_HOPS):
        sent = {**headers, **(secret if origin(url) == home else {}), "Accept-Encoding": "identity"}
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
    """Text without tokens and without the queries of addresses, which may be signatures."""
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"hf_[A-Za-z0-9]+|([Bb]earer|[Bb]asic)\s+\S+", "<token>", text)
    return re.sub(r"(https?://[^\s?]*)\?\S+", r"\1?...", text)


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


_ELSEWHERE = "Check the hub's address, proxies and the network you are in"

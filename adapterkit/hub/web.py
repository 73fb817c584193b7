"""The HTTP client for all hubs. It checks redirects, sends secrets to one origin only, and limits reply sizes."""

from __future__ import annotations

import base64
import ipaddress
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

from ..errors import NetworkError, public
from ..io.inputs import decimal_number
from ..io.strict_json import load_json

if TYPE_CHECKING:
    import httpx2

    from ..io.strict_json import JsonValue

# Retry requests that fail for a temporary reason.


T = TypeVar("T")

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""The wait before the second attempt, in seconds. It doubles for each further attempt."""

LONGEST_WAIT = 300.0
"""The longest wait that a hub may ask for, in seconds. If the hub asks for more, the request fails at once."""

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that are worth a retry."""


class Passing(Exception):
    """A temporary failure.

    Attributes:
        wait: the seconds to wait before a retry, as requested by the hub; None if the reply does not give a time.
    """

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


def retrying(act: Callable[[], T], passing_of: Callable[[Exception], Passing | None]) -> T:
    """Call `act` and return its result. After a temporary failure, call `act` again; at most `ATTEMPTS` calls in all.

    Args:
        act: a function that makes the request; calling it twice must be harmless.
        passing_of: a function that gets an exception. It returns a `Passing` if the failure is temporary, and None if
            a retry is useless.

    Raises:
        Exception: the error of the last attempt.
    """
    for attempt in range(ATTEMPTS):
        try:
            return act()
        except Exception as error:
            passing = passing_of(error)
            if passing is None or attempt + 1 == ATTEMPTS or not pause(attempt, passing.wait):
                raise
    raise AssertionError("the last attempt must return or raise")


def pause(attempt: int, asked: float | None) -> bool:
    """Wait before the next attempt and return True. If `asked` is more than `LONGEST_WAIT`, return False at once."""
    if asked is not None and asked > LONGEST_WAIT:
        return False
    # Add a random delay, so that parallel connections do not retry at the same time.
    wait = FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
    time.sleep(max(wait, asked or 0.0))
    return True


def retry_after(value: str | None) -> float | None:
    """Convert a `Retry-After` header (seconds or a date) to seconds from now; None if it is absent or invalid."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


# Requests, redirects and replies.


CHUNK = 1 << 20
READ_TIMEOUT = 30.0
"""A connection counts as lost after this many seconds without data."""

MAX_HOPS = 5
MAX_ERROR_BODY = 64 << 10
"""At most this many bytes of an error response's body are read. Hubs explain errors in a few hundred bytes."""

MAX_TOLD = 64 << 20
"""The largest document that is read from a hub, in bytes. A document is, for example, one page of a file list.

Error responses and token responses have lower limits: `MAX_ERROR_BODY` and `MAX_ANSWER`. The files of a repository have
no limit. In practice, the largest documents are pages of file lists, which have 1,000 entries of about 1 KB. The pages
of S3 have a similar size.
"""


class Refused(Exception):
    """The hub refused a request.

    Attributes:
        status: the HTTP status.
        code: the hub's error code; empty if the reply has none.
        message: the hub's error message; empty if the reply has none.
    """

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(f"{status} {code}".rstrip())
        self.status, self.code, self.message = status, code, message


@contextmanager
def answered(
    method: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str], place: str,
    content: bytes | None = None,
) -> Iterator[httpx2.Response]:  # fmt: skip
    """Send a request, follow safe redirects, and yield the open response. Its body has not been read.

    Args:
        method: the HTTP method.
        url: the url.
        headers: headers that are sent to every server, including after redirects.
        secret: headers that are sent only to the url's own origin. After a redirect to another origin, they are not
            sent any more.
        place: the uri to show in error messages.
        content: the request body.

    Raises:
        Passing: the hub answered with a status in `PASSING`.
        NetworkError: a redirect is unsafe, or there are `MAX_HOPS` redirects.
    """
    from huggingface_hub.utils import get_session, httpx

    home, at_home, timeout = origin(url), True, httpx.Timeout(READ_TIMEOUT, connect=10.0)
    for _ in range(MAX_HOPS):
        # After a redirect to another origin, send no more secrets, even if a later redirect leads back to the first
        # origin. The other server chose the url of that later redirect.
        at_home = at_home and origin(url) == home
        # Request uncompressed replies, so that ranges and digests refer to the stored bytes. Also, a small compressed
        # reply could otherwise expand to a huge one.
        sent = {**headers, **(secret if at_home else {}), "Accept-Encoding": "identity"}
        # Follow redirects here, one by one, so that each redirect is checked and only the first origin gets the
        # secrets.
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
    raise NetworkError("the hub redirected too often", path=place, cure=_ELSEWHERE)


def body_of(response: httpx2.Response, place: str, limit: int | None = None) -> bytes:
    """Read the whole body of an open response, up to `limit` bytes (None: `MAX_TOLD`).

    Code that keeps a whole body in memory must use this function, because a server may send bytes forever, and
    `Response.read` has no limit. The body is not decompressed, because `answered` requests uncompressed replies.

    Raises:
        NetworkError: the body is longer than `limit`.
    """
    body, limit = bytearray(), MAX_TOLD if limit is None else limit
    for chunk in response.iter_raw(CHUNK):
        body += chunk
        if len(body) > limit:
            cure = "Check the address of the hub, and tell the hub's owner"
            raise NetworkError(f"the hub's reply is longer than {limit:,} bytes", path=place, cure=cure)
    return bytes(body)


def error_body_of(response: httpx2.Response) -> bytes:
    """Return the first `MAX_ERROR_BODY` bytes of an error response's body, or the whole body if it is shorter."""
    body = bytearray()
    for chunk in response.iter_raw(MAX_ERROR_BODY):
        body += chunk
        if len(body) >= MAX_ERROR_BODY:
            break
    return bytes(body[:MAX_ERROR_BODY])


@contextmanager
def guarded(endpoint: str, place: str) -> Iterator[None]:
    """Make huggingface_hub's requests inside the block safe: limit the size of replies, and protect the token.

    Pushes call huggingface_hub's functions, which have two weaknesses. They read replies of any length. They send the
    token to any upload url in a reply, even if the reply came from another server after a redirect.

    Both protections are hooks in huggingface_hub's HTTP client, which the whole process shares. Other threads may use
    the client to download large files, so replies to `GET` requests outside of `/api/` are not limited.
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
    # Assign new lists of hooks instead of appending: another thread may be iterating over the old lists.
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
    """Return the offset of a response's first byte in the file: 0 if the server ignored the range, -1 if unknown."""
    if response.status_code != 206:
        return 0
    first = decimal_number(response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0])
    # If the header is invalid, return -1, which is not a valid offset, so that callers refuse the response.
    return -1 if first is None else first


def range_header(start: int, end: int | None) -> dict[str, str]:
    """Return the header that requests bytes from `start` up to but not including `end` (None: the end of the file)."""
    if not start and end is None:
        return {}
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"}


def is_transport(error: Exception) -> bool:
    """Whether an exception is a failure of the connection. False if offline mode prevented the request."""
    from huggingface_hub.utils import httpx

    return isinstance(error, (httpx.TransportError, ConnectionError)) and not is_offline(error)


def is_offline(error: Exception) -> bool:
    """Whether an exception means that offline mode prevented a request."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(error, OfflineModeIsEnabled)


def offline(place: str) -> NetworkError:
    """Return the error for a request that offline mode prevented."""
    return NetworkError("offline mode is on", path=place, cure="Unset HF_HUB_OFFLINE, or pass a local path")


def redacted(text: str, token: str | None) -> str:
    """Return a server's text without tokens and without secrets in urls. `token` is the token that was sent, if any."""
    if token:
        text = text.replace(token, "<token>")
    # Also remove any text that looks like a token, because the message may quote a header of the request.
    return public(re.sub(r"hf_[A-Za-z0-9]+|([Bb]earer|[Bb]asic)\s+\S+", "<token>", text))


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return the scheme, host and port of a url. Two urls may get the same secrets only if all three are equal."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _next(place: str, url: str, location: str) -> str:
    try:
        target = urljoin(url, location)
        old, new = urlsplit(url), urlsplit(target)
        # `origin` raises ValueError for a bad port, and httpx raises UnicodeError for a host name that IDNA cannot
        # encode.
        origin(target)
        (new.hostname or "").encode("idna")
    except ValueError:
        raise NetworkError("the hub redirected to an invalid url", path=place, cure=_ELSEWHERE) from None
    if new.scheme not in ("http", "https") or not new.hostname or (old.scheme == "https" and new.scheme != "https"):
        why = f"the hub redirected to {new.scheme or 'nowhere'}://{new.hostname or ''}, which is not safe to follow"
        raise NetworkError(why, path=place, cure=_ELSEWHERE)
    return target


_HOOKS = threading.Lock()
_ELSEWHERE = "Check the hub's address, your proxy settings and your network"


# Log in to registries: find the credentials that `docker login` or `oras login` stored, and exchange them for a token.
#
# Source: https://distribution.github.io/distribution/spec/auth/token/. Credential helper programs are never run,
# because a config file must not be able to start a process.


MAX_ANSWER = 1 << 20
"""The largest reply to a token request, in bytes. Even tokens with many scopes take only about 10 KB."""

DOCKER_HUB = {"docker.io", "index.docker.io", "registry-1.docker.io"}
"""The host names of Docker Hub. Uris, stored credentials and requests do not all use the same name."""


def is_near(host: str) -> bool:
    """Whether a host is this machine. For a registry on this machine, adapterkit uses plain HTTP, as other tools do."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class Admission:
    """The authentication headers for one registry.

    Args:
        host: the registry's `HOST` or `HOST:PORT`.
        url: the url of the repository.
        place: the uri to show in error messages.
        token: `user:password` or a bearer token. If None, the credentials that other tools have stored are used.
    """

    def __init__(self, host: str, url: str, place: str, token: str | None) -> None:
        self.host, self.url, self.place, self.token = host, url, place, token
        self.headers: dict[str, str] = {}

    @property
    def known(self) -> bool:
        """Whether any credentials are available."""
        return bool(self._credentials)

    @cached_property
    def _credentials(self) -> str:
        """The value of an `Authorization` header; empty if no credentials are known."""
        if self.token is None:
            return next(_left(self.host), "")
        return _basic(self.token) if ":" in self.token else f"Bearer {self.token}"

    def ask(self, challenge: str) -> bool:
        """Set the headers that a `WWW-Authenticate` challenge asks for.

        Returns:
            Whether the headers changed. If so, the caller sends the request again.
        """
        kind, _, rest = challenge.partition(" ")
        parameters = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        before = dict(self.headers)
        if kind.lower() == "bearer" and "realm" in parameters and not self._credentials.startswith("Bearer"):
            self.headers = {"Authorization": f"Bearer {self._token(parameters)}"}
        elif self._credentials:
            self.headers = {"Authorization": self._credentials}
        return self.headers != before

    def _token(self, challenge: Mapping[str, str]) -> str:
        realm = urlsplit(challenge["realm"])
        # The password is sent to the realm's url. Allow plain HTTP only if registry and realm are on this machine.
        if realm.scheme != "https" and not (realm.scheme == "http" and is_near(self.host) and is_near(realm.netloc)):
            server = f"{realm.scheme or 'nowhere'}://{realm.hostname or ''}"
            why = f"the registry's token server, {server}, does not use https"
            raise NetworkError(why, path=self.place, cure="Check the name of the registry")
        asked = urlencode({key: challenge[key] for key in ("service", "scope") if key in challenge})
        url = challenge["realm"] + ("&" if realm.query else "?") + asked
        secret = {"Authorization": self._credentials} if self._credentials else {}
        with answered("GET", url, {}, secret, self.place) as response:
            if response.status_code >= 400:
                raise Refused(401 if response.status_code < 500 else response.status_code)
            return _token_in(body_of(response, self.place, MAX_ANSWER), self.place)


def _token_in(body: bytes, place: str) -> str:
    try:
        answer = load_json(body.decode())
        token = answer.get("token") or answer["access_token"]
        if isinstance(token, str) and re.fullmatch(r"[\x21-\x7e]+", token):
            return token
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    cure = "Check that the host is an OCI registry"
    raise NetworkError("the reply of the registry's token server has no token", path=place, cure=cure)


def _left(host: str) -> Iterator[str]:
    """Yield the credentials that other tools have stored for a registry, each as an `Authorization` header's value."""
    hosts = DOCKER_HUB if host in DOCKER_HUB else {host}
    for file in _files():
        entries = _read(file).get("auths")
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            bare = re.sub(r"^https?://", "", str(name)).partition("/")[0]
            if bare in hosts and isinstance(entry, dict):
                if isinstance(entry.get("auth"), str) and entry["auth"]:
                    yield f"Basic {entry['auth']}"
                elif isinstance(entry.get("username"), str) and isinstance(entry.get("password"), str):
                    yield _basic(f"{entry['username']}:{entry['password']}")


def _files() -> Iterator[Path]:
    if os.environ.get("REGISTRY_AUTH_FILE"):
        yield Path(os.environ["REGISTRY_AUTH_FILE"])
    yield Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    if os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(os.environ["XDG_RUNTIME_DIR"]) / "containers" / "auth.json"


def _read(file: Path) -> dict[str, JsonValue]:
    try:
        saved = load_json(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"

"""Refuse requests from other sites in the same browser, and from other users of the machine.

Any web page can send requests to 127.0.0.1, and the domain name of a web page can point to 127.0.0.1. So three things
are checked. A request must have the token, which only the terminal shows. Its Host header must be the address of this
server. A request that changes something must come from this page.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "adapterkit"

LARGEST = 64 * 1024
"""The largest body of a request, in bytes."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)
"""The content security policy for a report, which is a file with a script. The sandbox denies the script cookies and
network access."""

HEADERS = {
    "cache-control": "no-store", "cross-origin-opener-policy": "same-origin", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin", "x-content-type-options": "nosniff",
}  # fmt: skip


class Guard:
    """An ASGI application that passes only the requests of this page to another application.

    Args:
        inner: the other application.
        token: the token in the address that the terminal shows.
        port: the port of the server.
    """

    def __init__(self, inner: Application, token: str, port: int) -> None:
        self.inner, self.token = inner, token
        # Put the port into the cookie's name, because a browser sends a cookie to all ports of a host.
        self.cookie = f"{COOKIE}-{port}"
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        refused = "this kind of request is not supported" if scope["type"] != "http" else self._refused(scope)
        if refused is not None:
            await _answer(send, 403, refused)
            return
        body = await _body(receive)
        if body is None:
            await _answer(send, 413, f"the request is larger than {LARGEST} bytes")
            return
        sent = False

        async def replay() -> MutableMapping[str, Any]:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                given = {**HEADERS, "content-security-policy": POLICY}
                extra = [(k.encode(), v.encode()) for k, v in given.items() if k.encode() not in known]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.inner(scope, replay, with_headers)

    def _refused(self, scope: Scope) -> str | None:
        """Return the reason to refuse a request, or None if the request comes from this page."""
        pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        headers = dict(pairs)
        if [name for name, _ in pairs].count("host") != 1 or headers["host"] not in self.hosts:
            return "this page has another address"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers['host']}":
            return "the request comes from another page"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "the request comes from another page"
        kind = headers.get("content-type", "").partition(";")[0].strip()
        if scope["method"] not in ("GET", "HEAD") and (origin is None or kind != "application/json"):
            return "no page of this program makes such a request"
        if scope["path"] == "/open":  # This path receives the token and sets the cookie.
            return None
        told = headers.get("authorization", "").removeprefix("Bearer ")
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        if not any(self.is_token(each) for each in (told, cookies.get(self.cookie, ""))):
            return "open the address that the terminal shows: it contains the key to this page"
        return None

    def is_token(self, text: str) -> bool:
        """Whether a text is the token. The time does not depend on the number of right characters."""
        return hmac.compare_digest(text.encode(), self.token.encode())


async def _body(receive: Receive) -> bytes | None:
    data = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return data
        data += bytes(message.get("body", b""))
        if len(data) > LARGEST:
            return None
        if not message.get("more_body", False):
            return data


async def _answer(send: Send, status: int, why: str) -> None:
    text = f"adapterkit: {why}\n".encode()
    headers = {**HEADERS, "content-type": "text/plain; charset=utf-8", "content-length": str(len(text))}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": text})

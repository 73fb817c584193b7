"""Serve a local web page with a form for each command. Submitting a form starts a job that runs the command.

`forms` describes commands as data and builds command lines, `jobs` runs command lines, and this module serves the page.
A job runs its command line in a separate process, as a terminal does. So the job writes the same bytes as the command
in a terminal. The server can be reached only from this machine.

Any website can send requests to 127.0.0.1, and can let its domain name point to 127.0.0.1. Other users of the machine
can send requests too. To refuse all these requests, the server makes three checks:

* A request must contain the token, which only the terminal shows.
* The Host header of a request must be the address of this server.
* A request that changes something must come from this page.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterkitError, Unsupported, UsageError, storage_error
from .forms import Forms
from .jobs import Jobs

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "adapterkit"

LARGEST = 64 * 1024
"""The maximum size of a request's body, in bytes."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
REPORT_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'; sandbox allow-scripts"
)
"""The content security policy for a report, which is an HTML file with a script. The policy denies the script access
to cookies and to the network."""

HEADERS = {
    "cache-control": "no-store", "cross-origin-opener-policy": "same-origin", "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin", "x-content-type-options": "nosniff",
}  # fmt: skip


class Guard:
    """An ASGI application that passes a request to another application only if the request comes from this page.

    Args:
        inner: the application that answers the requests from this page.
        token: the token in the address that the terminal shows.
        port: the port of the server.
    """

    def __init__(self, inner: Application, token: str, port: int) -> None:
        self.inner, self.token = inner, token
        # A browser sends a cookie to all ports of a host. The port in the cookie's name keeps two pages' cookies apart.
        self.cookie = f"{COOKIE}-{port}"
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass the request to the application `inner`."""
        if scope["type"] == "lifespan":
            await self.inner(scope, receive, send)
            return
        refused = "the page supports only HTTP requests" if scope["type"] != "http" else self._refused(scope)
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
            return "the Host header is not this page's address; open the address that the terminal shows"
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{headers['host']}":
            return "the request comes from another page"
        if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "the request comes from another page"
        kind = headers.get("content-type", "").partition(";")[0].strip()
        if scope["method"] not in ("GET", "HEAD") and (origin is None or kind != "application/json"):
            return "a request that changes something must come from this page and must be JSON"
        if scope["path"] == "/open":  # `enter` checks the token in the address and sets the cookie.
            return None
        token = headers.get("authorization", "").removeprefix("Bearer ")
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        if not any(self.is_token(each) for each in (token, cookies.get(self.cookie, ""))):
            return "open the address that the terminal shows: it contains the key to this page"
        return None

    def is_token(self, text: str) -> bool:
        """Whether a text is the token. The duration of the comparison does not show how many characters match."""
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


HERE = Path(__file__).parent
FILES = {"/page.js": "text/javascript", "/page.css": "text/css"}


def application(forms: Forms, jobs: Jobs, token: str, port: int) -> Application:
    """Return the ASGI application that serves the page.

    Args:
        forms: the forms of the commands.
        jobs: the jobs that the page has started.
        token: the token that a browser needs to open the page.
        port: the port of the server.

    Raises:
        Unsupported: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise missing(error) from error

    async def home(_: Request) -> Response:
        return FileResponse(HERE / "page.html", media_type="text/html")

    async def file(request: Request) -> Response:
        return FileResponse(HERE / request.url.path[1:], media_type=FILES[request.url.path])

    async def enter(request: Request) -> Response:
        if not guard.is_token(request.query_params.get("token", "")):
            return PlainTextResponse("adapterkit: this is not the address that the terminal shows\n", 403)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(guard.cookie, token, httponly=True, samesite="strict", path="/")
        return answer

    def answered(work: Callable[[], object]) -> Response:
        try:
            return JSONResponse(work())
        except AdapterkitError as error:
            return JSONResponse({"error": error.record()}, 400)

    async def start_page(_: Request) -> Response:
        return JSONResponse({"forms": forms.record(), "roots": [str(root) for root in forms.roots]})

    async def list_folder(request: Request) -> Response:
        return await run_in_threadpool(answered, lambda: forms.listing(request.query_params.get("path")))

    async def list_jobs(_: Request) -> Response:
        return JSONResponse({"jobs": [{**job, "out": ""} for job in jobs.records()]})

    async def one_job(request: Request) -> Response:
        return answered(lambda: jobs.job(request.path_params["number"]).record())

    async def start_job(request: Request) -> Response:
        try:
            given = json.loads(await request.body())
            command, values = given["command"], given["values"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": {"why": "the request has no form values", "cure": "Reload the page"}}, 400)
        return await run_in_threadpool(answered, lambda: jobs.start(forms.words(command, values)).record())

    measuring = threading.Lock()

    def sums(given: object) -> Mapping[str, object]:
        if not isinstance(given, dict) or not isinstance(given.get("adapters"), list):
            raise UsageError("the request has no list of adapters", cure=f"Choose 2 to {MOST} adapters")
        named = [str(forms.inside(str(each))) for each in given["adapters"]]
        if not 2 <= len(named) <= MOST:
            raise UsageError(f"{len(named)} adapters are given", where="A...", cure=f"Choose 2 to {MOST} adapters")
        base = given.get("base")
        with measuring:
            return products(named, None if not base else str(forms.inside(str(base))))

    async def ask_sums(request: Request) -> Response:
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError):
            given = None
        return await run_in_threadpool(answered, lambda: sums(given))

    async def end_job(request: Request) -> Response:
        number = request.path_params["number"]

        def work() -> object:
            jobs.end(number)
            return jobs.job(number).record()

        return answered(work)

    async def again(request: Request) -> Response:
        return answered(lambda: jobs.start(jobs.job(request.path_params["number"]).words).record())

    async def report(request: Request) -> Response:
        try:
            place = jobs.job(request.path_params["number"]).page
        except UsageError:
            place = None
        if place is None or not place.is_file():
            return PlainTextResponse("no report\n", 404)
        policy = {"content-security-policy": REPORT_POLICY}
        return FileResponse(place, media_type="text/html; charset=utf-8", headers=policy)

    number = "/api/jobs/{number:int}"
    routes = [
        Route("/", home), Route("/open", enter), *(Route(path, file) for path in FILES),
        Route("/api/start", start_page), Route("/api/files", list_folder),
        Route("/api/sums", ask_sums, methods=["POST"]), Route("/api/jobs", list_jobs),
        Route("/api/jobs", start_job, methods=["POST"]), Route(number, one_job),
        Route(f"{number}/end", end_job, methods=["POST"]), Route(f"{number}/again", again, methods=["POST"]),
        Route(f"{number}/report", report),
    ]  # fmt: skip
    guard = Guard(Starlette(routes=routes), token, port)
    return guard


MOST = 8
"""The maximum number of adapters for which the page measures a weighted sum."""


def products(adapters: Sequence[str], base: str | None) -> dict[str, JsonValue]:
    """Return the inner products of the adapters' changes: for each target, a table with a row and column per adapter.

    From these products, the page computes the norm of any weighted sum of the changes.

    Args:
        adapters: two or more adapters.
        base: the base of the adapters; None if their changes can be measured without a base.
    """
    from ..api import report

    measured: dict[str, Any] = report(list(adapters), base=base).record()
    count = len(adapters)
    products_by_target: dict[str, list[list[float]]] = {}
    for effect in measured["effects"]:
        table = products_by_target.setdefault(effect["target"], [[0.0] * count for _ in range(count)])
        table[effect["adapter"]][effect["adapter"]] = (effect["norm"] or 0.0) ** 2
    for pair in measured["relations"]:
        table = products_by_target[pair["target"]]
        first, second = pair["first"], pair["second"]
        table[first][second] = table[second][first] = pair["product"] or 0.0
    names = [each["name"] for each in measured["facts"]]
    return {
        "adapters": names,
        "targets": [{"target": name, "products": table} for name, table in products_by_target.items()],
    }


def missing(error: ImportError) -> Unsupported:
    """Return the error for a package that the page needs and that is not installed."""
    return Unsupported(f"the page needs {error.name}, which is not installed", cure="pip install 'adapterkit[ui]'")


def serve(
    group: click.Group,
    paths: Collection[str],
    roots: Sequence[Path],
    port: int,
    started: Callable[[str], None],
    *,
    hubs: bool = False,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        group: the commands.
        paths: the names of the commands' parameters that take paths.
        roots: the folders in which jobs may read and write.
        hubs: whether adapters and bases may also be addresses on hubs.
        port: the port on 127.0.0.1; 0 for a free port.
        started: a function that is called with the page's address when the server is ready.

    Raises:
        Unsupported: starlette or uvicorn is not installed.
        UsageError: a root is not a folder.
        StorageError: the port is already in use.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing(error) from error
    for root in roots:
        if not root.is_dir():
            raise UsageError("the path is not a folder", path=root, cure="Pass only folders that exist")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise storage_error(error, f"port {port}") from error
    with closing(listener), tempfile.TemporaryDirectory(prefix="adapterkit-ui-") as temporary:
        number, token = listener.getsockname()[1], secrets.token_urlsafe(32)
        jobs = Jobs(Path.cwd(), Path(temporary))
        page = application(Forms(group, paths, roots, hubs=hubs), jobs, token, number)
        config = uvicorn.Config(
            page, log_level="critical", access_log=False, lifespan="off", server_header=False, ws="none",
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        server = _Server(config, lambda: started(f"http://127.0.0.1:{number}/open?token={token}"))
        try:
            server.run(sockets=[listener])
        finally:
            jobs.close()


def _Server(config: Any, started: Callable[[], None]) -> Any:  # noqa: N802 - called like a class
    """Return a server that calls `started` when it is ready."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            started()

    return Server(config)

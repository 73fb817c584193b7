"""Serve the page and answer its requests. The server can be reached only from this machine."""

from __future__ import annotations

import json
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import AdapterkitError, Unsupported, UsageError, storage_error
from .forms import Forms
from .guard import REPORT_POLICY, Application, Guard
from .jobs import Jobs

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue

HERE = Path(__file__).parent
FILES = {"/page.js": "text/javascript", "/page.css": "text/css"}


def application(forms: Forms, jobs: Jobs, token: str, port: int) -> Application:
    """Return the ASGI application of the page.

    Args:
        forms: the forms of the commands.
        jobs: the jobs, which run the commands.
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

    def told(work: Callable[[], object]) -> Response:
        try:
            return JSONResponse(work())
        except AdapterkitError as error:
            return JSONResponse({"error": error.record()}, 400)

    async def start_page(_: Request) -> Response:
        return JSONResponse({"forms": forms.record(), "roots": [str(root) for root in forms.roots]})

    async def list_folder(request: Request) -> Response:
        return await run_in_threadpool(told, lambda: forms.listing(request.query_params.get("path")))

    async def list_jobs(_: Request) -> Response:
        return JSONResponse({"jobs": [{**job, "out": ""} for job in jobs.records()]})

    async def one_job(request: Request) -> Response:
        return told(lambda: jobs.job(request.path_params["number"]).record())

    async def start_job(request: Request) -> Response:
        try:
            given = json.loads(await request.body())
            command, values = given["command"], given["values"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return JSONResponse({"error": {"why": "the request is not a form", "cure": "Reload the page"}}, 400)
        return await run_in_threadpool(told, lambda: jobs.start(forms.words(command, values)).record())

    measuring = threading.Lock()

    def sums(given: object) -> Mapping[str, object]:
        if not isinstance(given, dict) or not isinstance(given.get("adapters"), list):
            raise UsageError("the value must be a list of adapters", cure="Fill in the form")
        named = [str(forms.inside(str(each))) for each in given["adapters"]]
        if not 2 <= len(named) <= MOST:
            raise UsageError(f"{len(named)} adapters are given", where="A...", cure=f"Name 2 to {MOST} adapters")
        base = given.get("base")
        with measuring:
            return products(named, None if not base else str(forms.inside(str(base))))

    async def ask_sums(request: Request) -> Response:
        try:
            given = json.loads(await request.body())
        except (ValueError, RecursionError):
            given = None
        return await run_in_threadpool(told, lambda: sums(given))

    async def end_job(request: Request) -> Response:
        number = request.path_params["number"]

        def work() -> object:
            jobs.end(number)
            return jobs.job(number).record()

        return told(work)

    async def again(request: Request) -> Response:
        return told(lambda: jobs.start(jobs.job(request.path_params["number"]).words).record())

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
"""The most adapters whose sum can be measured."""


def products(adapters: Sequence[str], base: str | None) -> dict[str, JsonValue]:
    """Return the inner products of the adapters' changes at each target, from which the page computes norms of sums.

    Args:
        adapters: two or more adapters.
        base: the base of the adapters, if measuring them needs one.
    """
    from ..api import report

    measured: dict[str, Any] = report(list(adapters), base=base).record()
    count = len(adapters)
    found: dict[str, list[list[float]]] = {}
    for effect in measured["effects"]:
        table = found.setdefault(effect["target"], [[0.0] * count for _ in range(count)])
        table[effect["adapter"]][effect["adapter"]] = (effect["norm"] or 0.0) ** 2
    for pair in measured["relations"]:
        table = found[pair["target"]]
        first, second = pair["first"], pair["second"]
        table[first][second] = table[second][first] = pair["product"] or 0.0
    names = [each["name"] for each in measured["facts"]]
    return {"adapters": names, "targets": [{"target": name, "products": table} for name, table in found.items()]}


def missing(error: ImportError) -> Unsupported:
    """Return the error for a missing package of the page."""
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
        paths: the names of parameters that are paths.
        roots: folders that may be read and written.
        hubs: whether adapters and bases may be addresses on hubs.
        port: the port on 127.0.0.1; 0 for a free port.
        started: a function that is called with the address when the server is ready.

    Raises:
        Unsupported: starlette or uvicorn is not installed.
        UsageError: a root is not a folder.
        StorageError: the port is taken.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing(error) from error
    for root in roots:
        if not root.is_dir():
            raise UsageError("this folder does not exist", path=root, cure="Name folders that exist")
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

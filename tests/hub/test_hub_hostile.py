# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""Servers that want secrets or memory: credentials after redirects, and replies without an end."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import record, run
from hub_repository import hub, lay, peft_files  # noqa: F401 - a fixture
from hub_server import TOKEN, Fault, HubServer, sha256

import adapterkit as ak
from adapterkit.errors import AdapterkitError
from adapterkit.hub import web
from adapterkit.hub.hubs import oci as _modelpack
from adapterkit.hub.transfer import digests_of

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

PASSWORD = "openSesame"
DIGEST = "sha256:" + "0" * 64
LIMIT = 32 << 20
"""Bytes of a reply that stands for an endless one. Some MB of it go into the buffers of a connection."""


class Server:
    """A server; `answer` handles each request.

    Attributes:
        secrets: the `Authorization` headers that came.
        paths: of all requests.
        sent: bytes of the longest endless reply.
    """

    def __init__(self, answer: Callable[["Server", BaseHTTPRequestHandler], None]) -> None:
        self.secrets: list[str] = []
        self.paths: list[str] = []
        self.sent = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Says nothing."""

            def do_GET(handler) -> None:  # noqa: N805 - `self` is the server
                handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                self.paths.append(handler.path)
                if "Authorization" in handler.headers:
                    self.secrets.append(handler.headers["Authorization"])
                answer(self, handler)

            do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.host = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def endless(self, handler: BaseHTTPRequestHandler, status: int, beginning: bytes = b"") -> None:
        """A body that does not end before `LIMIT`; then the connection is dropped, so that a failing test ends."""
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        handler.close_connection = True
        try:
            handler.wfile.write(beginning)
            for sent in range(0, LIMIT, 65536):
                handler.wfile.write(b" " * 65536)
                self.sent = max(self.sent, sent + 65536)
        except OSError:
            pass


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"{}", **headers: str) -> None:
    handler.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


@pytest.fixture
def serve(hub: HubServer) -> Iterator[Callable[..., Server]]:
    """Starts servers; all of them end with the test."""
    made: list[Server] = []

    def start(answer: Callable[[Server, BaseHTTPRequestHandler], None]) -> Server:
        made.append(Server(answer))
        return made[-1]

    yield start
    for server in made:
        server.http.shutdown()
        server.http.server_close()


Answer = Callable[[Server, BaseHTTPRequestHandler], None]


def registry(blob: Answer) -> Answer:
    """A registry whose artifact has one file, kept wherever `blob` says."""
    found = {"adapter_config.json": (2, DIGEST, "git:" + "0" * 40)}
    config, manifest = _modelpack.artifact("x/y", "v1", found, "")
    del config

    def answer(server: Server, handler: BaseHTTPRequestHandler) -> None:
        if "/manifests/" in handler.path:
            reply(handler, 200, manifest, Docker_Content_Digest=digests_of(manifest)[1])
        else:
            blob(server, handler)

    return answer


def challenge(kind: str, thief: str) -> dict[str, str]:
    return {"WWW_Authenticate": f'Bearer realm="http://{thief}/token",service="s",scope="x"'
            if kind == "bearer" else 'Basic realm="x"'}  # fmt: skip


@pytest.mark.parametrize("kind", ["bearer", "basic"])
@pytest.mark.parametrize("back", [False, True])
def test_credentials_of_a_registry_stay_there_when_a_redirects_target_asks_for_them(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, back: bool
) -> None:
    """CVE-2020-15157: the target of a redirect answers 401 with a realm of its own."""
    thief = serve(lambda server, handler: (
        reply(handler, 200, b'{"token": "x"}') if handler.path.startswith("/token")
        else reply(handler, 302, Location=f"http://{home.host}/v2/x/y/blobs/again")
        if back and "/again" not in handler.path
        else reply(handler, 401, **challenge(kind, server.host))
    ))  # fmt: skip
    home = serve(registry(lambda _, handler: (
        reply(handler, 401, **challenge(kind, thief.host)) if "/again" in handler.path
        else reply(handler, 307, Location=f"http://{thief.host}/blob")
    )))  # fmt: skip
    pair = base64.b64encode(f"somebody:{PASSWORD}".encode()).decode()
    lay(tmp_path / "docker", {"config.json": json.dumps({"auths": {home.host: {"auth": pair}}}).encode()})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    if back:
        # The way back leads to the registry itself, whose realm is its own choice: it may be asked.
        assert run("pull", f"oci://{home.host}/x/y:v1", tmp_path / "out").exit_code == 5
        return
    result = run("pull", f"oci://{home.host}/x/y:v1", tmp_path / "out", "--debug")
    assert (result.exit_code, thief.secrets) == (5, [])
    assert "/blob" in thief.paths
    assert PASSWORD not in result.output


def test_a_secret_is_not_sent_again_once_a_request_has_left_its_origin(serve: Callable[..., Server]) -> None:
    away = serve(lambda _, handler: reply(handler, 302, Location=f"http://{home.host}/chosen-by-another"))
    home = serve(lambda _, handler: (
        reply(handler, 200) if "chosen" in handler.path else reply(handler, 302, Location=f"http://{away.host}/")
    ))  # fmt: skip
    with web.answered("GET", f"http://{home.host}/x", {}, {"authorization": "secret"}, "x") as response:
        assert response.status_code == 200
    assert (home.secrets, away.secrets) == (["secret"], [])
    assert home.paths == ["/x", "/chosen-by-another"]


def test_the_next_page_of_a_redirected_list_gets_no_token(
    serve: Callable[..., Server], hub: HubServer, tmp_path: Path
) -> None:
    """huggingface_hub's own pagination sends the token to whatever address a page names."""
    entry = {"type": "file", "path": "a.json", "size": 2, "oid": "0" * 40}
    thief = serve(lambda server, handler: reply(
        handler, 200, json.dumps([entry]).encode(),
        **({} if "page=2" in handler.path else {"Link": f'<http://{server.host}/x?page=2>; rel="next"'}),
    ))  # fmt: skip
    hub.add("org/lora", peft_files())
    hub.faults = [Fault("/tree/", "redirect", 99, f"http://{thief.host}/x")]
    assert run("pull", "org/lora", tmp_path / "out").exit_code != 0
    assert [path for path in thief.paths if "page=2" in path]
    assert thief.secrets == []


def test_the_check_of_a_redirected_upload_gets_no_token(
    serve: Callable[..., Server], hub: HubServer, tmp_path: Path
) -> None:
    """The reply to a request for uploads names the address that is told, with the token, that one has come."""

    def answer(server: Server, handler: BaseHTTPRequestHandler) -> None:
        oid = sha256(peft_files()["adapter_model.safetensors"])
        urls = {name: {"href": f"http://{server.host}/{name}"} for name in ("upload", "verify")}
        told = {"transfer": "basic", "objects": [{"oid": oid, "size": 1, "actions": urls}]}
        reply(handler, 200, json.dumps(told).encode(), Content_Type="application/vnd.git-lfs+json")

    thief = serve(answer)
    hub.faults = [Fault("objects/batch", "redirect", 99, f"http://{thief.host}/batch")]
    run("push", lay(tmp_path / "lora", peft_files()), "hf://org/new")
    assert thief.paths
    assert TOKEN not in str(thief.secrets)


@pytest.mark.parametrize("status", [403, 404, 500])
@pytest.mark.parametrize("kind", ["oci", "hf"])
def test_an_endless_refusal_is_not_read_to_its_end(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, status: int
) -> None:
    server = serve(lambda server, handler: server.endless(handler, status, b'{"error": "'))
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.host}")
    uri = "hf://org/x" if kind == "hf" else f"oci://{server.host}/x/y:v1"
    assert record("pull", uri, tmp_path / "out", code=5)["error"]["path"] == uri
    assert server.sent < LIMIT


@pytest.mark.parametrize("which", ["repository", "tree", "manifest", "token", "push"])
def test_an_endless_document_is_refused(
    serve: Callable[..., Server], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    for limit in ("web.MAX_TOLD", "hubs.oci.MAX_MANIFEST", "web.MAX_ANSWER"):
        monkeypatch.setattr(f"adapterkit.hub.{limit}", 1 << 19)

    def answer(server: Server, handler: BaseHTTPRequestHandler) -> None:
        if which == "tree" and "/tree/" not in handler.path:
            reply(handler, 200, json.dumps({"sha": "0" * 40}).encode())
        elif which == "token" and not handler.path.startswith("/token"):
            reply(handler, 401, **challenge("bearer", server.host))
        else:
            server.endless(handler, 200, b'{"sha": "')

    server = serve(answer)
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.host}")
    uri = f"oci://{server.host}/x/y:v1" if which in ("manifest", "token") else "hf://org/x"
    lora, out = lay(tmp_path / "lora", peft_files()), tmp_path / "out"
    with pytest.raises(AdapterkitError, match="longer than 524,288 bytes") as raised:
        ak.hub.push(lora, uri) if which == "push" else ak.hub.pull(uri, out)
    assert raised.value.path == uri
    assert server.sent < LIMIT


def test_an_empty_page_that_names_another_one_is_refused(
    serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(lambda server, handler: (
        reply(handler, 200, b"[]", Link=f'<http://{server.host}/x?at={len(server.paths)}>; rel="next"')
        if len(server.paths) > 1 else reply(handler, 200, json.dumps({"sha": "0" * 40}).encode())
    ))  # fmt: skip
    monkeypatch.setenv("HF_ENDPOINT", f"http://{server.host}")
    assert record("pull", "hf://org/x", tmp_path / "out", code=5)["error"]["code"] == "network"
    assert len(server.paths) == 2

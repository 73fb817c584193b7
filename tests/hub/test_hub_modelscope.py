# ruff: noqa: F811, ARG001 - a fixture is imported and then named
"""ModelScope through its own light client, against an imitation of the two routes by which that reads a repository."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from command_line import record, run
from hub_repository import base_files, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import Fault, Faulty, HubServer, sha256

import adapterkit as ak

TOKEN = "tokenOfModelScope"
ROUTE = "/api/v1/models/"


class ModelScope(Faulty):
    """Repositories by name: what their files are."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos, self.faults, self.lock = repos, list[Fault](), threading.Lock()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    hub: ModelScope
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        fault = self.hub.fault(f"GET {self.path}")
        self.hub.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        place, asked = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        repo, _, verb = place.path.removeprefix(ROUTE).partition("/repo")
        files = self.hub.repos.get(repo)
        if fault and fault.kind == "drop":
            self.close_connection = True
        elif fault and fault.kind == "status":
            self._send(int(fault.value), b"{}")
        elif fault and fault.kind == "redirect":
            self._send(302, b"", {"Location": str(fault.value)})
        elif files is None or asked["Revision"][0] not in ("master", "v1"):
            self._send(404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
        elif verb == "/files":
            told = [{"Path": n, "Size": len(d), "Sha256": sha256(d), "Type": "blob"} for n, d in files.items()]
            self._send(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": told}}).encode())
        else:
            self._file(files[asked["FilePath"][0]], fault)

    def _file(self, data: bytes, fault: Fault | None) -> None:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), int(last or len(data) - 1) + 1
        body = bytearray(data[start:end])
        if fault and fault.kind == "flip":
            body[int(fault.value)] ^= 1
        headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        cut = int(fault.value) if fault and fault.kind == "truncate" else None
        self._send(206 if "Range" in self.headers else 200, bytes(body), headers, cut)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.close_connection = cut is not None


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelScope]:
    """One for all tests: the client reads its environment once."""
    made = ModelScope({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELSCOPE_ENDPOINT", made.url)
        patch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
        patch.setenv("MODELSCOPE_HOME", str(tmp_path_factory.mktemp("modelscope")))
        yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def scope(hub: HubServer, running: ModelScope) -> ModelScope:
    running.repos = {"org/lora": peft_files(), "org/base": base_files()}
    running.faults = []
    return running


def test_a_repository_is_read_and_pulled(scope: ModelScope, tmp_path: Path) -> None:
    pulled = record("pull", "modelscope://org/lora", tmp_path / "out")
    assert {file["digest"].partition(":")[0] for file in pulled["files"]} == {"sha256"}
    assert laid(tmp_path / "out") == peft_files()
    local = lay(tmp_path / "local", peft_files())
    assert ak.read("modelscope://org/lora@v1").digest() == ak.read(local).digest()
    assert record("inspect", "modelscope://org/lora")["format"] == "peft"
    assert run("merge", "modelscope://org/base", "modelscope://org/lora", "-o", tmp_path / "merged").exit_code == 0
    assert run("diff", "modelscope://org/lora", local).exit_code == 0


@pytest.mark.parametrize(
    ("kind", "value", "code"),
    [("truncate", 50, 0), ("drop", None, 0), ("status", 503, 0), ("flip", 30, 0), ("flip for good", 30, 4)],
)
def test_faults_are_overcome_or_said(scope: ModelScope, tmp_path: Path, kind: str, value: object, code: int) -> None:
    scope.faults = [Fault("FilePath=adapter_model", kind.partition(" ")[0], 99 if "good" in kind else 1, value)]
    assert run("pull", "modelscope://org/lora", tmp_path / "out").exit_code == code
    assert (tmp_path / "out").exists() == (code == 0)
    assert code or laid(tmp_path / "out") == peft_files()


@pytest.mark.parametrize("status", [401, 403, 404, 418])
def test_what_is_denied_is_told_apart_and_no_token_is_said(scope: ModelScope, tmp_path: Path, status: int) -> None:
    scope.faults = [Fault("/files", "status", 99, status)]
    result = run("pull", "modelscope://org/lora", tmp_path / "out", "--json", "--debug")
    code = {401: "access", 403: "access", 404: "remote-not-found"}.get(status, "network")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (5, code)
    assert TOKEN not in result.output


def test_what_is_not_there_and_what_cannot_be_done(scope: ModelScope, tmp_path: Path) -> None:
    for uri in ("modelscope://org/none", "modelscope://org/lora@none", "modelscope://org/lora/none.json"):
        assert record("pull", uri, tmp_path / "out", code=5)["error"]["code"] == "remote-not-found"
    scope.repos["org/lora"]["../x"] = b"x"
    assert run("pull", "modelscope://org/lora", tmp_path / "out").exit_code == 2
    assert run("push", lay(tmp_path / "lora", peft_files()), "modelscope://org/new").exit_code == 3


@pytest.mark.parametrize("route", ["/files", "FilePath="])
def test_no_redirect_takes_the_token_to_another_port(scope: ModelScope, tmp_path: Path, route: str) -> None:
    """The client sends the token as a cookie too, and cookies are of a host, whatever its ports."""
    other = ModelScope(scope.repos)
    scope.faults = [Fault(route, "redirect", 99, f"{other.url}{ROUTE}org/lora/repo/files?Revision=master")]
    run("pull", "modelscope://org/lora", tmp_path / "out")
    assert TOKEN in str(scope.requests)
    assert other.requests
    assert TOKEN not in str(other.requests)
    other.http.shutdown()
    other.http.server_close()


@pytest.mark.parametrize("status", [200, 404])
def test_a_list_without_an_end_is_refused(
    scope: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("adapterkit.hub.hubs.modelscope.MAX_TOLD", 1 << 16)
    sent: list[int] = []

    def endless(handler: _Handler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            for _ in range(8192):
                handler.wfile.write(b" " * 4096)
                sent.append(4096)

    monkeypatch.setattr(_Handler, "do_GET", endless)
    assert record("pull", "modelscope://org/lora", tmp_path / "out", code=5)["error"]["path"]
    assert 0 < sum(sent) < 32 << 20

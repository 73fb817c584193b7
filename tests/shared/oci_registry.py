"""Debian's docker-registry on loopback, behind a proxy with faults on demand."""

import contextlib
import http.client
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest
from hub_server import Fault, Faulty

BINARY = shutil.which("docker-registry")
"""`.ci/run` installs it."""

PASSWORD = "openSesame"
HTPASSWD = "somebody:$2y$04$c4WoMPo3SXsafkva.HHa6uqciox36n1AyjcpZbymt8Vcaodm0eDhe"
"""A user and the bcrypt of the password."""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def distribution(folder: Path, auth: str = "", storage: str = "inmemory: {}") -> Iterator[str]:
    """Start a registry with blobs in memory, and settings and log in a folder; return its host and port."""
    if BINARY is None:
        pytest.skip("docker-registry is not installed; .ci/run does that where it can")
    folder.mkdir()
    process, host = _started(folder, auth, storage)
    try:
        yield host
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with distribution(tmp_path_factory.mktemp("oci") / "registry") as host:
        yield host


def _started(folder: Path, auth: str, storage: str) -> tuple[subprocess.Popen[bytes], str]:
    """Return a running registry; tries again if another process has taken the free port."""
    for _ in range(5):
        host = f"127.0.0.1:{free_port()}"
        told = f"version: 0.1\nstorage: {{{storage}}}\nhttp: {{addr: '{host}'}}\n"
        (folder / "settings.yml").write_text(f"{told}log: {{level: error}}\n{auth}")
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen([str(BINARY), "serve", str(folder / "settings.yml")], stdout=log, stderr=log)
        if _answers(process, host):
            return process, host
        process.terminate()
        process.wait()
    pytest.fail(f"docker-registry does not answer: {(folder / 'log').read_text()[-500:]}")


def _answers(process: subprocess.Popen[bytes], host: str) -> bool:
    for _ in range(400):
        if process.poll() is not None:
            return False
        with contextlib.suppress(OSError), urlopen(f"http://{host}/"):
            return True
        time.sleep(0.05)
    return False


class Proxy(Faulty):
    """Forwards requests to a server; `requests` records (method, path, headers), and `faults` has faults of some.

    If `token` is set, requests need it; a client with `credentials` gets it from the address `realm`.
    """

    def __init__(self, server: str) -> None:
        self.server, self.faults, self.requests = server, list[Fault](), list[tuple[str, str, dict[str, str]]]()
        self.lock, self.received = threading.Lock(), 0
        self.token, self.credentials, self.realm = "", "", ""
        self.seen: Callable[[str], None] = lambda _: None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.http.daemon_threads = True
        self.host = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        line = f"{self.command} {self.path}"
        self.proxy.seen(line)
        fault = self.proxy.fault(line)
        length = int(self.headers.get("Content-Length") or 0)
        body = self._body(length)
        if len(body) < length:
            # Drop the request of a client that disconnected, like most proxies, which read requests completely.
            self.close_connection = True
            return
        self.proxy.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        kind = fault.kind if fault else ""
        if self.proxy.token and not self._admitted():
            return
        if kind == "drop":
            self.close_connection = True
            return
        if kind == "status":
            self._answer(int(fault.value), fault.headers, b"{}")  # type: ignore[union-attr,call-overload]
            return
        if kind == "redirect":
            self._answer(307, {"Location": str(fault.value)}, b"")  # type: ignore[union-attr]
            return
        status, headers, answer = self._ask(body, kind)
        if kind == "after":
            self.close_connection = True
            return
        if kind == "flip" and answer:
            bit, changed = int(fault.value) % (8 * len(answer)), bytearray(answer)  # type: ignore[union-attr,call-overload]
            changed[bit // 8] ^= 1 << bit % 8
            answer = bytes(changed)
        self._answer(status, headers, answer, int(fault.value) if kind == "truncate" else None)  # type: ignore[union-attr,call-overload]

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _body(self, length: int) -> bytes:
        body = bytearray()
        while len(body) < length and (part := self.rfile.read(min(1 << 16, length - len(body)))):
            body += part
            self.proxy.received += len(part)
        return bytes(body)

    def _admitted(self) -> bool:
        sent = self.headers.get("Authorization")
        if self.path.startswith("/token"):
            known = sent == f"Basic {self.proxy.credentials}" and "scope=" in self.path and "service=" in self.path
            token = self.proxy.token if known else ""
            self._answer(200 if known else 401, {}, f'{{"token": "{token}"}}'.encode())
            return False
        if sent == f"Bearer {self.proxy.token}":
            return True
        realm = self.proxy.realm or f"http://{self.proxy.host}/token"
        told = f'Bearer realm="{realm}",service="registry",scope="repository:x:pull,push"'
        self._answer(401, {"WWW-Authenticate": told}, b"{}")
        return False

    def _ask(self, body: bytes, kind: str) -> tuple[int, dict[str, str], bytes]:
        connection, headers = http.client.HTTPConnection(self.proxy.server), dict(self.headers.items())
        headers = {key: value for key, value in headers.items() if key.lower() != "host"}
        asked = next((key for key in headers if key.lower() == "range"), None)
        if asked and kind == "no-range":
            del headers[asked]
        elif asked and kind == "wrong-range":
            start, _, end = headers[asked].removeprefix("bytes=").partition("-")
            headers[asked] = f"bytes={max(0, int(start) - 7)}-{end}"
        connection.request(self.command, self.path, body or None, headers | {"Host": self.proxy.host})
        answer = connection.getresponse()
        data = answer.read()
        headers = {key: value for key, value in answer.getheaders() if key.lower() != "transfer-encoding"}
        connection.close()
        return answer.status, headers, data

    def _answer(self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        headers = {key: value for key, value in headers.items() if key.lower() != "date"}
        for key, value in (
            headers.items() if self.command == "HEAD" else ({**headers, "Content-Length": str(len(body))}).items()
        ):
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True

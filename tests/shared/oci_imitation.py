"""A registry that handles uploads as the Distribution specification says: it returns the offset of an upload.

Docker's registry 2.8 refuses an upload if it has more bytes than in its last answer, so tests also need this one. It
only has uploads and blobs, which is enough for `adapterkit.hub.hubs.oci`.
"""

import hashlib
import re
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hub_server import Faulty


class Registry(Faulty):
    """The registry; `received` counts the bytes of chunks. After a chunk shorter than `least`, it accepts no more."""

    def __init__(self) -> None:
        self.uploads: dict[str, bytearray] = {}
        self.blobs: dict[str, bytes] = {}
        self.ended: set[str] = set()
        self.faults, self.received, self.least = [], 0, 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"registry": self}))
        self.http.daemon_threads = True
        self.host = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Handler(BaseHTTPRequestHandler):
    registry: Registry
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._answer(200 if self.path.rpartition("/")[2] in self.registry.blobs else 404)

    def do_POST(self) -> None:
        name = uuid.uuid4().hex
        self.registry.uploads[name] = bytearray()
        least = {"OCI-Chunk-Min-Length": str(self.registry.least)} if self.registry.least else {}
        self._answer(202, name, least)

    def do_GET(self) -> None:
        name = self._upload()
        if name is not None:
            self._answer(204, name)

    def do_PATCH(self) -> None:
        length, name = int(self.headers["Content-Length"]), self._upload()
        if name is None:
            return
        held = self.registry.uploads[name]
        if self.headers["Content-Range"] != f"{len(held)}-{len(held) + length - 1}" or name in self.registry.ended:
            self._refuse(416, length)
        else:
            if length < self.registry.least:
                self.registry.ended.add(name)
            self._take(held, length)
            fault = self.registry.fault(f"PATCH {self.path}")
            if fault is not None:
                self.close_connection = True
                return
            self._answer(202, name)

    def _take(self, held: bytearray, length: int) -> None:
        """Keep the received part of a chunk, even if the connection ends."""
        left = length
        while left and (part := self.rfile.read1(min(left, 1 << 16))):
            held += part
            left -= len(part)
            self.registry.received += len(part)
        if left:
            raise ConnectionError

    def do_PUT(self) -> None:
        name, digest = self._upload(), re.sub(".*digest=", "", self.path)
        if name is None:
            return
        data = bytes(self.registry.uploads.pop(name))
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            self._refuse(400, 0)
            return
        self.registry.blobs[digest] = data
        self._answer(201)

    def _upload(self) -> str | None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if name in self.registry.uploads:
            return name
        self._refuse(404, int(self.headers["Content-Length"] or 0))
        return None

    def _refuse(self, status: int, length: int) -> None:
        self.rfile.read(length)
        self._answer(status)

    def _answer(self, status: int, name: str | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        if name is not None:
            held = len(self.registry.uploads[name])
            self.send_header("Location", f"/v2/x/blobs/uploads/{name}")
            self.send_header("Range", f"0-{max(0, held - 1)}")
        for key, value in {**(headers or {}), "Content-Length": "0"}.items():
            self.send_header(key, value)
        self.end_headers()

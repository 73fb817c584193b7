"""A network link to a server on loopback with limited bandwidth; it counts the bytes in each direction."""

from __future__ import annotations

import socket
import threading
import time


class Link:
    """Forwards TCP connections to a server.

    Attributes:
        host: the host and port to connect to.
        received, sent: the number of bytes from the server, and to the server.
    """

    def __init__(self, server: str, bandwidth: float = float("inf")) -> None:
        name, _, port = server.removeprefix("http://").partition(":")
        self.server, self.bandwidth = (name, int(port)), bandwidth
        self.received = self.sent = 0
        self._free = [0.0, 0.0]
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.host = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listening.accept()
                there = socket.create_connection(self.server)
            except OSError:
                return
            for way, (one, other) in enumerate([(there, here), (here, there)]):
                threading.Thread(target=self._pass_on, args=(one, other, way), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket, way: int) -> None:
        try:
            while data := one.recv(1 << 16):
                time.sleep(max(0.0, self._reserved(len(data), way) - time.monotonic()))
                other.sendall(data)
        except OSError:
            pass
        for each in (one, other):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def _reserved(self, nbytes: int, way: int) -> float:
        """Return the time at which the link has passed these bytes; all connections share the link."""
        with self._lock:
            if way:
                self.sent += nbytes
            else:
                self.received += nbytes
            self._free[way] = max(self._free[way], time.monotonic()) + nbytes / self.bandwidth
            return self._free[way]

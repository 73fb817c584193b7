"""Control headless Chromium by its DevTools protocol over a pipe; only the browser is needed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BINARY = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
SECONDS = 60


class Page:
    """One page of a browser.

    Attributes:
        events: the events that the browser sent so far, oldest first.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._buffer, self._number = read, write, b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and return the answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + SECONDS
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self.events.append(answer)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; waits for a promise."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.send("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, url: str) -> None:
        """Load an address, and wait until the page is loaded."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < until, f"{condition} never came true"
            self.evaluate("new Promise((done) => setTimeout(done, 20))")

    def told(self, method: str) -> list[dict[str, Any]]:
        """Return the browser's events of one name."""
        return [event["params"] for event in self.events if event["method"] == method]

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert time.monotonic() < until, "Chromium does not answer"
            more = os.read(self._read, 1 << 20)
            assert more, "Chromium ended"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """Start a browser with one page for the block; its files are in `folder`."""
    if BINARY is None:
        # Require the browser, which tools/servers installs: continuous integration must not pass without it.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here; tools/servers installs one")
    ours, theirs = os.pipe(), os.pipe()
    command = [
        BINARY, "--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={folder}",
        "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
    ]  # fmt: skip
    # The browser reads commands from file descriptor 3, and writes answers to 4.
    move = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
    descriptors = (theirs[0], ours[1])
    process = subprocess.Popen(
        ["bash", "-c", move, "bash", *map(str, descriptors), *command], pass_fds=descriptors,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        yield Page(ours[0], theirs[1])
    finally:
        process.terminate()
        process.wait(SECONDS)
        for descriptor in (ours[0], theirs[1]):
            os.close(descriptor)

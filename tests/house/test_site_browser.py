"""The built site in a browser: one page of each kind, for people with a keyboard or a screen reader, and offline."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import axe
import chromium
import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = (
    "404.html", "index.html", "tasks.html", "combining.html", "benchmarks.html", "examples.html",
    "notebooks/2-combining.html", "specification/index.html", "reference/methods/lora.html",
    "reference/formats/peft.html", "reference/combiners/ties.html", "reference/commands.html", "reference/errors.html",
    "reference/python.html",
)  # fmt: skip
"""One page of each kind: the theme's own, written ones with code, tables and pictures, and every generated kind."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site on this machine."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.page(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
@pytest.mark.parametrize("path", KINDS)
def test_a_page_is_for_everyone_and_loads_nothing_from_elsewhere(
    page: chromium.Page, site: str, path: str, scheme: str, width: int
) -> None:
    page.events.clear()
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    page.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.open(site + path)
    # scrolling.js gives focus to what scrolls once the theme has set its tables.
    page.wait("[...document.querySelectorAll('.md-typeset__scrollwrap, .md-typeset pre > code')]"
              ".every((box) => box.scrollWidth <= box.clientWidth || box.tabIndex === 0)")  # fmt: skip
    assert axe.faults(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    asked = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
    assert asked
    assert [url for url in asked if not url.startswith((site, "data:", "blob:"))] == []
    assert page.told("Runtime.exceptionThrown") == []

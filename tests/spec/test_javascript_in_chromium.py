"""The reader in JavaScript in a browser: all vectors, as in node."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import chromium
import pytest

from adapterkit.conformance import conformance

SPEC = Path(__file__).parents[2] / "spec"
SETUP = """(async () => {
  globalThis.run = await import("/readers/javascript/run.mjs");
  const bytesOf = async (path) => new Uint8Array(await (await fetch(path)).arrayBuffer());
  const later = async (path) => { const bytes = await bytesOf(path); return () => bytes; };
  const methods = await (await fetch("/1.1/methods.json")).json();
  const verbs = {
    check: async (path) => run.check(await bytesOf(path), methods),
    canonical: async (path) => run.canonicals(await bytesOf(path)),
    rules: async (path) => run.rules(await bytesOf(path)),
    compute: async (one, other) => run.computed(await bytesOf(one), await later(other), methods),
    merge: async (one, other) => run.merged(await bytesOf(one), await later(other), methods),
    base: async (folder, files) => {
      if (!files.length) return run.baseFile(await bytesOf(folder));
      const held = new Map(await Promise.all(files.map(async (name) => [name, await bytesOf(`${folder}/${name}`)])));
      return run.base(files, (name) => held.get(name));
    },
  };
  globalThis.ask = (verb, groups) => Promise.all(groups.map((group) => verbs[verb](...group).catch(run.told)));
})()"""


class Quiet(SimpleHTTPRequestHandler):
    def guess_type(self, path: Any) -> str:
        return "text/javascript" if str(path).endswith(".mjs") else super().guess_type(path)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    """Where the folder of the specification is served, on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SPEC)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_reader_conforms_in_a_browser(address, tmp_path):
    with chromium.page(tmp_path) as page:
        page.open(f"{address}/vectors/index.json")
        page.evaluate(SETUP)

        def ask(verb: str, paths: Sequence[Path]) -> Iterable[dict[str, Any]]:
            groups: list[list[Any]] = [[f"/{path.relative_to(SPEC).as_posix()}" for path in paths]]
            if verb not in ("compute", "merge"):
                groups = [[name] for name in groups[0]]
            if verb == "base":
                files = (sorted(f.relative_to(p).as_posix() for f in p.rglob("*") if f.is_file()) for p in paths)
                groups = [[*group, held] for group, held in zip(groups, files, strict=True)]
            return page.evaluate(f"ask({json.dumps(verb)}, {json.dumps(groups)})")

        outcomes = conformance(ask)
    assert [(each.case, each.why) for each in outcomes if each.passed is False] == []
    assert sum(each.passed is True for each in outcomes) > 660

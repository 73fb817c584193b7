# ruff: noqa: F811 - fixtures are imported and then named
"""Every fault at every request of a pull and of a push, for each kind of hub: overcome, or said by its exit code.

The requests are those of a run without faults, so that none is forgotten.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from bucket_server import bucket, server  # noqa: F401 - fixtures
from command_line import run
from hub_repository import hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import Fault, Faulty, HubServer
from oci_registry import Proxy, registry  # noqa: F401 - a fixture

from adapterkit.hub.hubs import oci as _uploads

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")
"""huggingface_hub's own, where it uploads a file by its HTTP stack."""

BUSY = {"Retry-After": "0"}
PASSING = {
    "drop": ("drop", 2, None, {}),
    "busy": ("status", 2, 503, BUSY),
    "too many": ("status", 2, 429, BUSY),
    "answer lost": ("after", 1, None, {}),
}
OF_BYTES = {
    "cut": ("truncate", 2, 20, {}), "nothing": ("truncate", 2, 0, {}), "flip": ("flip", 2, 171, {}),
    "wrong range": ("wrong-range", 1, None, {}), "no range": ("no-range", 1, None, {}),
}  # fmt: skip
BUSY_FOR_GOOD = {"busy for good": ("status", 99, 503, BUSY)}
LASTING = BUSY_FOR_GOOD | {"dropped for good": ("drop", 99, None, {})}
OTHERS = (*peft_files(), "README.md")
"""Files that are asked for as `more.txt` is."""

FILES = peft_files() | {"more.txt": np.random.default_rng(1).bytes(120_000)}


class Place:
    """A hub that a test may break.

    Args:
        faulty: the server that breaks.
        uri: of a place, by its name.
    """

    def __init__(self, faulty: Faulty, uri: Callable[[str], str]) -> None:
        self.faulty, self.uri = faulty, uri

    def routes(self, name: str) -> list[str]:
        """The requests since the last call, the place's name left out, and what a server draws at random."""
        lines = [f"{method} {path}".replace(name, "{}") for method, path, _ in self.faulty.requests]
        self.faulty.requests.clear()
        return sorted({_shape(line) for line in lines if not any(file in line for file in OTHERS)})


def _shape(line: str) -> str:
    """A request without digests, states and signatures, of which another run has others."""
    line = re.sub(r"(uploads/|blobs/sha256:|manifests/sha256:).*", r"\1", line)
    return re.sub(r"\?(?!list-type).*", "", line)


@pytest.fixture(params=["hf", "oci", "s3"])
def place(request: pytest.FixtureRequest, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    if request.param == "hf":
        yield Place(hub, "hf://org/{}".format)
        return
    if request.param == "oci":
        monkeypatch.setattr(_uploads, "CHUNK", 50_000)
        proxy = Proxy(request.getfixturevalue("registry"))
        uri = f"oci://{proxy.host}/faults/{{}}:v1"
    else:
        made = request.getfixturevalue("bucket")
        proxy = Proxy(request.getfixturevalue("server").removeprefix("http://"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.host}")
        uri = f"s3://{made}/{{}}"
    yield Place(proxy, uri.format)
    proxy.close()


def _carries_bytes(route: str) -> bool:
    """Whether an answer is that of a file, or of what is held against a digest."""
    return route.startswith("GET") and any(part in route for part in ("/resolve/", "/blobs/", "/manifests/", ".txt"))


def test_every_fault_of_a_pull(place: Place, tmp_path: Path) -> None:
    files, uri = lay(tmp_path / "files", FILES), place.uri("pulled")
    assert run("push", files, uri).exit_code == 0
    place.faulty.requests.clear()
    assert run("pull", uri, tmp_path / "whole").exit_code == 0
    routes, trial = place.routes("pulled"), 0
    assert routes
    for route in routes:
        kinds = PASSING | LASTING | (OF_BYTES if _carries_bytes(route) else {})
        for kind, (what, times, value, headers) in kinds.items():
            trial += 1
            out = tmp_path / f"out{trial}"
            place.faulty.faults = [Fault(route.replace("{}", "pulled"), what, times, value, headers)]
            result = run("pull", uri, out)
            met = place.faulty.faults[0].times < times
            assert result.exit_code == (5 if kind in LASTING else 0), (route, kind, result.output)
            assert met, (route, kind)
            assert out.exists() == (kind not in LASTING), (route, kind)
            place.faulty.faults = []
            assert run("pull", uri, out).exit_code == 0, (route, kind)
            assert FILES.items() <= laid(out).items(), (route, kind)


def test_every_fault_of_a_push(place: Place, tmp_path: Path) -> None:
    files = lay(tmp_path / "files", FILES)
    place.faulty.requests.clear()
    assert run("push", files, place.uri("first")).exit_code == 0
    routes, trial = place.routes("first"), 0
    assert len(routes) >= 2
    for route in routes:
        for kind, (what, times, value, headers) in (PASSING | BUSY_FOR_GOOD).items():
            trial += 1
            name = f"pushed{trial}"
            # Contents of its own: a registry keeps what it has got once.
            (files / "more.txt").write_bytes(FILES["more.txt"] + name.encode())
            place.faulty.faults = [Fault(route.replace("{}", name), what, times, value, headers)]
            result = run("push", files, place.uri(name))
            assert result.exit_code in ((0, 5) if kind in LASTING else (0,)), (route, kind, result.output)
            place.faulty.faults = []
            if kind in LASTING and result.exit_code:
                half = tmp_path / f"half{trial}"
                assert run("pull", place.uri(name), half).exit_code in (0, 5), (route, kind)
                held = laid(half).keys() & FILES.keys() if half.exists() else set()
                assert held in (set(), FILES.keys()), (route, kind, "all of it or nothing")
                assert run("push", files, place.uri(name)).exit_code == 0, (route, kind)
            out = tmp_path / name
            assert run("pull", place.uri(name), out).exit_code == 0, (route, kind)
            assert laid(files).items() <= laid(out).items(), (route, kind)

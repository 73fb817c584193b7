# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""Uploads that are cut, at a registry that holds them as the specification says: only what it lacks is sent again."""

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_repository import hub, lay  # noqa: F401 - a fixture
from hub_server import Fault, HubServer
from oci_imitation import Registry

from adapterkit.hub import parse
from adapterkit.hub.hubs import oci as _uploads
from adapterkit.hub.hubs import remote_at
from adapterkit.hub.hubs.oci import Distribution
from adapterkit.hub.transfer import digests_of

CHUNK = 1 << 20
BLOB = np.random.default_rng(2).bytes(5 * CHUNK + 77)
DIGEST = digests_of(BLOB)[1]


class Killed(BaseException):
    """What no handler catches."""


@pytest.fixture
def imitation(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    monkeypatch.setattr(_uploads, "UPLOAD_CHUNK", CHUNK)
    made = Registry()
    yield made
    made.close()


def upload(registry: Registry, folder: Path) -> None:
    """As a process of its own would: all that it knows of an earlier one is in the cache."""
    remote = remote_at(parse(f"oci://{registry.host}/x:v1"))
    assert isinstance(remote, Distribution)
    _uploads.upload(remote, lay(folder, {"blob": BLOB}) / "blob", len(BLOB), DIGEST)


@pytest.mark.parametrize("sent", [0, 1, CHUNK // 2, CHUNK], ids=["nothing", "a byte", "half", "all but the answer"])
def test_another_process_goes_on_where_the_registry_stands(
    imitation: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    real, calls = _uploads._patch, []

    def cut(remote: Distribution, location: str, at: int, chunk: bytes) -> str:
        calls.append(at)
        if len(calls) < 4:
            return real(remote, location, at, chunk)
        head = f"PATCH {location.removeprefix(f'http://{imitation.host}')} HTTP/1.1\r\nHost: {imitation.host}\r\n"
        told = f"Content-Length: {len(chunk)}\r\nContent-Range: {at}-{at + len(chunk) - 1}\r\n\r\n"
        with socket.create_connection(imitation.host.split(":")) as line:
            line.sendall((head + told).encode() + chunk[:sent])
            line.shutdown(socket.SHUT_WR)
            while line.recv(1 << 16):
                pass
        raise Killed

    monkeypatch.setattr(_uploads, "_patch", cut)
    imitation.http.handle_error = lambda *_: None
    with pytest.raises(Killed):
        upload(imitation, tmp_path)
    monkeypatch.setattr(_uploads, "_patch", real)
    upload(imitation, tmp_path)
    assert imitation.blobs == {DIGEST: BLOB}
    assert len(imitation.uploads) == 0, "the one that was begun was ended"
    assert imitation.received <= len(BLOB) + 1, "of a first byte alone, a registry cannot tell"


def test_a_lost_answer_costs_nothing(imitation: Registry, tmp_path: Path) -> None:
    imitation.faults = [Fault("PATCH", "after", 3)]
    upload(imitation, tmp_path)
    assert imitation.faults[0].times == 0
    assert imitation.blobs == {DIGEST: BLOB}
    assert imitation.received == len(BLOB)


def test_a_registry_may_want_longer_chunks(imitation: Registry, tmp_path: Path) -> None:
    imitation.least = 2 * CHUNK
    upload(imitation, tmp_path)
    assert imitation.blobs == {DIGEST: BLOB}
    assert imitation.received == len(BLOB)

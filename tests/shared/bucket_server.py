# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""A bucket server (moto) on loopback, and a new bucket for each test."""

from collections.abc import Iterator

import pytest
from hub_repository import hub  # noqa: F401 - a fixture
from hub_server import HubServer

SECRET = "theSecretKeyOfTheBucket"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    from moto import server as moto

    made = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    yield f"http://{host}:{port}"
    made.stop()


@pytest.fixture
def bucket(server: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return a new bucket for a test."""
    import urllib.request

    told = {"ENDPOINT_URL": server, "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": SECRET, "REGION": "us-east-1"}
    for name, value in told.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"bucket-{abs(hash(request.node.name)):x}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{name}", method="PUT")).close()
    return name

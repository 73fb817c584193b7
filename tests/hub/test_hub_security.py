# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""What hubs and networks may not do: learn secrets, run code, write elsewhere; and what they may ask: to wait."""

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from bucket_server import SECRET, bucket, server  # noqa: F401 - fixtures
from command_line import record, run
from hub_repository import base_files, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import TOKEN, Fault, HubServer
from oci_registry import Proxy, registry  # noqa: F401 - a fixture

import adapterkit as ak
from adapterkit.errors import NetworkError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

CREDENTIALS = "c29tZWJvZHk6b3BlblNlc2FtZQ=="


@pytest.fixture
def proxy(registry: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A registry that wants a token, and credentials that are changed for one."""
    made = Proxy(registry)
    made.token, made.credentials = "tokenOfTheRegistry", CREDENTIALS
    lay(tmp_path / "docker", {"config.json": json.dumps({"auths": {made.host: {"auth": CREDENTIALS}}}).encode()})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    yield made
    made.close()


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """Everything that reaches the root logger, whose level is the lowest for as long as this lasts."""
    kept: list[logging.LogRecord] = []
    handler, root = logging.Handler(), logging.getLogger()
    handler.emit = kept.append  # type: ignore[method-assign]
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield kept
    root.removeHandler(handler)
    root.setLevel(level)


def test_no_secret_in_any_log(
    hub: HubServer, proxy: Proxy, bucket: str, tmp_path: Path, records: list[logging.LogRecord]
) -> None:
    """At the most talkative level of every library that has a part in it, the servers' own aside."""
    lora, said = lay(tmp_path / "lora", peft_files()), []
    for uri in ("hf://org/new", f"oci://{proxy.host}/security/logs:v1", f"s3://{bucket}/logs"):
        said += [run("push", lora, uri, "--debug", "--json").output]
        said += [run("pull", uri, tmp_path / uri[:2], "--debug", "--json").output]
        said += [run("merge", lora, uri, "-o", tmp_path / "none", "--debug", "--json").output]
    said += [r.getMessage() for r in records if r.name not in ("werkzeug", "moto")]
    assert len(said) > 40
    for secret in (TOKEN, proxy.token, CREDENTIALS, "openSesame", SECRET):
        assert not [text for text in said if secret in text]


@pytest.mark.parametrize("route", ["GET /api/models/org/lora/tree", "GET /api/models/org/lora", "/resolve/"])
def test_no_redirect_of_a_hub_takes_the_token_elsewhere(hub: HubServer, tmp_path: Path, route: str) -> None:
    hub.add("org/lora", peft_files())
    other = HubServer()
    try:
        other.repos = hub.repos
        hub.faults = [Fault(route, "redirect", 99, f"{other.url}/api/models/org/lora")]
        code = run("pull", "org/lora", tmp_path / "out").exit_code
        assert code in (0, 4, 5)
        assert other.requests
        assert not [headers for _, _, headers in other.requests if "authorization" in headers]
        assert TOKEN not in str(other.requests)
    finally:
        other.close()


@pytest.mark.parametrize("match", ["POST", "HEAD", "PUT", "GET"])
def test_no_redirect_of_a_registry_takes_the_token_elsewhere(proxy: Proxy, tmp_path: Path, match: str) -> None:
    lora, other = lay(tmp_path / "lora", peft_files()), Proxy(proxy.server)
    try:
        proxy.faults = [Fault(match, "redirect", 99, f"http://{other.host}/v2/security/elsewhere/blobs/uploads/")]
        run("push", lora, f"oci://{proxy.host}/security/{match.lower()}:v1")
        assert other.requests
        assert not [headers for _, _, headers in other.requests if "authorization" in headers]
    finally:
        other.close()


def test_no_code_of_a_repository_runs(hub: HubServer, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()".encode()
    config = {"model_type": "tiny", "auto_map": {"AutoModel": "modeling_evil.Evil"}, "_attn_implementation": "org/evil"}
    evil = {"modeling_evil.py": code, "__init__.py": code, "setup.py": code, "config.json": json.dumps(config).encode()}
    hub.add("org/base", base_files() | evil)
    hub.add("org/lora", peft_files() | {"modeling_evil.py": code})
    assert run("inspect", "org/base").exit_code == 0
    assert run("pull", "org/base", tmp_path / "pulled").exit_code == 0
    assert run("merge", "org/base", "org/lora", "-o", tmp_path / "out", "--verify").exit_code == 0
    assert run("push", tmp_path / "out", "hf://org/out").exit_code == 0
    assert not (tmp_path / "ran").exists()


HOSTILE = ["../x", "a/../../x", "/abs", "C:\\x", "C:/x", "a\\b", "x\0y", "x" * 300, "nul", "", "x."]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_buckets_list_writes_nowhere_else(bucket: str, tmp_path: Path, name: str) -> None:
    import obstore

    from adapterkit.hub import parse
    from adapterkit.hub.hubs import remote_at

    told = {"state": "whole", "files": {name: {"size": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}}
    obstore.put(
        remote_at(parse(f"s3://{bucket}/x")).bucket.store, "x/.adapterkit-files.json", json.dumps(told).encode()
    )
    (tmp_path / "in").mkdir()
    assert run("pull", f"s3://{bucket}/x", tmp_path / "in" / "out").exit_code == 2
    assert list((tmp_path / "in").rglob("*")) == []


WAITS = [("hf", "/api/models/org/lora"), ("hf", "/tree/"), ("hf", "/resolve/"), ("oci", "/manifests/"),
         ("oci", "/blobs/"), ("oci", "POST"), ("oci", "PATCH"), ("oci", "PUT"), ("s3", ".adapterkit-files.json"),
         ("s3", "adapter_model"), ("hf", "/commit/"), ("hf", "/preupload/"), ("hf", "/api/repos/create"),
         ("hf", "/tag/"), ("hf", "objects/batch"), ("hf", "PUT /lfs/")]  # fmt: skip


@pytest.mark.parametrize(("kind", "route", "status"), [(*at, (429, 503)[n % 2]) for n, at in enumerate(WAITS)])
def test_who_asks_for_time_is_given_it(
    hub: HubServer, registry: str, request: pytest.FixtureRequest, tmp_path: Path, kind: str, route: str, status: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    faulty, uri = hub, "hf://org/lora"
    if kind == "oci":
        faulty = Proxy(registry)
        uri = f"oci://{faulty.host}/waits/{hashlib.sha256(f'{route}{status}'.encode()).hexdigest()[:9]}:v1"
    elif kind == "s3":
        uri = f"s3://{request.getfixturevalue('bucket')}/x"
        faulty = Proxy(request.getfixturevalue("server").removeprefix("http://"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{faulty.host}")
    lora = lay(tmp_path / "lora", peft_files())
    slept: list[float] = []
    with mock.patch("time.sleep", slept.append), mock.patch("huggingface_hub.utils._http.time.sleep", slept.append):
        if kind == "s3":
            ak.hub.push(lora, uri)
        faulty.faults = [Fault(route, "status", 1, status, {"Retry-After": "17"})]
        if kind != "s3":
            ak.hub.push(lora, uri, tag="t")
        ak.hub.pull(uri, tmp_path / "out")
    assert faulty.faults[0].times == 0, "the fault was not met"
    assert [wait for wait in slept if wait >= 17]
    assert peft_files().items() <= laid(tmp_path / "out").items()


@pytest.mark.parametrize("kind", ["hf", "oci", "s3"])
def test_offline_nothing_is_asked(
    hub: HubServer, registry: str, request: pytest.FixtureRequest, tmp_path: Path, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    uris = {"hf": "hf://org/{}", "oci": f"oci://{registry}/offline/{{}}:v1"}
    uri = uris.get(kind) or f"s3://{request.getfixturevalue('bucket')}/{{}}"
    lora = lay(tmp_path / "lora", peft_files())
    ak.hub.push(lora, uri.format("seen"))
    ak.read(uri.format("seen"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with mock.patch("time.sleep", side_effect=AssertionError("nobody waits for what may not be")):
        assert ak.read(uri.format("seen")).digest() == ak.read(lora).digest()
        with pytest.raises(NetworkError, match="offline"):
            ak.read(uri.format("unseen"))
        with pytest.raises(NetworkError, match="offline"):
            ak.hub.pull(uri.format("seen"), tmp_path / "out")


def test_what_xet_stores_comes_and_is_verified(hub: HubServer, tmp_path: Path) -> None:
    """A hub that stores by xet still lists the sha256 and sends the file itself to who asks for that."""
    files = peft_files() | {"big.bin": np.random.default_rng(1).bytes(100_000)}
    hub.xet = True
    hub.add("org/lora", files)
    pulled = record("pull", "org/lora", tmp_path / "out")
    assert laid(tmp_path / "out") == files
    assert {f["digest"].partition(":")[0] for f in pulled["files"]} == {"sha256", "git"}
    hub.faults = [Fault("big.bin", "flip", 99, 99)]
    assert run("pull", "org/lora", tmp_path / "again").exit_code == 4


@pytest.mark.parametrize(("status", "code"), [(401, "access"), (403, "access"), (404, "remote-not-found")])
@pytest.mark.parametrize("kind", ["oci", "s3"])
def test_denials_are_told_apart_with_a_cure(
    hub: HubServer, registry: str, request: pytest.FixtureRequest, tmp_path: Path, kind: str, status: int, code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kind == "oci":
        faulty = Proxy(registry)
        uri = f"oci://{faulty.host}/denied/x:v1"
    else:
        uri = f"s3://{request.getfixturevalue('bucket')}/x"
        faulty = Proxy(request.getfixturevalue("server").removeprefix("http://"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{faulty.host}")
    faulty.faults = [Fault("GET", "status", 99, status)]
    answer = record("pull", uri, tmp_path / "out", "--debug", code=5)["error"]
    faulty.close()
    assert answer["code"] == code
    assert {"oci": "login", "s3": "bucket" if status == 404 else "AWS_ACCESS_KEY_ID"}[kind] in answer["cure"]


def test_a_bucket_that_another_tool_filled_is_listed_in_spite_of_faults(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    from adapterkit.hub import parse
    from adapterkit.hub.hubs import remote_at

    for name, data in peft_files().items():
        obstore.put(remote_at(parse(f"s3://{bucket}/x")).bucket.store, f"x/{name}", data)
    proxy = Proxy(server.removeprefix("http://"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.host}")
    proxy.faults = [Fault("list-type", "status", 2, 503), Fault("list-type", "drop", 2), Fault("model.saf", "drop", 2)]
    ak.hub.pull(f"s3://{bucket}/x", tmp_path / "out")
    assert [fault.times for fault in proxy.faults] == [0, 0, 0]
    assert laid(tmp_path / "out") == peft_files()
    proxy.close()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999/", "http://[bad/", "http://127.0.0.1:x/", f"http://{'a' * 64}.b/"]
)
@pytest.mark.parametrize("place", ["redirect", "realm", "upload", "range"])
def test_what_is_no_address_is_an_error_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, place: str
) -> None:
    monkeypatch.setenv("ADAPTERKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("adapterkit.hub.web.FIRST_WAIT", 0.001)

    class Registry(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Log nothing."""

        def do_GET(self) -> None:
            status, headers = 404, {}
            if place == "redirect":
                status, headers = 307, {"Location": url}
            elif place == "realm":
                status, headers = 401, {"WWW-Authenticate": f'Bearer realm="{url.replace("http:", "https:")}"'}
            elif self.command == "POST":
                status, headers = 202, {"Location": url if place == "upload" else "/v2/x/blobs/uploads/1"}
            elif "/uploads/1" in self.path:
                status, headers = (503, {}) if self.command == "PATCH" else (204, {"Range": "0-" + "9" * 5000})
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        uri = f"oci://127.0.0.1:{server.server_port}/x:1"
        with pytest.raises(NetworkError):
            ak.hub.push(lay(tmp_path / "lora", peft_files()), uri)
        server.shutdown()

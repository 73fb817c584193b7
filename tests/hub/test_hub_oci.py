# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""OCI registries: Debian's own on loopback, with the faults of networks, and with other tools at the other end."""

import base64
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from command_line import record, run
from hub_repository import base_files, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import Fault, HubServer
from oci_registry import HTPASSWD, Proxy, distribution, registry  # noqa: F401 - a fixture
from oci_registry import PASSWORD as SECRET

import adapterkit as ak
from adapterkit.errors import AccessDenied, AdapterkitError, Corrupt, NetworkError, StorageError
from adapterkit.hub import parse
from adapterkit.hub.hubs import oci as _modelpack
from adapterkit.hub.hubs import oci as _uploads
from adapterkit.hub.hubs import remote_at
from adapterkit.hub.transfer import digests_of, fetch


@pytest.fixture
def proxy(registry: str, hub: HubServer) -> Iterator[Proxy]:
    """The registry behind a proxy that does what a test asks for."""
    made = Proxy(registry)
    yield made
    made.close()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lay(tmp_path / "lora", peft_files())


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository of a test's own."""
    return f"tests/{abs(hash(request.node.name)):x}"


def test_what_was_pushed_is_pulled_again(proxy: Proxy, name: str, lora: Path, tmp_path: Path) -> None:
    uri = f"oci://{proxy.host}/{name}:v1"
    pushed = ak.hub.push(lora, uri)
    assert pushed.created
    assert pushed.commit.startswith("sha256:")
    ak.hub.pull(uri, tmp_path / "back")
    assert {key: value for key, value in laid(tmp_path / "back").items() if key != "README.md"} == peft_files()
    assert ak.read(pushed.uri).digest() == ak.read(lora).digest()
    assert ak.read(uri).recipe[0] == ak.Step("pull", {"uri": f"oci://{proxy.host}/{name}@{pushed.commit}"})
    again = record("push", lora, uri)
    assert (again["added"], again["replaced"], again["commit"]) == ([], [], pushed.commit)
    assert record("inspect", uri)["format"] == "peft"
    assert run("diff", uri, lora).exit_code == 0


def test_a_tag_is_not_overwritten_silently(proxy: Proxy, name: str, lora: Path, tmp_path: Path) -> None:
    uri = f"oci://{proxy.host}/{name}:v1"
    first = ak.hub.push(lora, uri, tag="first")
    other = lay(tmp_path / "other", peft_files("org/another"))
    with pytest.raises(StorageError, match=r"adapter_config\.json"):
        ak.hub.push(other, uri)
    dry = ak.hub.push(other, uri, overwrite=True, dry_run=True)
    assert set(dry.replaced) == {"adapter_config.json", "README.md"}
    second = ak.hub.push(other, uri, overwrite=True)
    assert remote_at(parse(uri)).commit == second.commit
    assert remote_at(parse(f"oci://{proxy.host}/{name}:first")).commit == first.commit
    with pytest.raises(StorageError, match="points to another commit"):
        ak.hub.push(other, uri, tag="first")


def test_one_command_merges_from_one_hub_to_another(proxy: Proxy, hub: HubServer, name: str, tmp_path: Path) -> None:
    hub.add("org/base", base_files())
    hub.add("org/lora", peft_files())
    uri = f"oci://{proxy.host}/{name}:1"
    assert record("merge", "hf://org/base", "hf://org/lora", "-o", uri, "--verify")["verification"]["ok"]
    local = lay(tmp_path / "base", base_files()), lay(tmp_path / "lora", peft_files())
    ak.merge(*local, tmp_path / "local")
    ak.hub.pull(uri, tmp_path / "back")
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (tmp_path / "local" / weights).read_bytes()
    assert not list((tmp_path / "cache").glob("outgoing/*"))
    assert run("merge", "hf://org/base", "hf://org/lora", "-o", uri).exit_code == 0, "the same again is no change"
    assert run("merge", "hf://org/base", "hf://org/lora", "-o", uri, "--weight", "2").exit_code == 6
    assert run("merge", "hf://org/base", "hf://org/lora", "-o", uri, "--weight", "2", "--overwrite").exit_code == 0


@pytest.mark.skipif(shutil.which("oras") is None, reason="oras is not installed; .ci/run does that where it can")
def test_oras_reads_what_is_pushed_and_pushes_what_is_read(
    registry: str, hub: HubServer, name: str, lora: Path, tmp_path: Path
) -> None:
    pushed = ak.hub.push(lora, f"oci://{registry}/{name}:v1")
    lay(tmp_path / "theirs", {})
    (tmp_path / "theirs").mkdir(exist_ok=True)
    _tool(["oras", "pull", "--plain-http", f"{registry}/{name}:v1"], tmp_path / "theirs")
    assert {file: (tmp_path / "theirs" / file).read_bytes() for file in peft_files()} == peft_files()
    files = [f"{file}:application/octet-stream" for file in peft_files()]
    _tool(["oras", "push", "--plain-http", f"{registry}/{name}:oras", *files], lora)
    assert ak.read(f"oci://{registry}/{name}:oras").digest() == ak.read(lora).digest()
    _tool(["oras", "push", "--plain-http", f"{registry}/{name}:folder", "lora"], tmp_path)
    with pytest.raises(AdapterkitError, match="archive"):
        ak.read(f"oci://{registry}/{name}:folder")
    assert pushed.commit in _tool(["oras", "resolve", "--plain-http", f"{registry}/{name}:v1"], tmp_path)


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed; .ci/run does that where it can")
def test_skopeo_copies_what_is_pushed(registry: str, hub: HubServer, name: str, lora: Path, tmp_path: Path) -> None:
    ak.hub.push(lora, f"oci://{registry}/{name}:v1")
    plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
    places = [f"docker://{registry}/{name}:v1", f"docker://{registry}/{name}-copy:v2"]
    _tool(["skopeo", "copy", "--insecure-policy", *plain, *places], tmp_path)
    assert ak.read(f"oci://{registry}/{name}-copy:v2").digest() == ak.read(lora).digest()
    told = json.loads(_tool(["skopeo", "inspect", "--raw", "--tls-verify=false", places[0]], tmp_path))
    assert told["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert told["layers"][0]["annotations"]["org.cncf.model.filepath"] == "README.md"


def _tool(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env={**os.environ, "HOME": str(folder)})
    assert done.returncode == 0, done.stderr
    return done.stdout


PULL = [
    ("/blobs/", "truncate", 100), ("/blobs/", "truncate", 0), ("/blobs/", "drop", None), ("/blobs/", "status", 503),
    ("/blobs/", "status", 429), ("/blobs/", "flip", 1234), ("/manifests/", "status", 503),
    ("/manifests/", "drop", None), ("/manifests/", "flip", 77), ("/manifests/", "truncate", 10),
]  # fmt: skip


@pytest.mark.parametrize(("match", "kind", "value"), PULL)
def test_faults_in_a_pull_are_overcome(
    proxy: Proxy, registry: str, lora: Path, tmp_path: Path, match: str, kind: str, value: object, name: str
) -> None:
    ak.hub.push(lora, f"oci://{registry}/{name}:v1")
    proxy.faults = [Fault(match, kind, 2, value, {"Retry-After": "0"})]
    ak.hub.pull(f"oci://{proxy.host}/{name}:v1", tmp_path / "out")
    assert proxy.faults[0].times == 0, "the fault was not met"
    assert peft_files().items() <= laid(tmp_path / "out").items()


PUSH = [
    ("PATCH", "drop", None), ("PATCH", "after", None), ("PATCH", "status", 503), ("POST", "drop", None),
    ("POST", "status", 429), ("PUT /v2/{}/blobs/uploads", "after", None), ("PUT /v2/{}/blobs/uploads", "drop", None),
    ("PUT /v2/{}/blobs/uploads", "status", 503), ("PUT /v2/{}/manifests", "drop", None),
    ("PUT /v2/{}/manifests", "after", None), ("PUT /v2/{}/manifests", "status", 502), ("HEAD", "status", 503),
    ("HEAD", "drop", None),
]  # fmt: skip


@pytest.mark.parametrize(("match", "kind", "value"), PUSH)
def test_faults_in_a_push_are_overcome(
    proxy: Proxy, lora: Path, tmp_path: Path, match: str, kind: str, value: object, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(_uploads, "UPLOAD_CHUNK", 50_000)
    lay(lora, {"more.safetensors": np.random.default_rng(1).bytes(230_000)})
    (lora / "more.safetensors").rename(lora / "notes.txt")
    proxy.faults = [Fault(match.format(name), kind, 2, value, {"Retry-After": "0"})]
    ak.hub.push(lora, f"oci://{proxy.host}/{name}:v1")
    assert proxy.faults[0].times == 0, "the fault was not met"
    ak.hub.pull(f"oci://{proxy.host}/{name}:v1", tmp_path / "out")
    assert laid(lora).items() <= laid(tmp_path / "out").items()


def test_only_the_lost_chunk_is_sent_again_by_another_process_too(
    proxy: Proxy, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_uploads, "UPLOAD_CHUNK", 1 << 20)
    blob = np.random.default_rng(2).bytes(5 << 20)
    remote, digest = remote_at(parse(f"oci://{proxy.host}/{name}:v1")), digests_of(blob)[1]
    file = lay(tmp_path / "in", {"blob": blob}) / "blob"

    class Killed(BaseException):
        """What no handler catches."""

    real, calls = _uploads._patch, []

    def patch(*words: object) -> str:
        calls.append(words)
        if len(calls) == 4:
            raise Killed
        return real(*words)

    monkeypatch.setattr(_uploads, "_patch", patch)
    with pytest.raises(Killed):
        _uploads.upload(remote, file, len(blob), digest)
    monkeypatch.setattr(_uploads, "_patch", real)
    _uploads.upload(remote_at(remote.uri), file, len(blob), digest)
    assert proxy.received == len(blob), "three chunks, and then the two that were missing"
    assert not list((tmp_path / "cache" / "uploads").iterdir())


def test_flipped_bits_are_found(proxy: Proxy, registry: str, name: str, lora: Path, tmp_path: Path) -> None:
    ak.hub.push(lora, f"oci://{registry}/{name}:v1")
    remote, draw = remote_at(parse(f"oci://{proxy.host}/{name}:v1")), random.Random(4)
    for trial in range(20):
        file = remote.files[trial % 3]
        proxy.faults = [Fault("/blobs/", "flip", 3, draw.randrange(8 * file.size))]
        with pytest.raises(Corrupt):
            fetch(remote, file, tmp_path / "part", lambda _: None)
    proxy.faults = [Fault("/manifests/", "flip", 99, 77)]
    with pytest.raises((Corrupt, NetworkError)) as met:
        _ = remote_at(remote.uri).commit
    assert met.value.exit_code == 4


def test_an_observer_never_sees_half_a_tag(proxy: Proxy, name: str, lora: Path) -> None:
    uri, seen = f"oci://{proxy.host}/{name}:v1", []

    def look(line: str) -> None:
        if line.startswith(("POST", "PATCH", "PUT")):
            place = Request(f"http://{proxy.server}/v2/{name}/manifests/v1", headers={"Accept": _modelpack.MANIFEST})
            try:
                with urlopen(place) as answer:
                    layers = json.loads(answer.read())["layers"]
            except HTTPError as error:
                error.close()
                seen.append(None)
                return
            for layer in layers:
                urlopen(Request(f"http://{proxy.server}/v2/{name}/blobs/{layer['digest']}", method="HEAD")).close()
            seen.append(tuple(layer["digest"] for layer in layers))

    proxy.seen = look
    ak.hub.push(lora, uri)
    assert seen
    assert set(seen) == {None}, "before the last request there is no tag"
    (lora / "adapter_config.json").write_bytes(peft_files("org/another")["adapter_config.json"])
    before = tuple(file.digest for file in remote_at(parse(uri)).files)
    seen.clear()
    ak.hub.push(lora, uri, overwrite=True)
    assert set(seen) == {before}, "until the last request the tag is what it was"


def _manifest(registry: str, name: str, layers: list[dict[str, object]], tag: str = "bad") -> str:
    """Sets a tag to a manifest that no tool would write; its blobs are there."""
    remote = remote_at(parse(f"oci://{registry}/{name}:{tag}"))
    for blob in (b"{}", b"x"):
        _uploads.upload(remote, blob, len(blob), digests_of(blob)[1])
    config = {"mediaType": "application/x", "digest": digests_of(b"{}")[1], "size": 2}
    told = {"schemaVersion": 2, "mediaType": _modelpack.MANIFEST, "config": config, "layers": layers}
    remote._set(tag, json.dumps(told).encode())
    return str(remote.uri)


def _layer(**more: object) -> dict[str, object]:
    return {"mediaType": "application/x", "digest": digests_of(b"x")[1], "size": 1, **more}


@pytest.mark.parametrize("file", ["../x", "/abs", "C:\\x", "C:/x", "a/../../x", "x" * 300, "nul", ""])
def test_names_that_would_leave_the_folder_are_refused(
    registry: str, hub: HubServer, name: str, tmp_path: Path, file: str
) -> None:
    uri = _manifest(registry, name, [_layer(annotations={"org.opencontainers.image.title": file})])
    (tmp_path / "in").mkdir()
    assert run("pull", uri, tmp_path / "in" / "out").exit_code == 2
    assert list((tmp_path / "in").rglob("*")) == []


def test_no_address_of_a_manifest_is_followed(registry: str, hub: HubServer, name: str, tmp_path: Path) -> None:
    named = {"annotations": {"org.opencontainers.image.title": "x"}, "urls": [f"{hub.url}/secret"]}
    ak.hub.pull(_manifest(registry, name, [_layer(**named)]), tmp_path / "out")
    assert laid(tmp_path / "out") == {"x": b"x"}
    assert hub.requests == []


def test_layers_without_names_are_no_files(registry: str, hub: HubServer, name: str, tmp_path: Path) -> None:
    assert run("pull", _manifest(registry, name, [_layer()]), tmp_path / "out").exit_code == 3


@pytest.mark.parametrize(
    ("uri", "code", "exit_code"),
    [
        ("oci://{}/tests/none:v1", "remote-not-found", 5), ("oci://{}/tests/none", "remote-not-found", 5),
        ("oci://127.0.0.1:1/tests/x:v1", "network", 5), ("oci://{}", "usage", 2), ("oci://{}/UPPER:v1", "usage", 2),
        ("oci://{}/x:a b", "usage", 2), ("oci://user:password@host/x:1", "usage", 2), ("oci://{}/../x:1", "usage", 2),
        ("ocy://{}/x:1", "usage", 2),
    ],
)  # fmt: skip
def test_what_cannot_be_found_is_told_apart(
    registry: str, hub: HubServer, tmp_path: Path, uri: str, code: str, exit_code: int
) -> None:
    answer = record("pull", uri.format(registry), tmp_path / "out", code=exit_code)["error"]
    assert answer["code"] == code
    assert answer["cure"]


def test_who_is_not_let_in_is_told_how(
    hub: HubServer, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path, {"htpasswd": HTPASSWD.encode()})
    auth = f"auth: {{htpasswd: {{realm: here, path: {tmp_path / 'htpasswd'}}}}}\n"
    with distribution(tmp_path / "closed", auth) as host:
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
        result = run("push", lora, f"oci://{host}/x:1", "--json", "--debug")
        assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (5, "access")
        assert "oras login" in result.output
        told = {"auths": {host: {"auth": base64.b64encode(f"somebody:{SECRET}".encode()).decode()}}}
        lay(tmp_path / "docker", {"config.json": json.dumps(told).encode()})
        result = run("push", lora, f"oci://{host}/x:1", "--json")
        assert result.exit_code == 0, result.output
        assert SECRET not in result.output
        assert ak.hub.pull(f"oci://{host}/x:1", tmp_path / "out").fetched > 0
        with pytest.raises(AccessDenied) as met:
            ak.hub.pull(f"oci://{host}/x:1", tmp_path / "wrong", token=f"somebody:{SECRET}no")
        assert SECRET not in str(met.value)


def test_a_registrys_digest_is_what_a_manifest_is_held_against(registry: str, hub: HubServer, name: str) -> None:
    uri = _manifest(registry, name, [_layer(annotations={"org.opencontainers.image.title": "x"})])
    commit = remote_at(parse(uri)).commit
    pinned = parse(f"oci://{registry}/{name}@{commit}")
    assert remote_at(pinned).commit == commit
    assert str(pinned) == f"oci://{registry}/{name}@{commit}"


def test_docker_hub_is_called_by_other_names(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {"config.json": json.dumps({"auths": {"https://index.docker.io/v1/": {"auth": "eDp5"}}}).encode()})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    remote = remote_at(parse("oci://docker.io/org/lora:v1"))
    assert remote.url == "https://registry-1.docker.io/v2/org/lora"
    assert remote.admission.known
    assert not remote_at(parse("oci://ghcr.io/org/lora:v1")).admission.known


@pytest.fixture
def guarded(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A registry that wants a token, and credentials that are changed for one."""
    proxy.token, proxy.credentials = "tokenOfTheRegistry", base64.b64encode(f"somebody:{SECRET}".encode()).decode()
    told = {"auths": {proxy.host: {"auth": proxy.credentials}}}
    lay(tmp_path / "docker", {"config.json": json.dumps(told).encode()})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    return proxy


def test_credentials_are_changed_for_a_token(guarded: Proxy, name: str, lora: Path, tmp_path: Path) -> None:
    uri = f"oci://{guarded.host}/{name}:1"
    result = run("push", lora, uri, "--json")
    assert result.exit_code == 0, result.output
    assert not {guarded.token, guarded.credentials, SECRET} & set(result.output.split('"'))
    ak.hub.pull(uri, tmp_path / "out")
    with_basic = [path for _, path, headers in guarded.requests if "Basic" in headers.get("authorization", "")]
    assert all(path.startswith("/token") for path in with_basic)
    guarded.credentials = "bm9ib2R5Om5vdGhpbmc="
    result = run("pull", uri, tmp_path / "again", "--json", "--debug")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (5, "access")
    for secret in (guarded.token, SECRET, base64.b64encode(f"somebody:{SECRET}".encode()).decode()):
        assert secret not in result.output


@pytest.mark.parametrize("realm", ["http://example.org/token", "file:///etc/passwd", "//example.org"])
def test_credentials_go_nowhere_unsafe(guarded: Proxy, name: str, lora: Path, realm: str) -> None:
    guarded.realm = realm
    result = run("push", lora, f"oci://{guarded.host}/{name}:1", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["code"]) == (5, "network")
    assert "does not use https" in result.output


def test_a_redirect_to_another_origin_carries_no_token(
    guarded: Proxy, registry: str, name: str, lora: Path, tmp_path: Path
) -> None:
    uri = f"oci://{guarded.host}/{name}:1"
    ak.hub.push(lora, uri)
    other = Proxy(registry)
    try:
        (file,) = [f for f in remote_at(parse(uri)).files if f.path == "adapter_model.safetensors"]
        place = f"http://{other.host}/v2/{name}/blobs/{file.digest}"
        guarded.faults = [Fault(file.digest, "redirect", 9, place)]
        ak.hub.pull(uri, tmp_path / "out")
        ((_, _, headers),) = other.requests
        assert "authorization" not in headers
    finally:
        other.close()
    assert peft_files().items() <= laid(tmp_path / "out").items()

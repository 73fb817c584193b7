# ruff: noqa: F811, ARG001 - fixtures are imported and then named
"""Buckets, file systems that fsspec knows, and hubs of third parties."""

import json
import os
import subprocess
import sys
from datetime import UTC
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
from bucket_server import SECRET, bucket, server  # noqa: F401 - fixtures
from command_line import record, run
from hub_repository import hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import Fault, HubServer
from oci_registry import Proxy

import adapterkit as ak
from adapterkit.errors import Corrupt, NetworkError, StorageError
from adapterkit.hub import parse
from adapterkit.hub.hubs import remote_at

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return lay(tmp_path / "lora", peft_files())


def test_what_was_pushed_to_a_bucket_is_pulled_again(bucket: str, lora: Path, tmp_path: Path) -> None:
    uri = f"s3://{bucket}/models/lora"
    pushed = record("push", lora, uri)
    assert pushed["added"] == [f"models/lora/{name}" for name in sorted({*peft_files(), "README.md"})]
    assert SECRET not in json.dumps(pushed)
    result = record("pull", uri, tmp_path / "out")
    assert all(file["digest"].startswith("sha256:") for file in result["files"])
    assert peft_files().items() <= laid(tmp_path / "out").items()
    assert ak.read(uri).digest() == ak.read(lora).digest() == ak.read(pushed["uri"]).digest()
    assert record("inspect", f"{uri}/adapter_model.safetensors")["format"] == "peft"
    assert record("push", lora, uri)["added"] == []
    other = lay(tmp_path / "other", peft_files("org/another"))
    with pytest.raises(StorageError, match=r"adapter_config\.json"):
        ak.hub.push(other, uri)
    replaced = {"models/lora/adapter_config.json", "models/lora/README.md"}
    assert set(ak.hub.push(other, uri, overwrite=True).replaced) == replaced
    with pytest.raises(NetworkError, match="have changed since"):
        ak.hub.pull(pushed["uri"], tmp_path / "old")


def test_files_in_parts(bucket: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.hub.hubs.s3.MULTIPART", 1 << 20)
    lay(lora, {"more.txt": np.random.default_rng(1).bytes(20 << 20)})
    ak.hub.push(lora, f"s3://{bucket}/x")
    ak.hub.pull(f"s3://{bucket}/x", tmp_path / "out")
    assert laid(lora).items() <= laid(tmp_path / "out").items()


@pytest.mark.parametrize("route", ["?uploads", "?partNumber=2", "?uploadId"])
@pytest.mark.parametrize("kind", ["drop", "after", "for good"])
def test_faults_of_an_upload_in_parts(
    bucket: str, server: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str, kind: str
) -> None:
    monkeypatch.setattr("adapterkit.hub.hubs.s3.MULTIPART", 1 << 20)
    monkeypatch.setattr("adapterkit.hub.hubs.s3.CHUNK", 5 << 20)
    lay(lora, {"more.txt": np.random.default_rng(1).bytes(11 << 20)})
    proxy, uri = Proxy(server.removeprefix("http://")), f"s3://{bucket}/x"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.host}")
    try:
        what = "status" if kind == "for good" else kind
        proxy.faults = [Fault(f"more.txt{route}", what, 99 if kind == "for good" else 1, 503)]
        code = run("push", lora, uri).exit_code
        assert proxy.faults[0].times < 99
        proxy.faults = []
        if kind == "for good":
            assert code == 5
            assert run("pull", uri, tmp_path / "half").exit_code == 5
            code = run("push", lora, uri).exit_code
        assert code == 0
        ak.hub.pull(uri, tmp_path / "out")
        assert laid(lora).items() <= laid(tmp_path / "out").items()
    finally:
        proxy.close()


def test_nobody_takes_half_of_a_push_for_the_whole(
    bucket: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.hub.hubs.s3 import S3

    uri, seen, real = f"s3://{bucket}/x", [], S3._put

    def put(remote: S3, name: str, content: object) -> None:
        for _ in range(2):
            with pytest.raises(NetworkError, match="is not finished"):
                _ = remote_at(parse(uri)).files
            seen.append(name)
            real(remote, name, content)
        if len(seen) == 4:
            raise Corrupt("the line was cut")

    monkeypatch.setattr(S3, "_put", put)
    with pytest.raises(Corrupt):
        ak.hub.push(lora, uri)
    assert run("pull", uri, tmp_path / "out").exit_code == 5
    ak.hub.push(lora, uri)
    monkeypatch.setattr(S3, "_put", real)
    assert ak.read(uri).digest() == ak.read(lora).digest()
    assert len(seen) == 10


def test_of_two_pushes_at_once_one_is_refused(bucket: str, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.hub.hubs.s3 import S3

    uri, real = f"s3://{bucket}/x", S3._claim

    def claim(remote: S3, before: object) -> object:
        monkeypatch.setattr(S3, "_claim", real)
        ak.hub.push(lora, uri)
        return real(remote, before)

    monkeypatch.setattr(S3, "_claim", claim)
    with pytest.raises(NetworkError, match="in the meantime"):
        ak.hub.push(lora, uri)
    assert ak.read(uri).digest() == ak.read(lora).digest()


def test_a_push_after_an_interrupted_one_lists_what_is_stored(
    bucket: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.hub.hubs.s3 import S3

    uri, real, first = f"s3://{bucket}/x", S3._put, {"notes.txt": b"version 1", "other.txt": b"version 1"}
    ak.hub.push(lay(lora, first), uri)
    lay(lora, {"notes.txt": b"version 2"})

    def put(remote: S3, name: str, content: object) -> None:
        real(remote, name, content)
        raise Corrupt("the line was cut")

    with monkeypatch.context() as patch:
        patch.setattr(S3, "_put", put)
        with pytest.raises(Corrupt):
            ak.hub.push(lora, uri, overwrite=True)
    lay(lora, first)
    with pytest.raises(StorageError, match=r"x/notes\.txt"):
        ak.hub.push(lora, uri)
    assert ak.hub.push(lora, uri, overwrite=True).replaced == ("x/notes.txt",)
    ak.hub.pull(uri, tmp_path / "out")
    assert first.items() <= laid(tmp_path / "out").items()


def test_a_push_that_changes_nothing_ends_an_interrupted_one(
    bucket: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.hub.hubs.s3 import S3

    uri = f"s3://{bucket}/x"
    ak.hub.push(lora, uri)
    lay(lora, {"more.txt": b"more"})
    with monkeypatch.context() as patch:
        patch.setattr(S3, "_put", lambda *_: (_ for _ in ()).throw(Corrupt("the line was cut")))
        with pytest.raises(Corrupt):
            ak.hub.push(lora, uri)
    (lora / "more.txt").unlink()
    assert ak.hub.push(lora, uri).added == ()
    ak.hub.pull(uri, tmp_path / "out")
    assert laid(lora).items() <= laid(tmp_path / "out").items()


def test_a_push_that_was_overtaken_uploads_no_more_files(
    bucket: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.hub.hubs.s3 import S3

    uri, real = f"s3://{bucket}/x", S3.place
    other = lay(tmp_path / "other", peft_files("org/another") | {"z.txt": b"other"})
    lay(lora, {"z.txt": b"lora"})

    def place(remote: S3, name: str, content: object, digests: object) -> object:
        done = real(remote, name, content, digests)
        monkeypatch.setattr(S3, "place", real)
        ak.hub.push(other, uri)
        return done

    monkeypatch.setattr(S3, "place", place)
    with pytest.raises(NetworkError, match="in the meantime"):
        ak.hub.push(lora, uri)
    ak.hub.pull(uri, tmp_path / "out")
    assert laid(other).items() <= laid(tmp_path / "out").items()


def test_a_file_that_was_under_way_when_another_push_came_is_in_no_list(
    bucket: str, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.hub.hubs.s3 import S3

    uri, real = f"s3://{bucket}/x", S3._put
    other = lay(tmp_path / "other", peft_files("org/another") | {"z.txt": b"other"})
    lay(lora, {"z.txt": b"lora"})

    def put(remote: S3, name: str, content: object) -> None:
        if name.endswith("z.txt"):
            monkeypatch.setattr(S3, "_put", real)
            ak.hub.push(other, uri, overwrite=True)
        real(remote, name, content)

    monkeypatch.setattr(S3, "_put", put)
    with pytest.raises(NetworkError, match="in the meantime"):
        ak.hub.push(lora, uri)
    with pytest.raises(NetworkError, match="is not finished"):
        ak.hub.pull(uri, tmp_path / "out")
    assert ak.hub.push(other, uri, overwrite=True).replaced == ("x/z.txt",)
    ak.hub.pull(uri, tmp_path / "out")
    assert laid(other).items() <= laid(tmp_path / "out").items()


def test_flipped_bits_in_a_bucket_are_found(bucket: str, server: str, lora: Path, tmp_path: Path) -> None:
    import obstore

    uri = f"s3://{bucket}/x"
    ak.hub.push(lora, uri)
    data = bytearray(peft_files()["adapter_model.safetensors"])
    data[99] ^= 4
    obstore.put(remote_at(parse(uri)).bucket.store, "x/adapter_model.safetensors", bytes(data))
    assert run("pull", uri, tmp_path / "out").exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_tool_filled(bucket: str, lora: Path, tmp_path: Path) -> None:
    import obstore

    store = remote_at(parse(f"s3://{bucket}/x")).bucket.store
    for name, data in peft_files().items():
        obstore.put(store, f"theirs/{name}", data)
    assert ak.read(f"s3://{bucket}/theirs").digest() == ak.read(lora).digest()
    assert "verified by size alone" in run("pull", f"s3://{bucket}/theirs", tmp_path / "out").output


def test_a_list_comes_in_pages_and_is_waited_for(
    bucket: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    monkeypatch.setattr("adapterkit.hub.hubs.s3.PAGE", 2)
    files = {"a b+c%20.txt": b"1", "d/é&x=1.txt": b"2", "e.txt": b"3", "f.txt": b"4", "g.txt": b""}
    store = remote_at(parse(f"s3://{bucket}")).bucket.store
    for name, data in (files | {"other/x": b"no"}).items():
        obstore.put(store, name if name == "other/x" else f"theirs/{name}", data)
    urlopen(Request(f"{server}/{bucket}/theirs/", method="PUT")).close()
    proxy, waits = Proxy(server.removeprefix("http://")), list[float]()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{proxy.host}")
    monkeypatch.setattr("adapterkit.hub.web.time.sleep", waits.append)
    proxy.faults = [Fault("list-type", "status", 2, 503, {"Retry-After": "47"}), Fault("continuation", "drop")]
    try:
        ak.hub.pull(f"s3://{bucket}/theirs", tmp_path / "out")
    finally:
        proxy.close()
    assert laid(tmp_path / "out") == files, "a mark that stands for a folder is no file"
    assert [wait for wait in waits if wait >= 47] == [47, 47]
    assert sum("list-type" in path for _, path, _ in proxy.requests) == 6, "three pages; three times again"


def test_addresses_of_lists_are_signed_as_aws_signs(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto takes any signature: botocore's says what it has to be."""
    from datetime import datetime

    from botocore import auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    from adapterkit.hub.hubs import s3 as _bucket

    asked = []

    def answered(method: str, url: str, *_: object) -> object:
        asked.append(url)
        raise ConnectionError

    monkeypatch.setattr(_bucket, "answered", answered)
    with pytest.raises(ConnectionError):
        remote_at(parse(f"s3://{bucket}")).bucket.page({"list-type": "2", "prefix": "a b/é&c=%d+", "delimiter": "/"})
    address, signature = asked[0].rsplit("&X-Amz-Signature=", 1)
    when = datetime.strptime(parse_qs(urlsplit(address).query)["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ")
    request = AWSRequest("GET", address.partition("&X-Amz-")[0])
    monkeypatch.setattr(auth, "get_current_datetime", lambda *_, **__: when.replace(tzinfo=UTC))
    auth.S3SigV4QueryAuth(Credentials("key", SECRET), "s3", "us-east-1", expires=900).add_auth(request)
    assert request.url.rsplit("X-Amz-Signature=", 1)[1] == signature


@pytest.mark.parametrize(("path", "exit_code"), [("none", 5), ("../x", 2), ("a//b", 2), ("x" * 300, 2)])
def test_places_that_are_none(bucket: str, tmp_path: Path, path: str, exit_code: int) -> None:
    result = run("pull", f"s3://{bucket}/{path}", tmp_path / "out", "--debug")
    assert result.exit_code == exit_code, result.output
    assert SECRET not in result.output


def test_without_obstore_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    answer = record("pull", "s3://bucket/x", tmp_path / "out", code=3)["error"]
    assert "adapterkit[s3]" in answer["cure"]


@pytest.mark.parametrize("listing", [True, False])
@pytest.mark.parametrize("sign", ["Last-Modified", "ETag", "modify", "modificationTime", "sha", "last_modified"])
def test_files_of_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str, listing: bool) -> None:
    """fsspec's file system for web servers gives sizes and dates only for single files.

    An adapter that was trained again usually has the same size.
    """
    from fsspec.implementations.memory import MemoryFileSystem

    class Web(MemoryFileSystem):
        store, pseudo_dirs, protocol = {}, [""], "http"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(path.removeprefix("http:/"))

        def info(self, path: str, **_: object) -> dict:
            entry = super().info(path)
            return {"name": entry["name"], "type": entry["type"], "size": entry["size"], sign: entry.get("created")}

        def find(self, path: str, **_: object) -> dict:
            return {path: {}} if self.isfile(path) else {each["name"]: each for each in self.ls(path)}

        def ls(self, path: str, **_: object) -> list:
            if not listing:
                raise FileNotFoundError(path)
            return [{"name": e["name"], "size": None, "type": e["type"]} for e in super().ls(path)]

    monkeypatch.setenv("ADAPTERKIT_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "http", Web)
    monkeypatch.setattr("adapterkit.hub.reading.FRESH", -1.0)
    # No request leaves this process, so the case also runs where HF_HUB_OFFLINE is set.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Web.clear_instance_cache()
    name, system = "adapter_model.safetensors", Web()
    for path, data in peft_files().items():
        system.pipe(f"/host:8000/{path}", data)
    uri = f"http://host:8000/{name}"
    first = ak.hub.pull(uri, tmp_path / "first")
    assert (tmp_path / "first" / name).read_bytes() == peft_files()[name]
    changed = bytearray(peft_files()[name])
    changed[-1] ^= 1
    system.pipe(f"/host:8000/{name}", bytes(changed))
    assert ak.hub.pull(uri, tmp_path / "again").uri != first.uri
    if listing:
        read = ak.read(uri)
        changed[-1] ^= 2
        system.pipe(f"/host:8000/{name}", bytes(changed))
        assert ak.read(uri).digest() != read.digest()


def test_modelscope_without_its_client_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    answer = record("pull", "modelscope://org/repo", tmp_path / "out", code=3)["error"]
    assert "modelscope-hub" in answer["cure"]


def test_what_fsspec_knows_is_read(hub: HubServer, lora: Path, tmp_path: Path) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    for name, data in peft_files().items():
        system.pipe(f"/things/lora/{name}", data)
    assert ak.read("memory://things/lora").digest() == ak.read(lora).digest()
    assert run("diff", "memory://things/lora", lora).exit_code == 0
    assert run("push", lora, "memory://things/new").exit_code == 3
    assert run("pull", "memory://things/none", tmp_path / "out").exit_code == 5
    assert run("pull", "file:///etc/passwd", tmp_path / "out").exit_code == 2


HUB = """
from contextlib import contextmanager
from adapterkit.hub import Remote, RemoteFile, Uri

FILES = {FILES}

class Acme(Remote):
    form = "acme://name"
    commit = "1"

    @classmethod
    def named(cls, rest):
        return Uri(rest, None, "", "acme")

    def listed(self):
        import hashlib
        return [RemoteFile(n, len(d), "sha256:" + hashlib.sha256(d).hexdigest()) for n, d in FILES.items()]

    @contextmanager
    def opened(self, file, start, end):
        yield start, iter([FILES[file.path][start:end]])

    def passing(self, error):
        return None

    def failure(self, error):
        return None
"""


def test_a_third_partys_hub_is_one_of_them(lora: Path, tmp_path: Path) -> None:
    info = {"METADATA": b"Metadata-Version: 2.1\nName: acme\nVersion: 1\n"}
    info["entry_points.txt"] = b"[adapterkit.hubs]\nacme = acme:Acme\n"
    lay(tmp_path / "site" / "acme-1.dist-info", info)
    lay(tmp_path / "site", {"acme.py": HUB.replace("{FILES}", repr(peft_files())).encode()})
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'site'}",
        "ADAPTERKIT_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "adapterkit"]
    subprocess.run([*command, "pull", "acme://thing", str(tmp_path / "out")], env=env, check=True)
    assert laid(tmp_path / "out") == peft_files()
    done = subprocess.run([*command, "diff", "acme://thing", str(lora)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pushed = subprocess.run([*command, "push", str(lora), "acme://thing2"], env=env, capture_output=True, text=True)
    assert pushed.returncode in (3, 6), pushed.stderr

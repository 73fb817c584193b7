# ruff: noqa: F811 - fixtures are imported and then named
"""A merge on three nodes without a shared disk: inputs and output are in stores, no weights go through the driver."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bucket_server import SECRET, server  # noqa: F401 - a fixture
from hub_repository import laid
from hub_server import TOKEN, HubServer
from links import Link
from merges import lora, rand, save_base
from oci_registry import BINARY, HTPASSWD, PASSWORD, distribution
from quantized_vectors import adapter_for
from ray_nodes import Nodes, driver, nodes_of

import adapterkit as ak
from adapterkit.hub.hubs import parse, remote_at

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")

SHARDS, ROWS, COLUMNS = 12, 1500, 1000
SHARD = 2 * ROWS * COLUMNS


class Place:
    """A store, a link to it for the driver and for each node, and a cluster of nodes."""

    def __init__(self, root: Path, server: str) -> None:
        self.root, self.links, self.hub = root, [Link(server, 4e6) for _ in range(4)], HubServer()
        self.settings = {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1", "AWS_ENDPOINT_URL": server, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_ENDPOINT": self.hub.url, "HF_TOKEN": TOKEN,
        }  # fmt: skip
        self.own = [{"AWS_ENDPOINT_URL": f"http://{link.host}"} for link in self.links]
        self.nodes: Nodes = None  # type: ignore[assignment]

    def start(self, *words: object, **more: str) -> subprocess.Popen[str]:
        return driver(self.nodes, {**self.own[0], **more}, *words)

    def merge(self, *words: object, **more: str) -> dict[str, Any]:
        """Return the command's JSON output and its exit code."""
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=300)
        assert out.startswith("{"), err[-3000:]
        assert SECRET not in out + err
        return {**json.loads(out), "exit_code": process.returncode}


@pytest.fixture(scope="module")
def place(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    import urllib.request

    here = Place(tmp_path_factory.mktemp("nodes"), server)
    urllib.request.urlopen(urllib.request.Request(f"{server}/models", method="PUT")).close()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in here.settings.items():
            patch.setenv(name, value)
        patch.setenv("ADAPTERKIT_CACHE", str(here.root / "local"))
        tensors = {f"layers.{i}.q.weight": rand(ROWS, COLUMNS, seed=i).bfloat16() for i in range(SHARDS)}
        base = save_base(here.root / "base", tensors, shards=SHARDS)
        targets = {ak.Target(f"layers.{i}.q"): (lora(ROWS, COLUMNS),) for i in range(SHARDS - 1)}
        ak.write(ak.Adapter(targets), here.root / "lora.safetensors")
        ak.hub.push(base, "s3://models/base")
        ak.hub.push(here.root / "lora.safetensors", "s3://models/lora")
        # Merge with the local engine. Then remove all local files, so that no node reads them by mistake.
        ak.merge("s3://models/base", "s3://models/lora", here.root / "expected", stream=True)
        here.expected = made(here.root / "expected")  # type: ignore[attr-defined]
        for folder in ("base", "local", "expected"):
            subprocess.run(["rm", "-r", str(here.root / folder)], check=True)
        with nodes_of(here.root, here.settings, here.own[1:]) as here.nodes:
            yield here
    here.hub.close()


def made(folder: Path) -> dict[str, bytes]:
    """Return the files of a merge, without the card, which a push replaces."""
    return {name: data for name, data in laid(folder).items() if name not in ("README.md", ".gitattributes")}


def pulled(uri: str, folder: Path) -> dict[str, bytes]:
    ak.hub.pull(uri, folder)
    return made(folder)


def put(name: str) -> int:
    """Return the number of weight files that tasks have uploaded to a folder of the bucket."""
    bucket = remote_at(parse("s3://models/base")).bucket  # type: ignore[attr-defined]
    found = bucket.page({"list-type": "2", "prefix": f"{name}/"}).decode()
    return int(found.count(".safetensors</Key>"))


def wait_for(process: subprocess.Popen[str], name: str, count: int) -> None:
    """Wait until tasks have uploaded some weight files."""
    while put(name) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_no_weight_passes_the_driver_and_no_folder_is_shared(place: Place, tmp_path: Path) -> None:
    before = [(link.received, link.sent) for link in place.links]
    told = place.merge("s3://models/base", "s3://models/lora", "-o", "s3://models/out")
    assert told["exit_code"] == 0, told
    assert pulled("s3://models/out", tmp_path / "out") == place.expected
    received, sent = zip(
        *((link.received - r, link.sent - s) for link, (r, s) in zip(place.links, before, strict=True)), strict=True
    )
    adapter = (place.root / "lora.safetensors").stat().st_size
    assert received[0] < adapter + SHARD / 2, "headers and the adapter"
    assert sent[0] < SHARD / 2
    assert sum(received[1:]) < SHARDS * SHARD + 3 * (adapter + SHARD), "each byte of the base once"
    assert SHARDS * SHARD < sum(sent[1:]) < (SHARDS + 1) * SHARD
    for number in range(3):
        opened = place.nodes.opened(number)
        own = [place.root / f"node{number}", place.root / "hook"]
        assert opened, "a node did nothing"
        assert not [path for path in opened if not any(path.is_relative_to(folder) for folder in own)]
    assert not list(place.root.glob("node*/cache/scratch/*/made"))
    again = place.merge("s3://models/base", "s3://models/lora", "-o", "s3://models/out")
    assert again["already_done"]
    assert place.merge("s3://models/base", "s3://models/lora", "-o", "s3://models/base")["exit_code"] == 6


def test_a_driver_killed_and_resumed(place: Place, tmp_path: Path) -> None:
    process = place.start("s3://models/base", "s3://models/lora", "-o", "s3://models/resumed")
    wait_for(process, "resumed", 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(ak.errors.NetworkError, match="not finished"):
        ak.hub.pull("s3://models/resumed", tmp_path / "half")
    sent = sum(link.sent for link in place.links)
    told = place.merge("s3://models/base", "s3://models/lora", "-o", "s3://models/resumed")
    assert len(told["resumed"]) >= 3
    assert sum(link.sent for link in place.links) - sent < (SHARDS - len(told["resumed"]) + 1) * SHARD
    assert pulled("s3://models/resumed", tmp_path / "out") == place.expected


def test_ranges_of_files_and_checksums(place: Place, tmp_path: Path) -> None:
    words = ["s3://models/base", "s3://models/lora", "--shard-size", "5MB", "--checksums"]
    received = sum(link.received for link in place.links)
    told = place.merge(*words, "-o", "s3://models/small")
    assert told["exit_code"] == 0, told
    assert sum(link.received for link in place.links) - received < (SHARDS + 3) * SHARD
    ak.merge(*words[:2], tmp_path / "local", stream=True, shard_size=5_000_000, checksums=True)
    assert pulled("s3://models/small", tmp_path / "out") == made(tmp_path / "local")


@pytest.mark.parametrize("choice", ["requantize", "dequantize"])
def test_a_quantized_base(place: Place, choice: str, tmp_path: Path) -> None:
    case = Path(__file__).parents[2] / "spec" / "vectors" / "quant" / "gptq" / "four"
    adapter, _, _ = adapter_for(case)
    ak.write(adapter, tmp_path / "a.safetensors")
    ak.hub.push(case, f"s3://models/{choice}-base")
    ak.hub.push(tmp_path / "a.safetensors", f"s3://models/{choice}-lora")
    words = [f"s3://models/{choice}-base", f"s3://models/{choice}-lora", "--quantized", choice]
    assert place.merge(*words, "-o", f"s3://models/{choice}")["exit_code"] == 0
    ak.merge(case, tmp_path / "a.safetensors", tmp_path / "local", quantized=choice)
    found, expected = pulled(f"s3://models/{choice}", tmp_path / "out"), made(tmp_path / "local")
    for files in (found, expected):  # One record has the local base's fingerprint, the other the uri of the base.
        record = json.loads(files.pop("adapterkit_merge.json"))
        files["norms"] = json.dumps([record["norms"], record.get("damage")]).encode()
    assert found == expected


def test_from_and_to_a_hub_with_commits(place: Place, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {f"layers.{i}.q.weight": rand(40, 30, seed=i) for i in range(3)}, shards=3)
    ak.write(ak.Adapter({ak.Target("layers.1.q"): (lora(40, 30),)}), tmp_path / "lora.safetensors")
    place.hub.add("org/base", laid(base))
    place.hub.add("org/lora", {"adapter.safetensors": (tmp_path / "lora.safetensors").read_bytes()})
    told = place.merge("hf://org/base", "hf://org/lora", "-o", "hf://org/merged")
    assert told["exit_code"] == 0, told
    ak.merge(base, tmp_path / "lora.safetensors", tmp_path / "local")
    found, expected = place.hub.files("org/merged"), laid(tmp_path / "local")
    assert json.loads(found.pop("adapterkit_merge.json"))["base_uri"].startswith("hf://org/base@")
    del expected["adapterkit_merge.json"]
    assert {name: data for name, data in found.items() if name not in ("README.md", ".gitattributes")} == expected
    assert len(place.hub.asked("POST /api/models/org/merged/commit")) == 1


@pytest.mark.skipif(BINARY is None, reason="docker-registry is not installed")
def test_credentials_that_a_node_lacks(place: Place, tmp_path: Path) -> None:
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: here, path: {tmp_path / 'htpasswd'}}}}}\n"
    with distribution(tmp_path / "closed", auth) as host:

        def login(folder: Path, secret: str) -> None:
            told = {"auths": {host: {"auth": base64.b64encode(f"somebody:{secret}".encode()).decode()}}}
            (folder / ".docker").mkdir(exist_ok=True)
            (folder / ".docker" / "config.json").write_text(json.dumps(told))

        words = ["s3://models/base", "s3://models/lora", "-o", f"oci://{host}/out:1"]
        login(place.nodes.root / "driver", PASSWORD)
        for number in range(3):
            login(place.nodes.root / f"node{number}", "wrongword")
        told = place.merge(*words)
        assert (told["exit_code"], told["error"]["code"]) == (5, "access"), told
        assert "on the node" in told["error"]["why"]
        assert "of its node" in told["error"]["cure"]
        for number in range(3):
            login(place.nodes.root / f"node{number}", PASSWORD)
        told = place.merge(*words)
        assert told["exit_code"] == 0, told
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DOCKER_CONFIG", str(place.nodes.root / "driver" / ".docker"))
            assert pulled(words[-1], tmp_path / "out") == place.expected
    logs = place.nodes.logs()
    basic = [base64.b64encode(f"somebody:{secret}".encode()).decode() for secret in (PASSWORD, "wrongword")]
    assert len(logs) > 10_000
    assert not [secret for secret in (SECRET, PASSWORD, "wrongword", *basic) if secret in logs]


def test_what_nodes_cannot_be_given_is_told(place: Place) -> None:
    adapter = place.root / "lora.safetensors"
    told = place.merge("s3://models/base", adapter, "-o", "s3://models/none", "--stream")
    assert (told["exit_code"], told["error"]["code"]) == (2, "usage")
    with pytest.raises(ak.AdapterkitError, match="in memory"):
        ak.merge("s3://models/base", ak.read(adapter), "s3://models/none", engine="ray", address=place.nodes.address)


def test_a_node_killed_on_the_way(place: Place, tmp_path: Path) -> None:
    process = place.start("s3://models/base", "s3://models/lora", "-o", "s3://models/killed")
    wait_for(process, "killed", 3)
    place.nodes.kill(2)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert out.startswith("{"), out
    assert not json.loads(out)["resumed"]
    assert pulled("s3://models/killed", tmp_path / "out") == place.expected

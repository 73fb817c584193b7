# ruff: noqa: F811 - a fixture is imported and then named
"""Merging a base that comes from a hub a weight file at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run
from hub_repository import hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import Fault, HubServer
from oci_registry import registry  # noqa: F401 - a fixture
from safetensors.numpy import save

import adapterkit as ak
from adapterkit.errors import NetworkError, StorageError
from adapterkit.hub import reading as streaming


def sharded(rows: int = 300) -> dict[str, bytes]:
    """A base of four shards, of which the adapter of the other tests touches the second."""
    draw = np.random.default_rng(8)
    tensors = {"layers.0.q.weight": draw.normal(size=(8, 4)).astype(np.float32)}
    tensors |= {f"layers.0.{n}.weight": draw.normal(size=(rows, 100)).astype(np.float32) for n in ("a", "x", "z")}
    names = {key: f"model-{at}-of-4.safetensors" for at, key in enumerate(sorted(tensors), 1)}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": names}
    files = {names[key]: save({key: tensor}, {"format": "pt"}) for key, tensor in tensors.items()}
    more = {"config.json": b'{"model_type": "tiny"}', "tokenizer.model": b"\0\1words", "chat.jinja": b"{{ x }}"}
    return files | more | {"model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture
def places(hub: HubServer, tmp_path: Path) -> Path:
    """The base and an adapter on the hub, and what merging local copies of them gives."""
    hub.add("org/base", sharded())
    hub.add("org/lora", peft_files())
    ak.merge(lay(tmp_path / "base", sharded()), lay(tmp_path / "lora", peft_files()), tmp_path / "local")
    return tmp_path


def same_as_local(folder: Path, places: Path) -> bool:
    there, local = laid(folder), laid(places / "local")
    ours, theirs = (json.loads(files.pop("adapterkit_merge.json")) for files in (there, local))
    return there == local and ours["norms"] == theirs["norms"]


@pytest.mark.parametrize("size", [[], ["--shard-size", "150KB"]])
def test_each_byte_is_fetched_once(hub: HubServer, places: Path, size: list[str]) -> None:
    ak.read("org/lora")
    before, out = hub.sent, places / "out"
    report = record("merge", "hf://org/base", "org/lora", "-o", out, "--stream", *size)
    assert hub.sent - before == sum(map(len, sharded().values()))
    assert report["base_uri"].startswith("hf://org/base@")
    ak.merge(places / "base", places / "lora", places / "again", shard_size=150_000 if size else None)
    (places / "local").rename(places / "old")
    (places / "again").rename(places / "local")
    assert same_as_local(out, places)
    assert not (places / ".out.streaming").exists()


def test_from_one_hub_to_another_each_byte_is_fetched_once(hub: HubServer, places: Path, registry: str) -> None:
    ak.read("org/lora")
    before, out = hub.sent, f"oci://{registry}/streamed/model:1"
    told = record("merge", "hf://org/base", "hf://org/lora", "-o", out, "--stream", "--verify")
    assert told["verification"]["ok"]
    ak.hub.pull(out, places / "back")
    assert hub.sent - before == 2 * sum(map(len, sharded().values())), "once to merge, and once to verify"
    hub.sent = 0
    record("merge", "hf://org/base", "hf://org/lora", "-o", out.replace(":1", ":2"), "--stream")
    assert hub.sent == sum(map(len, sharded().values()))
    (places / "back" / "README.md").unlink()
    assert same_as_local(places / "back", places)


def test_there_is_never_a_whole_copy(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    real = streaming.Shards._bring

    def bring(shards: streaming.Shards, path: str, file: object) -> None:
        real(shards, path, file)
        held.append(sum(f.stat().st_blocks * 512 for f in shards.folder.rglob("*.safetensors")))

    monkeypatch.setattr(streaming.Shards, "_bring", bring)
    ak.merge("hf://org/base", "org/lora", places / "out", stream=True)
    assert len(held) == 4
    largest = max(len(data) for name, data in sharded().items() if name.endswith(".safetensors"))
    assert max(held) < largest + 4 * 8192, "one shard, and the headers of the others"


def test_a_merge_that_the_network_stopped_goes_on(hub: HubServer, places: Path) -> None:
    with pytest.raises(NetworkError):
        _merge_with_loss(hub, places)
    hub.faults = []
    hub.requests.clear()
    report = record("merge", "hf://org/base", "org/lora", "-o", places / "out", "--stream")
    assert report["resumed"] == ["model-1-of-4.safetensors", "model-2-of-4.safetensors"]
    assert same_as_local(places / "out", places)
    assert not [path for _, path, headers in hub.asked("model-1-of") if headers["range"].endswith("-")]


def test_a_refusal_before_the_first_download_keeps_what_an_earlier_run_downloaded(hub: HubServer, places: Path) -> None:
    with pytest.raises(NetworkError):
        _merge_with_loss(hub, places)
    hub.faults = []
    (parts,) = places.glob(".out.streaming/parts")
    left = laid(parts)
    assert left
    with pytest.raises(StorageError), streaming.streamed("hf://org/base", places / "out"):
        raise StorageError("the output exists")
    assert laid(parts) == left


def _merge_with_loss(hub: HubServer, places: Path) -> None:
    """Merges; the hub fails when the third weight file's data are wanted."""
    real = streaming.Shards.bring

    def bring(shards: streaming.Shards, paths: list[str]) -> None:
        hub.faults = [Fault("/resolve/", "status", 99, 503)] if "model-3" in paths[0] else []
        real(shards, paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Shards, "bring", bring)
        patch.setattr("adapterkit.hub.reading.FIRST_READ", 200)
        ak.merge("hf://org/base", "org/lora", places / "out", stream=True)


@pytest.mark.parametrize("times", [1, 99])
def test_flipped_bits_are_found(hub: HubServer, places: Path, times: int) -> None:
    ak.read("org/lora")
    hub.faults = [Fault("model-4-of-4.safetensors", "flip", times, 8 * 100_000)]
    result = run("merge", "hf://org/base", "org/lora", "-o", places / "out", "--stream")
    assert result.exit_code == (0 if times == 1 else 4), result.output
    assert same_as_local(places / "out", places) if times == 1 else not (places / "out").exists()


def test_what_cannot_be_streamed_says_so(hub: HubServer, places: Path) -> None:
    assert run("merge", places / "base", "org/lora", "-o", places / "out", "--stream").exit_code == 2
    hub.add("org/bin", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    assert run("merge", "hf://org/bin", "org/lora", "-o", places / "out", "--stream").exit_code == 3
    assert not list(places.glob(".out*"))

# ruff: noqa: F811 - a fixture is imported and then named
"""Pulling from a hub, and reading what is on one, with the faults that networks and servers have."""

import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run
from faulty_disk import FILLS, Disk, full_disk
from hub_repository import base_files, environment, hub, laid, lay, peft_files  # noqa: F401 - a fixture
from hub_server import TOKEN, Fault, HubServer

import adapterkit as ak
from adapterkit.errors import AdapterkitError, Corrupt, Malformed, NetworkError, StorageError, UsageError
from adapterkit.hub import parse, web
from adapterkit.hub.hubs import remote_at
from adapterkit.hub.remote import check_names
from adapterkit.hub.transfer import CHUNK, fetch
from adapterkit.io.locations import is_remote

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_pulled_is_what_the_hub_has_and_is_not_fetched_twice(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("org/lora", peft_files() | {"notes/more.json": b"{}", "copy.json": b"{}"})
    first = ak.hub.pull("hf://org/lora", tmp_path / "out")
    assert laid(tmp_path / "out") == hub.files("org/lora")
    assert first.uri == f"hf://org/lora@{commit}"
    sent = hub.sent
    assert ak.hub.pull("org/lora@main", tmp_path / "out").fetched == 0
    assert hub.sent == sent
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_revision_a_folder_a_file_and_a_pattern(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("org/lora", {"a/x.json": b"1", "a/b/y.json": b"2", "z.txt": b"3"})
    hub.add("org/lora", {"a/x.json": b"new"})
    ak.hub.pull(f"hf://org/lora@{old}/a", tmp_path / "folder")
    assert laid(tmp_path / "folder") == {"x.json": b"1", "b/y.json": b"2"}
    ak.hub.pull(f"hf://org/lora@{old}/a/b/y.json", tmp_path / "file")
    assert laid(tmp_path / "file") == {"y.json": b"2"}
    ak.hub.pull(f"hf://org/lora@{old}", tmp_path / "some", include=["*.txt"])
    assert laid(tmp_path / "some") == {"z.txt": b"3"}
    assert record("pull", "org/lora", tmp_path / "dry", "--dry-run")["bytes"] == 3
    assert not (tmp_path / "dry").exists()


def test_what_is_there_is_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/lora", peft_files())
    out = lay(tmp_path / "out", {"mine": b"precious"})
    with pytest.raises(StorageError, match="already there"):
        ak.hub.pull("org/lora", out)
    assert laid(out) == {"mine": b"precious"}
    ak.hub.pull("org/lora", out, overwrite=True)
    assert laid(out) == peft_files()


FAULTS = [
    ("/resolve/", "truncate", 100, {}), ("/resolve/", "truncate", 0, {}), ("/resolve/", "drop", None, {}),
    ("/resolve/", "status", 503, {}), ("/resolve/", "status", 429, {"Retry-After": "0"}),
    ("/resolve/", "flip", 1234, {}), ("/tree/", "status", 503, {}), ("/tree/", "drop", None, {}),
    ("/tree/", "status", 429, {"Retry-After": "0"}), ("/revision/", "status", 429, {"Retry-After": "0"}),
    ("/api/models/org/lora", "status", 503, {}), ("/api/models/org/lora", "drop", None, {}),
]  # fmt: skip


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("match", "kind", "value", "headers"), FAULTS)
def test_faults_of_the_moment_are_overcome(
    hub: HubServer, tmp_path: Path, match: str, kind: str, value: object, headers: dict[str, str], times: int
) -> None:
    files = peft_files() | {"big.bin": np.random.default_rng(1).bytes(500_000)}
    hub.add("org/lora", files)
    hub.faults = [Fault(match, kind, min(times, 2) if kind == "flip" else times, value, headers)]
    ak.hub.pull("org/lora@main", tmp_path / "out")
    assert hub.faults[0].times == 0, "the fault was not met"
    assert laid(tmp_path / "out") == files


@pytest.mark.parametrize("kind", ["wrong-range", "no-range"])
def test_servers_that_answer_with_another_range(hub: HubServer, tmp_path: Path, kind: str) -> None:
    data = np.random.default_rng(2).bytes(300_000)
    hub.add("org/lora", {"big.bin": data})
    hub.faults = [Fault("/resolve/", "truncate", 1, 200_000), Fault("/resolve/", kind)]
    ak.hub.pull("org/lora", tmp_path / "out")
    assert [fault.times for fault in hub.faults] == [0, 0]
    assert laid(tmp_path / "out") == {"big.bin": data}


def test_what_stays_broken_is_said_with_the_networks_exit_code(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/lora", peft_files())
    hub.faults = [Fault("/resolve/", "status", 99, 503)]
    result = run("pull", "org/lora", tmp_path / "out")
    assert result.exit_code == 5, result.output
    assert not (tmp_path / "out").exists()
    hub.faults = []
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 0


def test_a_hub_that_wants_to_be_left_alone_for_long_is_obeyed(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/lora", peft_files())
    hub.faults = [Fault("/resolve/", "status", 1, 429, {"Retry-After": str(web.LONGEST_WAIT + 1)})]
    with pytest.raises(NetworkError):
        ak.hub.pull("org/lora", tmp_path / "out")
    assert len(hub.asked("/resolve/")) <= 2


def test_every_flipped_bit_is_found(hub: HubServer, tmp_path: Path) -> None:
    data = np.random.default_rng(3).bytes(2048)
    hub.add("org/lora", {"small.json": data, "lfs.bin": data})
    remote = remote_at(parse("org/lora"))
    draw, found = random.Random(4), 0
    for trial in range(60):
        hub.faults = [Fault("/resolve/", "flip", 3, draw.randrange(8 * len(data)))]
        with pytest.raises(Corrupt):
            fetch(remote, remote.files[trial % 2], tmp_path / "part", lambda _: None)
        found += 1
    assert found == 60


def test_corruption_that_stays_ends_with_its_exit_code(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/lora", peft_files())
    hub.faults = [Fault("safetensors", "flip", 99, 777)]
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_pull_goes_on_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    data = np.random.default_rng(5).bytes(20 << 20)
    hub.add("org/lora", {"big.bin": data})
    command = [sys.executable, "-m", "adapterkit", "pull", "org/lora", str(tmp_path / "out"), "--quiet"]
    env = {**os.environ, **environment(hub, tmp_path), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env) as process:

        def kill(sent: int) -> None:
            if sent > 12 << 20:
                process.send_signal(signal.SIGKILL)

        hub.chunk_delay = kill
        assert process.wait() == -signal.SIGKILL
    hub.chunk_delay = lambda _: None
    (part,) = (tmp_path / ".out.pulling" / "parts").iterdir()
    held = part.stat().st_size
    assert held > 4 << 20
    pulled = ak.hub.pull("org/lora", tmp_path / "out")
    assert pulled.fetched == len(data) - held
    assert hub.asked("/resolve/")[-1][2]["range"] == f"bytes={held}-"
    assert laid(tmp_path / "out") == {"big.bin": data}
    assert sorted(p.name for p in tmp_path.iterdir() if "pull" in p.name) == []


def test_what_an_earlier_run_left_is_not_trusted(hub: HubServer, tmp_path: Path) -> None:
    data = np.random.default_rng(6).bytes(3 * CHUNK)
    hub.add("org/lora", {"big.bin": data})
    file = remote_at(parse("org/lora")).files[0]
    parts = tmp_path / ".out.pulling" / "parts"
    parts.mkdir(parents=True)
    (parts / file.digest.replace(":", "-")).write_bytes(b"x" + data[1:CHUNK])
    ak.hub.pull("org/lora", tmp_path / "out")
    assert laid(tmp_path / "out") == {"big.bin": data}


HOSTILE = [
    "../x", "a/../../x", "/abs", "C:\\x", "C:/x", "..\\x", "a\\b", "x\x00y", "a//b", "./x", "a/.", "x" * 300, "nul",
    "COM1.txt", "a/con/b", "x\ny", "x ", "x.", "",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_would_leave_the_folder_are_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add("org/lora", {name: b"x", "fine": b"y"})
    (tmp_path / "in").mkdir()
    with pytest.raises((Malformed, NetworkError)) as met:
        ak.hub.pull("org/lora", tmp_path / "in" / "out")
    assert met.value.exit_code in (2, 5)
    assert list(tmp_path.rglob("*")) == [tmp_path / "in"]


@pytest.mark.parametrize("names", [["a", "a/b"], ["a", "a"]])
def test_names_that_cannot_stand_beside_each_other(names: list[str]) -> None:
    with pytest.raises(Malformed):
        check_names(names)


def test_no_space_is_said_before_a_byte_is_sent(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/lora", peft_files())
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 500})())
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 6
    assert hub.sent == 0


def test_the_plan_of_a_pull_is_not_written_again(hub: HubServer, tmp_path: Path) -> None:
    """A kill while it is would throw away what is finished."""
    hub.add("org/lora", peft_files())
    hub.faults = [Fault("adapter_model", "status", 99, 503, {"Retry-After": "0"})]
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 5
    plan = (tmp_path / ".out.pulling" / "plan").stat().st_ino
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 5
    assert (tmp_path / ".out.pulling" / "plan").stat().st_ino == plan
    hub.faults = []
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 0
    assert len(hub.asked("adapter_config.json")) == 1, "what was finished is not fetched again"


@pytest.mark.parametrize("scheme", ["hf", "memory"])
def test_a_disk_that_fills_up_is_said_and_gone_on_from(hub: HubServer, tmp_path: Path, scheme: str) -> None:
    import fsspec

    files, uri = peft_files() | {"more.txt": bytes(100_000)}, {"hf": "hf://org/lora", "memory": "memory://full/lora"}
    hub.add("org/lora", files)
    for name, data in files.items():
        fsspec.filesystem("memory").pipe(f"/full/lora/{name}", data)
    with Disk(tmp_path / "whole", only=FILLS).watched() as counted:
        ak.hub.pull(uri[scheme], tmp_path / "whole" / "out")
    assert len(counted.points) > 8
    for at in range(len(counted.points)):
        folder = tmp_path / f"full{at}"
        with full_disk(folder, at).watched():
            result = run("pull", uri[scheme], folder / "out")
        assert result.exit_code == 6, (at, counted.points[at], result.output)
        assert not (folder / "out").exists()
        ak.hub.pull(uri[scheme], folder / "out")
        assert laid(folder / "out") == files


@pytest.mark.parametrize(
    ("uri", "attributes", "token", "code", "words"),
    [
        ("org/none", {}, TOKEN, "remote-not-found", "the repository does not exist"),
        ("org/lora@none", {}, TOKEN, "remote-not-found", "the revision 'none' does not exist"),
        ("hf://org/lora/adapter_confg.json", {}, TOKEN, "remote-not-found", "adapter_config.json"),
        ("org/lora", {"gated": True}, TOKEN, "access", "Accept the repository's terms"),
        ("org/lora", {"private": True}, "", "remote-not-found", "HF_TOKEN"),
        ("org/lora", {}, "hf_someOtherToken", "access", "mistyped, expired or revoked"),
    ],
)
def test_what_a_hub_denies_is_told_apart(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    uri: str, attributes: dict[str, bool], token: str, code: str, words: str,
) -> None:  # fmt: skip
    hub.add("org/lora", peft_files(), **attributes)
    monkeypatch.setenv("HF_TOKEN", token)
    answer = record("pull", uri, tmp_path / "out", code=5)["error"]
    assert answer["code"] == code
    assert words in f"{answer['why']} {answer['cure']}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 418, 500, 503])
@pytest.mark.parametrize("route", ["/api/models", "/tree/", "/resolve/"])
def test_no_token_in_errors(hub: HubServer, tmp_path: Path, status: int, route: str) -> None:
    hub.add("org/lora", peft_files())
    hub.faults = [Fault(route, "status", 99, status)]
    result = run("pull", "org/lora", tmp_path / "out", "--debug", "--json")
    assert result.exit_code == 5
    assert "hf_" not in result.output.replace("hf_hub", "").replace("hf_raise", "").replace("hf_api", "")
    assert TOKEN not in result.output


def test_a_redirect_to_another_origin_carries_no_token(hub: HubServer, tmp_path: Path) -> None:
    files = peft_files()
    hub.add("org/lora", files)
    other = HubServer()
    try:
        other.add("org/lora", files)
        place = f"{other.url}/org/lora/resolve/main/adapter_model.safetensors"
        hub.faults = [Fault("adapter_model.safetensors", "redirect", 9, place)]
        ak.hub.pull("org/lora", tmp_path / "out")
        assert laid(tmp_path / "out") == files
        ((_, _, headers),) = other.requests
        assert "authorization" not in headers
        assert TOKEN not in str(headers)
    finally:
        other.close()
    assert all(headers["authorization"] == f"Bearer {TOKEN}" for _, _, headers in hub.asked("/resolve/"))


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://example.org/x", "gopher:x"])
def test_redirects_to_what_is_not_the_web_are_not_followed(hub: HubServer, tmp_path: Path, place: str) -> None:
    hub.add("org/lora", peft_files())
    hub.faults = [Fault("/resolve/", "redirect", 9, place)]
    assert run("pull", "org/lora", tmp_path / "out").exit_code == 5


def test_adapters_and_bases_are_named_by_where_they_live(hub: HubServer, tmp_path: Path) -> None:
    base, lora = hub.add("org/base", base_files()), hub.add("org/lora", peft_files())
    adapter = ak.read("org/lora", base="hf://org/base")
    assert adapter.recipe[0] == ak.Step("pull", {"uri": f"hf://org/lora@{lora}"})
    assert (adapter.base.id, adapter.base.revision) == ("org/base", base)
    assert not hub.asked("pytorch_model.bin"), "other forms of the weights are not wanted"
    out = tmp_path / "merged"
    assert run("merge", "hf://org/base", "org/lora", "-o", out).exit_code == 0
    local = lay(tmp_path / "base", base_files()), lay(tmp_path / "lora", peft_files())
    ak.merge(*local, tmp_path / "local")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "local" / "model.safetensors").read_bytes()
    assert f"hf://org/base@{base}" in (out / "adapterkit_merge.json").read_text()
    assert run("verify", out, "--base", "org/base", "--adapter", "hf://org/lora").exit_code == 0
    assert run("convert", "hf://org/lora", tmp_path / "native.safetensors", "--to", "adapterkit").exit_code == 0
    assert ak.read(tmp_path / "native.safetensors").digest() == adapter.digest()
    assert run("validate", "org/lora", "--base", "org/base").exit_code == 0


def test_offline_what_was_fetched_is_still_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/lora", peft_files())
    digest = ak.read("hf://org/lora").digest()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert ak.read("org/lora").digest() == digest
    assert len(hub.requests) == asked
    with pytest.raises(NetworkError, match="offline"):
        ak.read("org/other")


def test_a_commit_in_the_cache_needs_no_hub(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in huggingface_hub, whose cache finds a commit that was downloaded under the name of its branch."""
    commit = hub.add("org/lora", peft_files())
    digest = ak.read("org/lora").digest()
    asked = len(hub.requests)
    assert ak.read(f"org/lora@{commit}").digest() == digest
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert ak.read(f"hf://org/lora@{commit}").digest() == digest
    assert len(hub.requests) == asked
    with pytest.raises(NetworkError, match="offline"):
        ak.read(f"org/lora@{commit[::-1]}")


def test_weights_in_the_top_folder_are_not_replaced_by_a_checkpoint(hub: HubServer) -> None:
    import torch
    from safetensors.torch import load, save

    files, buffer = peft_files(), io.BytesIO()
    factors = load(files["adapter_model.safetensors"])
    torch.save(factors, buffer)
    checkpoint = save({name: value + 1 for name, value in factors.items()}, {"format": "pt"})
    config = files["adapter_config.json"]
    hub.add("org/old", {
        "adapter_model.bin": buffer.getvalue(), "adapter_config.json": config,
        "checkpoint-1/adapter_model.safetensors": checkpoint, "checkpoint-1/adapter_config.json": config,
    })  # fmt: skip
    hub.add("org/lora", files)
    assert ak.read("org/old").digest() == ak.read("org/lora").digest()


def test_local_paths_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_remote("org/lora")
    assert is_remote("org/Llama-3.1")
    assert is_remote("hf://org/lora")
    (tmp_path / "runs").mkdir()
    for local in ("runs/typo", "org/model.safetensors", "a/b/c", "./org/lora", "name", str(tmp_path / "x" / "y")):
        assert not is_remote(local)
    assert not is_remote(Path("org/lora"))
    lay(tmp_path / "org" / "lora", peft_files())
    assert not is_remote("org/lora")
    with pytest.raises(UsageError, match="unknown scheme"):
        ak.read("nowhere://bucket/x")


@pytest.mark.parametrize(
    "uri",
    [
        "hf://org",
        "hf://",
        "hf://a/b/../c",
        "hf://a/b@",
        "hf://u:p@host/a/b",
        "hf://a/b//c",
        "hf://a/b@..",
        "hf://a/b@./c",
    ],
)
def test_uris_that_are_none(uri: str) -> None:
    with pytest.raises(AdapterkitError) as met:
        parse(uri)
    assert met.value.exit_code == 2


def test_uris_are_written_as_they_are_read() -> None:
    for uri in ("hf://org/repo", "hf://org/repo@v1.0", "hf://org/repo@refs%2Fpr%2F1/a/b.json"):
        assert str(parse(uri)) == uri
    assert parse("hf://org/repo@refs%2Fpr%2F1").revision == "refs/pr/1"


def test_inspecting_reads_headers_alone(hub: HubServer, tmp_path: Path) -> None:
    from safetensors.numpy import save

    big = {"layers.0.q.weight": np.zeros((1000, 1000), np.float32)}
    files = {"model.safetensors": save(big, {"format": "pt"}), "config.json": b'{"model_type": "tiny"}'}
    hub.add("org/base", files)
    hub.add("org/lora", peft_files())
    for name, held in (("base", files), ("lora", peft_files())):
        local = record("inspect", lay(tmp_path / name, held))
        remote = record("inspect", f"hf://org/{name}")
        assert remote.pop("path") == f"hf://org/{name}"
        del local["path"]
        remote["recipe"] = [step for step in remote.get("recipe", []) if step["op"] != "pull"]
        assert remote == {"recipe": [], **local}
    assert hub.sent < 200_000
    assert {path.name for path in (tmp_path / "cache").rglob("*")} == {"scratch", "lock"}, "nothing is kept"


def test_values_that_a_reader_asks_for_come_by_range(hub: HubServer) -> None:
    hub.add("org/lora", peft_files())
    whole = ak.read("hf://org/lora")
    with ak.hub.headers("hf://org/lora") as path:
        assert ak.read(path).digest() == whole.digest()


def test_help_loads_nothing_of_the_hub() -> None:
    code = "import sys; from adapterkit.cli import adapterkit; adapterkit(['pull', '--help'], standalone_mode=False)"
    code += "; print(*(m for m in ('huggingface_hub', 'httpx2') if m in sys.modules), file=sys.stderr)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stderr.strip() == ""

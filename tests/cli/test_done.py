# ruff: noqa: F811 - a fixture is imported and then named
"""The same command again: finished output is recognised, changed output and other inputs are not; for all commands."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import record, run, save_base, save_peft
from doomed_commands import Commands, tree
from graph_files import graph
from hub_repository import base_files, environment, hub, peft_files  # noqa: F401 - a fixture
from hub_server import HubServer
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.errors import StorageError
from adapterkit.hub import reading
from adapterkit.io.staging import Staging, keep_result, kept_result, staged

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="faults are planted by way of /proc"),
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),  # Of huggingface_hub's uploads.
]

COMMANDS = {
    "convert": "convert {adapter} {out} --to peft",
    "convert to a file": "convert {adapter} {out} --to adapterkit",
    "convert with a file beside": "convert {adapter} {out} --to minlora",
    "combine": "combine {adapter} {other} -o {out} --method linear",
    "report": "report {adapter} {other} -o {out}.html",
    "resize": "resize {adapter} --rank 1 -o {out}",
    "extract": "extract {tuned} --base {base} --rank 1 -o {out}",
    "merge": "merge {base} {adapter} -o {out}",
    "merge of a file": "merge {base}/model.safetensors {adapter} -o {out}.safetensors",
    "merge into a graph": "merge {graph} {adapter} -o {out}.onnx --no-check",
    "inject": "inject {graph} {adapter} -o {out}.onnx --no-check",
    "bom": "bom {adapter} -o {out}.json",
}
"""Commands that make an output of an adapter."""


@pytest.fixture(scope="module")
def command() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@pytest.fixture(params=COMMANDS)
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The words of a command whose inputs are there."""
    names = {"adapter": save_peft(tmp_path / "adapter"), "other": save_peft(tmp_path / "other")}
    names |= {"base": save_base(tmp_path / "base"), "tuned": save_base(tmp_path / "tuned")}
    tuned = tmp_path / "tuned" / "model.safetensors"
    save_file({"layers.0.q.weight": np.outer(np.arange(8), np.arange(4)).astype("f4")}, tuned, {"format": "pt"})
    (tmp_path / "made").mkdir()
    names |= {"graph": graph(tmp_path / "graph"), "out": tmp_path / "made" / "out"}
    return COMMANDS[request.param].format(**names).split()


def places(folder: Path) -> dict[str, int]:
    """The files below a folder and their inodes: a file that was written again has another one."""
    return {name: (folder / name).stat().st_ino for name in tree(folder)}


def test_the_same_command_again_is_done(words: list[str], tmp_path: Path) -> None:
    first = run(*words)
    assert first.exit_code == 0, first.output
    assert "already done" not in first.stdout
    before, inodes = tree(tmp_path), places(tmp_path)
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("already done: ")
    assert record(*words)["already_done"] is True
    assert (tree(tmp_path), places(tmp_path)) == (before, inodes)
    fresh = run(*words, "--overwrite")
    assert (fresh.exit_code, "already done" in fresh.stdout) == (0, False), fresh.output
    assert tree(tmp_path) == before
    assert run(*words).stdout.startswith("already done: ")


def test_every_run_prints_the_same_keys(words: list[str]) -> None:
    first, again, third = (record(*words) for _ in range(3))
    assert (first.pop("already_done"), again.pop("already_done"), third.pop("already_done")) == (False, True, True)
    for later in (again, third):
        assert later.keys() == first.keys()
        for key in first.keys() - ({"seconds"} if words[0] == "merge" else set()):
            assert later[key] == first[key], key


def test_a_large_result_is_kept_in_the_file_beside_the_output(tmp_path: Path) -> None:
    """File systems limit attributes: ext4 to 4 KiB, and Linux to 64 KiB."""
    digests = [hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(30_000)]
    out = tmp_path / "out"
    with staged(out, made_from="digest") as place:
        place.write_bytes(b"content")
    keep_result(out, "other digest", {"digests": digests})
    assert kept_result(out) == {}
    keep_result(out, "digest", {"digests": digests})
    assert kept_result(out) == {"digests": digests}
    assert Staging(out).is_finished("digest")
    assert sorted(os.listdir(tmp_path)) == [".out.adapterkit", "out"]


def test_every_run_names_the_output_as_the_command_line_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base")
    save_peft(tmp_path / "lora")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for out in ("merged", "link", "real/../other"):
        assert [record("merge", "base", "lora", "-o", out)["out"] for _ in range(2)] == [out, out]
        assert run("merge", "base", "lora", "-o", out).stdout.startswith(f"already done: {out} ")


def test_other_inputs_are_not_taken_for_the_same(words: list[str], tmp_path: Path) -> None:
    assert run(*words).exit_code == 0
    changed = tmp_path / ("tuned/model.safetensors" if "extract" in words else "adapter/adapter_model.safetensors")
    kept, status = changed.read_bytes(), changed.stat()
    save_file({name: array + 1 for name, array in load_file(changed).items()}, changed, {"format": "pt"})
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))  # What it holds decides, not when it was written.
    refused = run(*words)
    assert refused.exit_code == 6, refused.output
    assert "already there" in refused.stderr
    assert "--overwrite" in refused.stderr
    changed.write_bytes(kept)
    assert run(*words).stdout.startswith("already done: ")
    more = {"convert": ["--on-loss", "fold"], "merge": ["--weight", "2"], "inject": ["--mode", "slots"]}
    more["bom"] = ["--serial"]
    more["report"] = ["--rename", "layers.0.q=layers.0.k"]
    assert run(*words, *more.get(words[0], ["--dtype", "F16"])).exit_code == 6


def test_an_output_that_was_changed_is_not_finished(words: list[str], tmp_path: Path) -> None:
    assert run(*words).exit_code == 0
    for file in [file for file in (tmp_path / "made").rglob("*") if file.is_file()]:
        kept = file.read_bytes()
        file.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        assert run(*words).exit_code == 6, file
        file.write_bytes(kept)
        file.rename(tmp_path / "away")
        assert run(*words).exit_code in (0, 6), file
        (tmp_path / "away").rename(file)
        assert run(*words).exit_code == 0, file


def test_a_file_system_without_attributes(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is then one hidden file beside the output."""

    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "setxattr", refuses)
    monkeypatch.setattr(os, "getxattr", refuses)
    assert run(*words).exit_code == 0
    hidden = [name for name in os.listdir(tmp_path / "made") if name.startswith(".")]
    assert len(hidden) == 1
    assert run(*words).stdout.startswith("already done: ")
    (tmp_path / "made" / hidden[0]).write_bytes(b"damaged")
    assert run(*words).exit_code == 6


def test_a_command_that_was_killed_when_its_work_was_done(words: list[str], tmp_path: Path, command: Commands) -> None:
    points = command(*words, folder=tmp_path / "made").points
    whole = tree(tmp_path / "made")
    last = max(at for at, point in enumerate(points) if point == "replace")
    for at in (last, last + 1):
        for name in os.listdir(tmp_path / "made"):
            os.rename(tmp_path / "made" / name, tmp_path / f"{at}{name}")
        killed = command(*words, folder=tmp_path / "made", at=at, signal=signal.SIGKILL)
        assert killed.code == -signal.SIGKILL, killed
        again = command(*words)
        assert again.code == 0, again
        assert ("already done" in again.said) == (at > last), again
        assert tree(tmp_path / "made") == whole


READING = {
    "completion", "conformance", "demo", "diff", "doctor", "gate", "help", "inspect", "list", "names", "scan",
    "validate", "verify",
}  # fmt: skip
"""Commands that write nothing."""

ELSEWHERE = {
    "export": "onnx/test_onnx_export.py", "search": "ops/test_search.py", "sign": "trust/test_signatures.py",
    "ui": "reporting/test_ui.py",
}  # fmt: skip
"""Commands that need transformers, a key or a browser's requests: their tests."""


def test_every_command_that_writes_is_here() -> None:
    here = {line.split()[0] for line in (*COMMANDS.values(), *OF_HUBS.values())}
    assert here | READING | ELSEWHERE.keys() == set(adapterkit.list_commands(None))  # type: ignore[arg-type]
    assert not here & READING
    for file in ELSEWHERE.values():
        assert "already" in (Path(__file__).parents[1] / file).read_text("utf-8"), file


def test_a_command_that_was_killed_half_way(words: list[str], tmp_path: Path, command: Commands) -> None:
    """The next one makes what an undisturbed one makes, and leaves nothing else."""
    points = command(*words, folder=tmp_path / "made").points
    whole = tree(tmp_path / "made")
    for at in (1, len(points) // 2):
        for name in os.listdir(tmp_path / "made"):
            os.rename(tmp_path / "made" / name, tmp_path / f"{at}{name}")
        killed = command(*words, folder=tmp_path / "made", at=at, signal=signal.SIGKILL)
        assert killed.code == -signal.SIGKILL, killed
        assert command(*words).code == 0
        assert tree(tmp_path / "made") == whole, at
        assert "already done" in command(*words).said


OF_HUBS = {
    "pull": "pull org/lora {out}",
    "push": "push {adapter} hf://org/out",
    "convert from a hub": "convert org/lora {out} --to adapterkit",
    "convert to a hub": "convert {adapter} hf://org/out --to adapterkit",
    "combine to a hub": "combine {adapter} org/lora -o hf://org/out --to peft",
    "merge from a hub": "merge org/base org/lora -o {out}",
    "merge as a stream": "merge hf://org/base org/lora -o {out} --stream",
    "merge to a hub": "merge {base} {adapter} -o hf://org/out",
    "merge from hub to hub": "merge hf://org/base org/lora -o hf://org/out --stream",
}
"""Commands that read or write on a hub."""

MORE = {
    "convert": ["--rename", "layers.0.q=layers.0.k"], "combine": ["--weight", "2", "--weight", "1"],
    "merge": ["--weight", "2"], "push": ["--to", "mlx"],
}  # fmt: skip
"""A flag of each command that makes another output."""


@pytest.fixture(params=OF_HUBS)
def of_hub(request: pytest.FixtureRequest, hub: HubServer, tmp_path: Path) -> list[str]:
    """The words of a command whose inputs are on the disk and on a hub."""
    hub.add("org/lora", peft_files())
    hub.add("org/base", base_files())
    names = {"adapter": save_peft(tmp_path / "adapter"), "base": save_base(tmp_path / "base")}
    (tmp_path / "made").mkdir()
    return OF_HUBS[request.param].format(**names, out=tmp_path / "made" / "out").split()


def outputs(hub: HubServer, folder: Path) -> dict[str, object]:
    """What a command left on the disk, by name with the inode, and on the hub, with its commits."""
    there = {f"hub/{name}": data for name, data in hub.files("org/out").items()} if "org/out" in hub.repos else {}
    return {**tree(folder), **places(folder), **there}


def test_the_same_command_with_a_hub_is_done(of_hub: list[str], hub: HubServer, tmp_path: Path) -> None:
    first = run(*of_hub)
    assert first.exit_code == 0, first.output
    before = outputs(hub, tmp_path / "made")
    assert before
    again = run(*of_hub)
    assert again.exit_code == 0, again.output
    assert "already" in again.stdout, again.stdout
    assert outputs(hub, tmp_path / "made") == before


def test_another_command_with_a_hub_is_not_taken_for_the_same(
    of_hub: list[str], hub: HubServer, tmp_path: Path
) -> None:
    assert run(*of_hub).exit_code == 0
    before = outputs(hub, tmp_path / "made")
    if of_hub[0] in MORE:  # All files that another `pull --include` wants are there.
        other = run(*of_hub, *MORE[of_hub[0]])
        assert other.exit_code == 6, other.output
        assert "overwrit" in other.output
    assert outputs(hub, tmp_path / "made") == before
    hub.add("org/lora", peft_files("org/other"))
    reading._seen.clear()  # What a place held is asked for once in a process.
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    changed = run(*of_hub)
    assert changed.exit_code == 6, changed.output
    assert outputs(hub, tmp_path / "made") == before
    assert run(*of_hub, "--overwrite").exit_code == 0


@pytest.mark.usefixtures("hub")
def test_an_output_of_a_hub_that_was_changed(of_hub: list[str], tmp_path: Path) -> None:
    if any(word.startswith("hf://org/out") for word in of_hub):
        return
    assert run(*of_hub).exit_code == 0
    for file in [file for file in (tmp_path / "made").rglob("*") if file.is_file()]:
        kept = file.read_bytes()
        file.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        assert run(*of_hub).exit_code == 6, file
        file.write_bytes(kept)
    assert "already" in run(*of_hub).stdout


def test_a_command_with_a_hub_that_was_killed(
    of_hub: list[str], hub: HubServer, tmp_path: Path, command: Commands
) -> None:
    told = environment(hub, tmp_path)
    if any(word.startswith("hf://org/out") for word in of_hub):
        return
    done = command(*of_hub, folder=tmp_path / "made", env=told)
    assert done.code == 0, done
    whole = tree(tmp_path / "made")
    last = max(at for at, point in enumerate(done.points) if point == "replace")
    for at in (len(done.points) // 2, last + 1):
        for name in os.listdir(tmp_path / "made"):
            os.rename(tmp_path / "made" / name, tmp_path / f"{at}{name}")
        command(*of_hub, folder=tmp_path / "made", at=at, signal=signal.SIGKILL, env=told)
        again = command(*of_hub, env=told)
        assert again.code == 0, again
        assert tree(tmp_path / "made") == whole, at
        assert "already" in command(*of_hub, env=told).said


def test_a_graph_that_is_written_beside_its_data(tmp_path: Path, command: Commands) -> None:
    """It can be checked only where it will be; a kill brings back what was there."""
    model, adapter = graph(tmp_path / "graph"), save_peft(tmp_path / "adapter")
    out = tmp_path / "graph" / "out.onnx"
    words = ["inject", model, adapter, "-o", out, "--no-check"]
    done = command(*words, folder=out.parent)
    assert done.code == 0, done
    whole = tree(out.parent)
    assert "already done" in command(*words).said
    out.write_bytes(b"old")
    before = tree(out.parent)
    for at in (len(done.points) // 2, max(n for n, point in enumerate(done.points) if point == "replace") + 1):
        command(*words, "--overwrite", folder=out.parent, at=at, signal=signal.SIGKILL)
        assert command(*words).code == 6
        assert tree(out.parent) == before
    assert command(*words, "--overwrite").code == 0
    assert tree(out.parent) == whole


def test_a_pull_again_and_after_a_failed_rename(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/lora", peft_files())
    out = tmp_path / "out"
    assert "already done" not in run("pull", "org/lora", out).stdout
    before = tree(tmp_path)
    assert "already done: " in run("pull", "org/lora", out).stdout
    assert record("pull", "org/lora", out)["already_done"] is True
    hub.add("org/lora", {"more.json": b"{}"})
    real = os.replace

    def failing(source: object, target: object) -> None:
        if Path(str(target)) == out and Path(str(source)).name == "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(str(source), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(StorageError, match="input/output error"):
            ak.hub.pull("org/lora", out, overwrite=True)
    assert tree(out) == {name.removeprefix("out/"): data for name, data in before.items() if name != "out"}
    ak.hub.pull("org/lora", out, overwrite=True)
    assert "more.json" in tree(out)
    assert os.listdir(tmp_path) == ["out"]

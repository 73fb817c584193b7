"""Outputs appear whole or not at all: on full disks, under signals and beside sources, in every format."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from command_line import run, save_base, save_peft
from doomed_commands import Commands, Outcome, tree
from format_vectors import EVERY, base, source

import adapterkit as ak
from adapterkit.errors import AdapterkitError, StorageError, UsageError
from adapterkit.formats import FORMATS, Format
from adapterkit.io import staging
from adapterkit.io.staging import staged

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="faults are planted by way of /proc")

LLAMA = Path(__file__).parents[2] / "spec" / "vectors" / "bases" / "llama"
WRITTEN = [name for name in FORMATS if FORMATS[name].write is not Format.write]


@pytest.fixture(scope="module")
def command() -> Iterator[Commands]:
    commands = Commands()
    yield commands
    commands.close()


@cache
def sample(name: str) -> tuple[Path, Path | None]:
    """An adapter that the format has words for, and the base that it takes to read and write it."""
    for folder in EVERY:
        for below in (base(folder), LLAMA):
            with suppress(AdapterkitError):
                if folder.parent.name in (name, "mlx" if name == "adapterkit" else name):
                    ak.read(source(folder), None, below)
                    return source(folder), below
    raise AssertionError(f"no vector of {name} can be read")


def convert(name: str, out: Path) -> list[object]:
    path, below = sample(name)
    words: list[object] = ["convert", path, out, "--to", name]
    return words if below is None else [*words, "--base", below]


@cache
def undisturbed(name: str) -> tuple[str, dict[str, bytes | None]]:
    """The name of what a command writes in a format, and everything that it writes."""
    path = sample(name)[0]
    file = path.name if path.is_file() else FORMATS[name].file or "out"
    with TemporaryDirectory() as folder:
        done = run(*convert(name, Path(folder) / file))
        assert done.exit_code == 0, done.output
        return file, tree(Path(folder))


class Place:
    """Where an output of a format goes: a folder in which old files have the names that the new ones will have."""

    def __init__(self, name: str, folder: Path, command: Commands) -> None:
        self.name, self.command = name, command
        file, self.whole = undisturbed(name)
        self.old = self._folder(folder / "old") / file
        for inside, data in self.whole.items():
            there = self.old.parent / inside
            there.mkdir() if data is None else there.write_bytes(b"old")
        if self.old.is_dir():
            (self.old / "README.md").write_bytes(b"mine")
        self.before = tree(self.old.parent)
        self.after = self.before | self.whole
        self.empty = self._folder(folder / "empty") / file

    def run(self, out: Path, *more: object, **fault: object) -> Outcome:
        return self.command(*convert(self.name, out), *more, **fault)

    def replace(self, **fault: object) -> Outcome:
        return self.run(self.old, "--overwrite", **fault)

    def _folder(self, folder: Path) -> Path:
        folder.mkdir()
        return folder


@pytest.fixture
def place(command: Commands, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(request.param, tmp_path, command)


formats = pytest.mark.parametrize("place", WRITTEN, indirect=True)
forms = pytest.mark.parametrize("place", ["kohya", "minlora", "nemo", "peft"], indirect=True)
"""A file, a file and one beside it, an archive, a folder."""


@formats
def test_a_full_disk_leaves_what_was_there(place: Place) -> None:
    largest = max(len(data) for data in place.whole.values() if data is not None)
    for limit in (0, largest - 1):
        done = place.replace(limit=limit)
        assert done.code == 6, done
        assert tree(place.old.parent) == place.before
    assert place.run(place.empty, limit=largest // 2).code == 6
    assert tree(place.empty.parent) == {}


@formats
def test_sigterm_cleans_up(place: Place) -> None:
    count = len(place.run(place.empty, folder=place.empty.parent).points)
    assert tree(place.empty.parent) == place.whole
    for at in (0, count // 2, count - 3):
        done = place.replace(folder=place.old.parent, at=at, signal=signal.SIGTERM)
        assert done.code == 130, done
        # The last point is near the end, where the new output may be in place and only its stage is left to remove.
        assert tree(place.old.parent) in ([place.before, place.after] if at > count // 2 else [place.before])


@forms
def test_a_killed_command_is_taken_over_by_the_next(place: Place, tmp_path: Path) -> None:
    counted = Place(place.name, _made(tmp_path / "counted"), place.command)
    points = counted.replace(folder=counted.old.parent).points
    assert tree(counted.old.parent) == place.after
    swapped = [at for at, point in enumerate(points) if point == "replace"]
    for at in sorted({0, len(points) // 2, len(points) - 1, *swapped}):
        there = Place(place.name, _made(tmp_path / str(at)), place.command)
        assert there.replace(folder=there.old.parent, at=at, signal=signal.SIGKILL).code == -signal.SIGKILL
        left = tree(there.old.parent)
        held = {data for data in left.values() if data is not None}
        assert left.items() >= place.before.items() or left.items() >= place.after.items() or b"old" in held
        assert there.replace().code == 0
        assert tree(there.old.parent) == place.after, points[at]


@forms
def test_a_kill_between_two_renames_is_undone_without_leave_to_overwrite(place: Place, tmp_path: Path) -> None:
    """A run that was killed before the last rename is undone: the next one puts the old output back and refuses.

    A run that was killed after the last rename had finished: the next one finds the output of the same inputs there.
    """
    counted = Place(place.name, _made(tmp_path / "counted"), place.command)
    points = counted.replace(folder=counted.old.parent).points
    last = max(at for at, point in enumerate(points) if point == "replace")
    place.replace(folder=place.old.parent, at=last, signal=signal.SIGKILL)
    done = place.run(place.old)
    assert done.code == 6, done
    assert tree(place.old.parent) == place.before
    place.replace(folder=place.old.parent, at=last + 1, signal=signal.SIGKILL)
    done = place.run(place.old)
    assert done.code == 0, done
    assert tree(place.old.parent) == place.after


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_two_writers_of_one_place(tmp_path: Path) -> None:
    """One wins and the other says so; a writer of another place is not in the way."""
    with staged(tmp_path / "out") as path:
        path.write_bytes(b"first")
        with pytest.raises(StorageError, match="another process is writing here"), staged(tmp_path / "out"):
            pass
        with staged(tmp_path / "other") as other:
            other.write_bytes(b"other")
    assert tree(tmp_path) == {"out": b"first", "other": b"other"}


def test_four_conversions_to_one_folder(tmp_path: Path) -> None:
    adapter = save_peft(tmp_path / "adapter")
    script = "import sys, adapterkit.cli as cli; sys.stdin.read(); cli.main()"
    words = [sys.executable, "-c", script, "convert", str(adapter), str(tmp_path / "out"), "--to", "peft"]
    rivals = [subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for rival in rivals:
        rival.stdin.close()  # type: ignore[union-attr]
    ends = [(rival.wait(), rival.stderr.read()) for rival in rivals]  # type: ignore[union-attr]
    for rival in rivals:
        rival.stderr.close()  # type: ignore[union-attr]
    assert sorted({code for code, _ in ends}) in ([0, 6], [0]), ends
    assert all("writing here" in said or "already there" in said for code, said in ends if code)
    assert sorted(tree(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "out"]


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return path


def link_to_pipe(path: Path) -> Path:
    path.symlink_to(pipe(path.with_name("pipe")))
    return path


@pytest.mark.parametrize("special", [pipe, listening, link_to_pipe])
@pytest.mark.parametrize("form", ["peft", "adapterkit", "minlora"])
def test_what_is_no_file_or_folder_is_not_replaced(
    special: Callable[[Path], Path], form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # The name of a socket is short.
    adapter = save_peft(tmp_path / "adapter")
    out = special(Path("out"))
    before = os.lstat(out)
    done = run("convert", adapter, out, "--to", form, "--overwrite")
    assert done.exit_code == 6
    assert "neither a file nor a folder" in done.stderr
    assert os.path.samestat(before, os.lstat(out))


def test_files_in_a_folder_that_the_format_does_not_own_stay(tmp_path: Path) -> None:
    adapter, out = save_peft(tmp_path / "adapter"), save_peft(tmp_path / "out")
    (out / "README.md").write_text("mine")
    (out / "adapter_model.bin").write_text("PEFT's other form, which would be stale")
    (out / "runs" / "1").mkdir(parents=True)
    (out / "runs" / "1" / "log").write_text("kept")
    (out / "link").symlink_to("README.md")
    assert run("convert", adapter, out, "--to", "peft", "--overwrite").exit_code == 0
    assert (out / "link").is_symlink()
    assert sorted(tree(out)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "link", "runs", "runs/1", "runs/1/log"
    ]  # fmt: skip
    assert (out / "README.md").read_text() == "mine"


SOURCES = {
    "a file of the source": ("convert {dir} {dir}/adapter_model.safetensors --to adapterkit", 2),
    "the config beside the source": ("convert {dir}/adapter_model.safetensors {dir} --to mlx", 2),
    "by a link to the folder": ("convert {dir} {link}/adapter_model.safetensors --to adapterkit", 2),
    "by a hard link": ("convert {dir} {hard} --to adapterkit", 2),
    "by a link to the file": ("convert {dir} {soft} --to adapterkit", 2),
    "the folder by a link": ("convert {dir} {link} --to peft", 2),
    "the base's file": ("convert {dir} {base}/model.safetensors --to adapterkit --base {base}", 2),
    "the base's config": ("resize {dir} --rank 1 -o {base}/config.json --to adapterkit --base {base}", 2),
    "the second adapter": ("combine {other} {dir} -o {dir}/adapter_model.safetensors --to adapterkit", 2),
    "the tuned model": ("extract {tuned} --base {base} --rank 1 -o {tuned}/model.safetensors", 2),
    "beside the source": ("convert {dir} {dir}/taken --to adapterkit", 0),
}


@pytest.mark.parametrize("case", SOURCES)
def test_no_file_that_is_read_is_replaced(case: str, tmp_path: Path) -> None:
    words, code = SOURCES[case]
    names = {"dir": save_peft(tmp_path / "dir"), "other": save_peft(tmp_path / "other")}
    names |= {"base": save_base(tmp_path / "base"), "tuned": save_base(tmp_path / "tuned")}
    names |= {"link": tmp_path / "link", "soft": tmp_path / "soft", "hard": tmp_path / "hard"}
    names["link"].symlink_to(names["dir"])
    names["soft"].symlink_to(names["dir"] / "adapter_model.safetensors")
    os.link(names["dir"] / "adapter_model.safetensors", names["hard"])
    (names["dir"] / "taken").write_bytes(b"old")
    before = tree(tmp_path)
    done = run(*words.format(**names).split(), "--overwrite")
    assert done.exit_code == code, done.output
    if code:
        assert "read" in done.stderr or "the same" in done.stderr
        assert tree(tmp_path) == before


def test_python_does_not_replace_what_an_adapter_still_reads(tmp_path: Path) -> None:
    adapter = ak.read(save_peft(tmp_path / "adapter"))
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="replace its input"):
        ak.write(adapter, tmp_path / "adapter", "peft")
    assert tree(tmp_path) == before


def test_a_file_beside_that_belongs_to_another_output_is_not_replaced(tmp_path: Path) -> None:
    adapter = ak.read(save_peft(tmp_path / "adapter"))
    ak.write(adapter, tmp_path / "out" / "one.pt", "minlora")
    ak.write(adapter, tmp_path / "out" / "two.pt", "minlora")
    scaled = ak.ops.scale(adapter, 2.0)
    before = tree(tmp_path / "out")
    with pytest.raises(UsageError, match="it belongs to a file other than three") as raised:
        ak.write(scaled, tmp_path / "out" / "three.pt", "minlora")
    assert raised.value.path == str(tmp_path / "out" / "minlora.json")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("foreign", [False, True])
def test_a_folder_that_cannot_be_renamed_is_filled(
    foreign: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a volume that is mounted into a container."""
    adapter, out = ak.read(save_peft(tmp_path / "adapter")), tmp_path / "out"
    out.mkdir()
    if foreign:
        save_peft(tmp_path / "was")
        (tmp_path / "was" / "adapter_model.bin").write_text("stale")
        for file in (tmp_path / "was").iterdir():
            file.rename(out / file.name)
        (out / "README.md").write_text("mine")
    inode = out.stat().st_ino
    monkeypatch.setattr(staging.os.path, "ismount", lambda path: Path(path) == out)
    ak.write(adapter, out, "peft")
    assert out.stat().st_ino == inode
    own = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(tree(out)) == (["README.md", *own] if foreign else own)


def test_a_second_rename_that_fails_puts_the_old_output_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, out = ak.read(save_peft(tmp_path / "adapter")), save_peft(tmp_path / "out")
    (out / "README.md").write_text("mine")
    before, real = tree(tmp_path), os.replace

    def failing(source: object, target: object) -> None:
        if Path(str(target)) == out and ".writing" in str(source) and "replaced" not in str(source):
            raise OSError(5, "Input/output error")
        real(str(source), str(target))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StorageError, match="input/output error"):
        ak.write(adapter, out, "peft")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("aside", [True, False], ids=["overwritten", "renamed"])
def test_the_error_names_the_old_output_if_it_cannot_be_moved_back(
    aside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model.onnx"
    out.write_text("old")
    stage = staging.Staging(out)
    with stage.locked():
        if aside:
            stage.set_aside()
            out.unlink()
        else:  # As a run that was killed between the two renames of two files.
            kept, new = stage.folder / "replaced" / out.name, stage.folder / "new"
            kept.parent.mkdir()
            new.write_text("new")
            stage._write_journal([(new, out)], [(kept, out)])
            out.rename(kept)

        def failing(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(StorageError, match="cannot be moved back") as raised:
            stage.recover()
    named = re.search(r"output is in (.+) and cannot", str(raised.value))
    assert named is not None
    assert Path(named[1]).read_text() == "old"


def test_a_plug_in_that_writes_badly_leaves_nothing(tmp_path: Path) -> None:
    class Rude(Format):
        def write(self, adapter: ak.Adapter, path: Path, **_: object) -> list[str]:
            path.mkdir()
            (path / "half").write_bytes(b"half")
            raise RuntimeError("gave up")

    adapter = ak.read(save_peft(tmp_path / "adapter"))
    before = tree(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMATS._loaded, "rude", Rude)
        with pytest.raises(RuntimeError, match="gave up"):
            ak.write(adapter, tmp_path / "made" / "out", "rude")
    assert tree(tmp_path) == before

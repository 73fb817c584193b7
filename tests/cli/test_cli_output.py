"""What the command line prints: tables, JSON and progress."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterkit.cli import _progress
from adapterkit.cli._options import CliSettings
from adapterkit.cli._render import TextTable, as_json, cell, printable, show, size

ROOT = Path(__file__).resolve().parents[2]


def test_a_plain_table_is_aligned_and_drops_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    table = TextTable(("name", "note", "count"), [("a", None, 5), ("longer", "", 12_345)])
    show(CliSettings(), {}, lambda _: [table, "end"])
    assert capsys.readouterr().out == "name     count\na            5\nlonger  12,345\nend\n"


def test_json_is_one_document_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    show(CliSettings(json=True), {"a": 1}, lambda _: pytest.fail("the view is for people"))
    assert json.loads(capsys.readouterr().out) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (math.nan, None), (-math.inf, None), (Path("a"), "a"), ((1, 2), [1, 2]), ({1: Path("b")}, {"1": "b"}),
        (True, True), ("\ud800", "\ud800"),
    ],
)  # fmt: skip
def test_json_of_what_json_does_not_know(value: object, plain: object) -> None:
    assert json.loads(as_json({"v": value})) == {"v": plain}


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (True, "yes"), (False, "no"), (12345, "12,345"), (0.5, "0.5"), ("a\tb", "a\\tb")]
)
def test_cells(value: object, text: str) -> None:
    assert cell(value) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB"), (5 * 10**9, "5 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_printable_keeps_letters_of_every_script() -> None:
    assert printable("größe 層 ab") == "größe 層 ab"
    assert printable("a\x9bb\x7f\u202e") == r"a\x9bb\x7f\u202e"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("adapterkit.cli._progress.time.monotonic", clock)
    return clock


def test_plain_progress_is_a_line_every_few_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.progress(CliSettings(), "merge") as meter:
        for second in range(17):
            clock.now = 100.0 + second
            meter(second * 10**9, 16 * 10**9)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "merge: 31%, 5 GB of 16 GB, 1 GB/s, 0:11 left",
        "merge: 62%, 10 GB of 16 GB, 1 GB/s, 0:06 left",
        "merge: 94%, 15 GB of 16 GB, 1 GB/s, 0:01 left",
    ]


def test_short_work_and_quiet_work_show_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with _progress.progress(CliSettings(), "merge") as meter:
        meter(1, 2)
        clock.now += 4.9
        meter(2, 2)
    with _progress.progress(CliSettings(quiet=True), "merge") as meter:
        assert meter is None
    assert capsys.readouterr().err == ""


def test_progress_of_nothing_does_not_divide_by_it() -> None:
    assert _progress.line("verify", 0, 0, 0.0) == "verify: 100%, 0 B of 0 B, 0 B/s"
    assert _progress.line("verify", 200, 7400, 200.0).endswith("2:00:00 left")
    assert _progress.line("verify", 1, 7201, 1.0) == "verify: 0%, 1 B of 7.2 kB, 1 B/s"


BAR = """
import sys
from adapterkit.cli import _progress
from adapterkit.cli._options import CliSettings
_progress.DELAY = float(sys.argv[1])
with _progress.progress(CliSettings(), "merge") as meter:
    meter(1_000_000, 4_000_000)
    meter(4_000_000, 4_000_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("delay", "drawn"), [("0", True), ("60", False)])
def test_a_terminal_gets_a_bar_when_work_is_long(delay: str, drawn: bool) -> None:
    import pty

    parent, child = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", BAR, delay], stdout=subprocess.PIPE, stderr=child, env=env, check=True)
    os.set_blocking(parent, False)
    try:
        text = os.read(parent, 1 << 16).decode()
    except BlockingIOError:
        text = ""
    os.close(child)
    os.close(parent)
    assert done.stdout == b""
    assert ("4.0/4.0 MB" in text) == drawn
    assert ("merge" in text) == drawn

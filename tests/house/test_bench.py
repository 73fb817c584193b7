"""Benchmarks start without options; what they measure is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from compiled_loops import needs_loops
from tool_modules import tool_module

ROOT = Path(__file__).parents[2]


def test_converting_is_measured_in_a_temporary_folder():
    command = [sys.executable, ROOT / "tools" / "bench", "convert", "--rounds", "1", "--modules", "10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "PEFT to kohya" in result.stdout


@needs_loops
def test_all_benchmarks_make_one_record_and_one_page(tmp_path):
    command = [sys.executable, ROOT / "tools" / "bench", "all", "--only", "kernel", "--rounds", "2"]
    first = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True, check=False, timeout=300)
    assert first.returncode == 0, first.stderr
    record = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    (bench,) = record["benchmarks"]
    assert all(len(figure["values"]) == 2 for figure in bench["figures"])
    slow = bench["figures"][0]
    slow["values"] = [value / 1000 for value in slow["values"]]
    (tmp_path / "old.json").write_text(json.dumps(record), "utf-8")
    again = subprocess.run(
        [*command, "--out", tmp_path / "again", "--against", tmp_path / "old.json"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert again.returncode == 1
    assert f"worse: kernel: {slow['name']}" in again.stdout
    page = (tmp_path / "again" / "bench.html").read_text("utf-8")
    assert 'class="worse"' in page
    assert slow["name"] in page


@pytest.mark.parametrize(
    ("old", "new", "more", "expected"),
    [
        ([1.0, 1.1], [1.3, 1.4], False, True),
        ([1.0, 1.1], [1.09, 1.4], False, False),
        ([1.0, 1.1], [1.12, 1.13], False, False),
        ([1.0, 1.1], [0.5, 0.6], False, False),
        ([3.0, 3.1], [2.0, 2.1], True, True),
        ([3.0, 3.1], [4.0, 4.1], True, False),
    ],
)
def test_a_figure_is_worse_if_its_rounds_lie_apart_and_the_median_by_a_tenth(old, new, more, expected):
    figures = tool_module("bench/rig/figures.py")
    one, other = (figures.Figure("f", tuple(values), "s", more) for values in (old, new))
    assert figures.worse(one, other) is expected

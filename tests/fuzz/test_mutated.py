"""Mutated files of every container, and inputs that once were handled wrongly, in processes that may not do harm.

`tools/fuzz` does the work; `python tools/fuzz --seconds 3600` goes on for longer than the suite does.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource")

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "tools" / "fuzz"
INPUTS = 400
CORPUS = sorted(path.parent for path in (Path(__file__).parent / "corpus").glob("*/case.json"))


def fuzz(keep, *words):
    """What the tool reports."""
    command = [sys.executable, str(TOOL), "--json", "--keep", str(keep), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode in (0, 1), result.stderr
    return json.loads(result.stdout)


def told(report):
    """Each finding with its traceback, for the message of a failing test."""
    return "\n\n".join(f"{key}\n{report['details'][key]['detail']}" for key in report["findings"])


def test_mutated_files_are_refused_by_typed_errors_and_do_no_harm(tmp_path):
    report = fuzz(tmp_path, "--inputs", INPUTS)
    assert report["inputs"] == INPUTS
    assert not report["findings"], told(report)
    # Most are refused, but not all at the first look: what is behind the parsers is reached too.
    assert report["steps"]["read as: refused"] > INPUTS // 10
    assert report["steps"]["write native"] > INPUTS // 10
    assert report["steps"]["merge"] > INPUTS // 20


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    report = fuzz(tmp_path_factory.mktemp("kept"), "--replay", *CORPUS)
    return {result["done"]: result["findings"] for result in report["results"]}


@pytest.mark.parametrize("name", [folder.name for folder in CORPUS])
def test_an_input_that_once_was_handled_wrongly(name, replayed):
    assert [finding["detail"] for finding in replayed[name]] == []


def test_the_same_number_is_the_same_input():
    script = (
        f"import sys; sys.path[:0] = [{str(TOOL)!r}, {str(ROOT)!r}]\n"
        "from seeds import seeds; from worker import Maker\n"
        "maker = Maker(seeds(), 5); print([maker.make(n).digest() for n in range(150)])"
    )
    runs = {
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in "ab"
    }
    assert len(runs) == 1
    assert len(set(json.loads(runs.pop().replace("'", '"')))) > 130

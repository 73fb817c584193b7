"""The generated tables of README.md."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import adapterkit as ak

ROOT = Path(__file__).resolve().parent.parent
TABLES = ("methods", "formats", "matrix", "families", "combine", "quant", "commands")
BLOCKS = "# Title\n\n" + "".join(f"<!-- table:{n} -->\n<!-- /table -->\n" for n in TABLES)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_readme_is_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


def test_blocks_are_filled_and_the_rest_is_kept(tables: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(BLOCKS + "tail\n", "utf-8")
    assert tables.main(["--check", "--readme", str(readme)]) == 1
    assert readme.read_text("utf-8") == BLOCKS + "tail\n"
    assert tables.main(["--readme", str(readme)]) == 0
    text = readme.read_text("utf-8")
    assert text.startswith("# Title\n")
    assert text.endswith("tail\n")
    assert tables.main(["--check", "--readme", str(readme)]) == 0
    rows = re.findall(r"^\| \[?`(?:adapterkit )?(\w+)", text, re.MULTILINE)
    assert {*ak.METHODS, *ak.FORMATS, *ak.ops.COMBINERS, "merge", "doctor"} <= {*rows}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "is not there"),
        ("nothing", "<!-- table:combine -->"),
        (BLOCKS + "<!-- table:colours -->\n<!-- /table -->\n", "unknown table 'colours'"),
    ],
)
def test_what_is_missing_is_said(
    text: str | None, why: str, tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    if text is not None:
        readme.write_text(text, "utf-8")
    assert tables.main(["--readme", str(readme)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err

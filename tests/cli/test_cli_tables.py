"""The generated tables of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from tool_modules import tool_module

import adapterkit as ak

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = "# Title\n\n" + "".join(f"<!-- table:{n} -->\n<!-- /table -->\n" for n in tool_module("tables.py").TABLES)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return tool_module("tables.py")


def test_the_pages_are_up_to_date(tables: ModuleType) -> None:
    assert tables.main(["--check"]) == 0


def test_blocks_are_filled_and_the_rest_is_kept(tables: ModuleType, tmp_path: Path) -> None:
    pages = [tmp_path / "one.md", tmp_path / "more" / "two.md"]
    pages[1].parent.mkdir()
    first, rest = BLOCKS.split("<!-- table:formats -->")
    texts = [first, f"<!-- table:formats -->{rest}tail\n"]
    for page, text in zip(pages, texts, strict=True):
        page.write_text(text, "utf-8")
    assert tables.main(["--check", "--docs", str(tmp_path)]) == 1
    assert [page.read_text("utf-8") for page in pages] == texts
    assert tables.main(["--docs", str(tmp_path)]) == 0
    found = [page.read_text("utf-8") for page in pages]
    assert found[0].startswith("# Title\n")
    assert found[1].endswith("tail\n")
    assert tables.main(["--check", "--docs", str(tmp_path)]) == 0
    rows = re.findall(r"^\| \[?`(?:adapterkit )?(\w+)", "".join(found), re.MULTILINE)
    assert {*ak.METHODS, *ak.FORMATS, *ak.ops.COMBINERS, "merge", "doctor"} <= {*rows}


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ([], "<!-- table:authors -->"),
        (["nothing"], "<!-- table:authors -->"),
        ([BLOCKS + "<!-- table:colours -->\n<!-- /table -->\n"], "unknown table 'colours'"),
        ([BLOCKS, "<!-- table:quant -->\n<!-- /table -->\n"], "'quant' is in more than one page"),
    ],
)
def test_what_is_missing_is_said(
    texts: list[str], why: str, tables: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.md").write_text(text, "utf-8")
    assert tables.main(["--docs", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err

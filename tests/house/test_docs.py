"""The documentation: its code runs, its links lead somewhere, and its generated pages cover every entry."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from command_line import run
from tool_modules import tool_module

import adapterkit as ak
from adapterkit import errors as ak_errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {"README.md": ROOT / "README.md", **{page.name: page for page in sorted(DOCS.glob("*.md"))}}
BLOCK = re.compile(r"^```(sh|python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
RUN = (
    "README.md", "index.md", "tasks.md", "reports.md", "concepts.md", "recipes.md", "configuration.md", "faq.md",
)  # fmt: skip
"""Pages whose code is run as it stands, from the top, in a folder with a base and two adapters. The code of others
needs hubs or devices; tests of those areas run the same calls. test_docs_python.py runs python.md."""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return tool_module("site.py")


@pytest.fixture(scope="module")
def pages(tool: ModuleType) -> dict[str, str]:
    return tool.pages()


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(ak.__file__).parent / "demo" / "data"
    for there, here in (("base", "base"), ("rotated", "lora"), ("negative", "other")):
        shutil.copytree(data / there, tmp_path / here)
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(PAGES[name].read_text("utf-8"))
    assert blocks
    for language, code in blocks:
        if language == "yaml":  # A file, named by its first line.
            Path(code.split()[1]).write_text(code, "utf-8")
            continue
        if language == "python":
            exec(compile(code, name, "exec"), {})
            continue
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if not words or words[0] != "adapterkit":
                assert not words or words[0] in ("pip", "tools/try", "tools/check"), line
                continue
            words, _, file = (words[1:-2], ">", words[-1]) if ">" in words else (words[1:], "", "")
            done = run(*words)
            assert done.exit_code == 0, (line, done.output)
            if file:
                Path(file).write_text(done.stdout, "utf-8")


def test_the_readme_is_short_and_its_links_lead_somewhere(pages: dict[str, str]) -> None:
    assert len(PAGES["README.md"].read_text("utf-8").splitlines()) <= 150
    for name, page in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            target = link.partition("#")[0]
            if not target or target.startswith(("https://", "http://")):
                continue
            there = page.parent / target
            assert there.exists() or target in pages, f"{name}: {link}"


def test_every_method_format_and_combiner_has_a_page(pages: dict[str, str]) -> None:
    for kind, names in (("methods", ak.METHODS), ("formats", ak.FORMATS), ("combiners", ak.ops.COMBINERS)):
        assert {f"reference/{kind}/{name}.md" for name in names} <= pages.keys()
    for path, text in pages.items():
        assert text.startswith("# "), path
        for link in re.findall(r"\]\((\.\./[^)]+\.md)\)", text):
            there = (Path("/") / path).parent.joinpath(link).resolve().relative_to("/")
            assert str(there) in pages, f"{path}: {link}"
    assert "A" in pages["reference/methods/lora.md"]
    errors = pages["reference/errors.md"]
    codes = {each.code for each in vars(ak_errors).values() if isinstance(each, type) and hasattr(each, "exit_code")}
    assert {code for code in codes - {"error"} if errors.count(f"| `{code}` |") != 2} == set()
    for name in ("1-first-merge", "2-combining", "3-onnx-swapping"):
        assert "```python" in pages[f"notebooks/{name}.md"]
    assert "## sum.yml" in pages["examples.md"]
    assert "## ak.merge" in pages["reference/python.md"]
    assert "--on-loss" in pages["reference/commands.md"]


def test_the_speed_chart_shows_the_numbers_of_the_table() -> None:
    module = tool_module("pictures.py")
    rows = {row["tool"]: row for row in module.measured((DOCS / "benchmarks.md").read_text("utf-8"))}
    assert rows["adapterkit merge"]["seconds"] < rows["PEFT"]["seconds"]
    alternative = re.search(r"!\[Merging.*?\]", PAGES["README.md"].read_text("utf-8"))
    assert alternative is not None
    for tool_name, number in re.findall(r"(adapterkit|PEFT) ([\d.]+) s", alternative[0]):
        row = next(row for name, row in rows.items() if name.startswith(tool_name))
        assert row["seconds"] == float(number)


def test_the_specification_is_part_of_the_site(pages: dict[str, str]) -> None:
    """Every link of its pages leads to a page, to a file of docs/, or to a file that the repository has."""
    text = pages["specification/index.md"]
    assert {f"**R-{number}**" for number in ("3.1", "8.1", "13.3")} <= set(re.findall(r"\*\*R-[\d.]+\*\*", text))
    blob = "https://github.com/adapterkit/adapterkit/blob/main/"
    found = [(path, link) for path in pages if path.startswith("specification/") for link in LINK.findall(pages[path])]
    assert ("specification/adopting.md", "../check.html") in found
    for path, link in found:
        inside = str((Path("/") / path).parent.joinpath(link).resolve().relative_to("/"))
        there = ROOT / link.removeprefix(blob) if link.startswith(blob) else DOCS / inside
        assert there.exists() or inside in pages or link.startswith("https://huggingface.co/"), f"{path}: {link}"

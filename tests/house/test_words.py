"""Docstrings and comments open with their subject: no sentence starts with "Of a ...", "What ..." or "Whoever ..."."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adapterkit"
PARTS = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
)
INVERTED = re.compile(r"(?:Of|What|Whatever|Whoever|Where|Whose) ")
"""Openings that put a clause in place of the subject, so that the reader must wait for the verb."""

_ENTRY = re.compile(r"(?m)^\s*\w+: (?=of )")
"""An entry of an Args list, such as `name: of the repository`; `mode: what to do` is a plain noun phrase."""

_END = re.compile(r"(?<=[.:;!?])\s+(?=[A-Z])")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a docstring or comment; an entry of an Args list starts one, too."""
    text = _ENTRY.sub(lambda entry: f"\n\n{entry[0]}\n\n^", text)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _END.split(" ".join(paragraph.split())):
            yield sentence[1:].capitalize() if sentence.startswith("^") else sentence


def documentation(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring, attribute docstring and comment; adjacent comment lines are one text."""
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():  # The body of a lambda is one expression.
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value
    comments: list[tuple[int, str]] = []
    previous = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("# ")
        alone = token.line.lstrip().startswith("#")
        if alone and line == previous + 1:
            comments[-1] = (comments[-1][0], f"{comments[-1][1]} {text}")
        else:
            comments.append((line, text))
        previous = line if alone else -1
    yield from comments


def inverted(source: str) -> list[str]:
    """Return each sentence with a forbidden opening as `line: sentence`; questions may start with "What"."""
    found = ((line, each) for line, text in documentation(source) for each in sentences(text))
    return [f"{line}: {each[:100]}" for line, each in found if INVERTED.match(each) and not each.endswith("?")]


@pytest.mark.parametrize("part", PARTS)
def test_sentences_begin_with_their_subject(part: str) -> None:
    path = PACKAGE / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    found = [f"{file.relative_to(PACKAGE)}:{each}" for file in files for each in inverted(file.read_text("utf-8"))]
    assert not found, "begin these sentences with their subject:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Return the rows. Of a base the first."""', 1),
        ('"""What a file holds."""', 1),
        ('def f():\n    """Do.\n\n    Args:\n        x: of the base.\n        y: the file.\n    """', 1),
        ('X = 1\n"""Where the file lies."""', 1),
        ("x = 1  # Whoever reads it waits.", 1),
        ("# The reader waits.\n# What it reads is old.", 1),
        ('"""What is a rank? The inner size."""', 0),
        ('"""Return what was read, and where."""', 0),
        ("x = 'What is not prose.'", 0),
        ('def f():\n    """Do.\n\n    Args:\n        x: what to read.\n    """', 0),
    ],
)
def test_the_check_finds_inverted_sentences(source: str, count: int) -> None:
    assert len(inverted(source)) == count


FILLER = {"found", "held", "law", "laws", "made", "own", "said", "told"}
"""Names that do not say what a variable contains: use the thing, such as `match` or `weights`."""

PUBLIC = {"cli/doctor.py": {"found"}, "onnx/report.py": {"found"}}
"""Attributes of a public class and of `doctor --json` keep their names."""


def filler_names(source: str) -> set[str]:
    """Return each variable, parameter, function, class and attribute of a file that has a name of `FILLER`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return {name for name in names if name.strip("_").lower() in FILLER}


@pytest.mark.parametrize("part", PARTS)
def test_names_say_what_they_contain(part: str) -> None:
    named = {}
    for path in (
        [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).rglob("*.py"))
    ):
        where = path.relative_to(PACKAGE).as_posix()
        if filler := filler_names(path.read_text("utf-8")) - PUBLIC.get(where, set()):
            named[where] = sorted(filler)
    assert not named


@pytest.mark.parametrize(
    "source", ["def told(): ...", "class Law: ...", "found = 1", "self.held = 1", "lambda own: own", "_made: int = 1"]
)
def test_a_name_without_meaning_is_noticed(source: str) -> None:
    assert filler_names(source)


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(PACKAGE).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}

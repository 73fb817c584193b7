"""Run the cells of the notebooks in docs/notebooks in order, and store their outputs in the files.

    tools/notebooks.py           run all, write their outputs
    tools/notebooks.py --check   run all, write nothing; fails where a cell fails

A notebook runs as in Jupyter: in one namespace, and the value of a cell's last expression is shown by its `_repr_html_`
or `repr`. Only this output is stored, so the files have no times, paths or execution counters.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"
LARGEST = 200_000
"""Largest HTML output that is stored, in characters; instead of a larger output, the `repr` is stored."""


def notebooks() -> list[Path]:
    """Return the notebooks, sorted by name."""
    return sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path) -> dict[str, Any]:
    """Run a notebook in a new working folder, and return the notebook with its outputs.

    Raises:
        Exception: whatever a cell raises, with a note that names the cell.
    """
    book: dict[str, Any] = json.loads(path.read_text("utf-8"))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    with _elsewhere():
        for number, cell in enumerate(book["cells"]):
            if cell["cell_type"] != "code":
                continue
            try:
                cell["outputs"] = _run("".join(cell["source"]), namespace, f"{path.name}, cell {number}")
            except Exception as error:
                error.add_note(f"in {path.name}, cell {number}")
                raise
            cell["execution_count"] = None
    return book


@contextlib.contextmanager
def _elsewhere() -> Iterator[None]:
    """Change to a new working folder, so that notebooks can write files."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="notebook-") as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _run(source: str, namespace: dict[str, Any], name: str) -> list[dict[str, Any]]:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None and not source.rstrip().endswith(";"):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)  # type: ignore[attr-defined]
        elif last is not None:
            exec(compile(ast.Module([last], []), name, "exec"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(True)}
        html = value._repr_html_() if hasattr(value, "_repr_html_") else None
        if html is not None and len(html) <= LARGEST:
            data["text/html"] = html.splitlines(True)
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return outputs


def main() -> None:
    """Run all notebooks."""
    sys.path.insert(0, str(ROOT))
    for path in notebooks():
        book = executed(path)
        if "--check" not in sys.argv:
            path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", "utf-8")
        print(f"{path.name}: {sum(cell['cell_type'] == 'code' for cell in book['cells'])} cells")


if __name__ == "__main__":
    main()

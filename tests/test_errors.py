"""Errors: the root class is never raised itself, so that every error has a code that says what kind it is."""

from __future__ import annotations

import ast
from pathlib import Path

import adapterkit


def test_the_root_of_the_errors_is_not_raised() -> None:
    bare = []
    for file in sorted(Path(adapterkit.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                bare += [f"{file}:{node.lineno}"] if name == "AdapterkitError" else []
    assert not bare, "choose a subclass of AdapterkitError"

"""Errors: the root class is never raised itself, so that every error has a code that says what kind it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import adapterkit
from adapterkit.cli import adapterkit as adapterkit_cli


def test_the_root_of_the_errors_is_not_raised() -> None:
    bare = []
    for file in sorted(Path(adapterkit.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                bare += [f"{file}:{node.lineno}"] if name == "AdapterkitError" else []
    assert not bare, "choose a subclass of AdapterkitError"


def options() -> dict[str, set[str]]:
    """Name of a parameter of the commands -> the options that set it."""
    found: dict[str, set[str]] = {}
    for name in adapterkit_cli.list_commands(None):  # type: ignore[arg-type]
        for param in adapterkit_cli.get_command(None, name).params:  # type: ignore[arg-type, union-attr]
            found.setdefault(str(param.name), set()).update(
                o for o in (*param.opts, *param.secondary_opts) if o.startswith("-")
            )
    return {name: given for name, given in found.items() if given}


def cures(file: Path) -> Iterator[tuple[int, str]]:
    """The literal text of each `cure=` of a module, those that are named constants of it included."""
    tree = ast.parse(file.read_text("utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        told = [k.value for k in node.keywords if k.arg == "cure"] if isinstance(node, ast.Call) else []
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["cure"]:
            told = [node.value]
        for value in told:
            held = constants.get(value.id, value) if isinstance(value, ast.Name) else value
            yield (
                node.lineno,
                "".join(
                    part.value
                    for part in ast.walk(held)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ),
            )


ARGUMENT = re.compile(r"(?<![\w-])([a-z_]+)=")
"""An argument of Python's as cures name it: `base=`, `on_loss='fold'`."""

LIVE = {"methods", "torch"}
"""Rooms whose arguments no command has: those of methods that are made, and of live models."""

OTHERS = {
    "data": "samples that are a function", "density": "--set density=0.5", "index": "a method's",
    "scope": "--set scope", "layout": "a live model's", "optimize": "torch's", "save_projection": "PEFT's",
    "save_indices": "PEFT's", "shadow_model": "PEFT's", "per": "a method's",
}  # fmt: skip
"""Words of cures that are no argument which a command has, and what they are."""


def test_a_cure_that_names_an_argument_names_the_option() -> None:
    """A user of the command line cannot type `base=`; a command that has the argument as an option is named, too."""
    known, missing = options(), []
    assert {"base", "on_loss", "strict_base", "allow_partial", "quantized"} <= known.keys()
    for file in sorted(Path(adapterkit.__file__).parent.rglob("*.py")):
        if file.relative_to(Path(adapterkit.__file__).parent).parts[0] in LIVE:
            continue
        for line, text in cures(file):
            named = {name for name in ARGUMENT.findall(text) if name in known and name not in OTHERS}
            if any(not any(option in text for option in known[name]) for name in named):
                missing.append(f"{file}:{line}: {text[:100]}")
    assert not missing, "\n".join(missing)


def test_a_cure_that_names_an_option_of_a_choice_names_the_argument() -> None:
    """Below the command line a cure that has `--allow-partial` has `allow_partial=` too: libraries have no flags."""
    known = {option: name for name, given in options().items() for option in given if option.startswith("--")}
    missing = []
    for file in sorted(Path(adapterkit.__file__).parent.rglob("*.py")):
        if file.relative_to(Path(adapterkit.__file__).parent).parts[0] == "cli":
            continue
        for line, text in cures(file):
            named = {option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text) if option in ARGUED}
            if any(f"{known[option]}=" not in text for option in named):
                missing.append(f"{file}:{line}: {text[:100]}")
    assert not missing, "\n".join(missing)


ARGUED = {
    "--base", "--on-loss", "--strict-base", "--allow-partial", "--quantized", "--strict", "--match-base", "--tied",
}  # fmt: skip
"""Options whose argument has their name everywhere."""

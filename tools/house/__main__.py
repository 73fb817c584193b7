#!/usr/bin/env python
"""Figures of the package's structure: sizes, what a command runs, circles of imports, types, comments.

    python tools/house                 print them
    python tools/house --json          the same for machines
    python tools/house --against FILE  beside those of an earlier `--json`

They describe, they do not judge: no limit is enforced. What a merge, a read and a convert run is counted in a process
of its own, with a LoRA of one target in PEFT's format. Code that runs while a module is imported is not counted.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "adapterkit"
HARD = ("merging", "ops", "io", "onnx", "hub")
"""Packages with difficult code, in which comments that give reasons are most useful."""

TRACED = """
import json, sys, threading
from pathlib import Path
folder, verb, root = sys.argv[1:4]
entered = set()
def trace(frame, event, _):
    if event == "call" and frame.f_code.co_filename.startswith(root) and not imports(frame):
        entered.add((frame.f_code.co_filename, frame.f_code.co_qualname))
def imports(frame):
    # Class bodies and decorators of a module that is being imported are not steps of the command.
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(root):
            return True
        frame = frame.f_back
    return False
sys.setprofile(trace)
threading.setprofile(trace)
from adapterkit.cli import main
words = {
    "merge": ["merge", f"{folder}/base.safetensors", f"{folder}/lora", "-o", f"{folder}/merged.safetensors"],
    "read": ["inspect", f"{folder}/lora"],
    "convert": ["convert", f"{folder}/lora", f"{folder}/out.safetensors", "--to", "adapterkit"],
}[verb]
sys.argv = ["adapterkit", *words, "--quiet"]
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
sys.setprofile(None)
files = {}
for file, function in entered:
    files.setdefault(file, set()).add(function.partition(".<locals>")[0].rpartition(".")[2])
# Detecting a format asks every format once; files that run for nothing else are counted apart.
asked = [file for file, functions in files.items() if file.startswith(f"{root}/formats/") and functions == {"sniff"}]
print("FIGURES", json.dumps({"files": len(files), "functions": len(entered), "files that only detect": len(asked)}))
"""


def modules() -> list[Path]:
    """Return the package's files."""
    return sorted(PACKAGE.rglob("*.py"))


def sizes(trees: dict[Path, ast.Module]) -> dict[str, Any]:
    """Return the numbers of modules and functions, and their sizes in lines."""
    files = [len(path.read_text("utf-8").splitlines()) for path in trees]
    functions = [node.end_lineno - node.lineno + 1 for tree in trees.values() for node in functions_of(tree)]
    return {
        "modules": len(files), "lines": sum(files),
        "module, median": statistics.median(files), "module, 90 %": percentile(files),
        "functions": len(functions),
        "function, median": statistics.median(functions), "function, 90 %": percentile(functions),
    }  # fmt: skip


def percentile(numbers: list[int]) -> int:
    """Return the 90th percentile."""
    return sorted(numbers)[len(numbers) * 9 // 10]


def functions_of(tree: ast.AST) -> Iterator[Any]:
    """Return all functions and methods."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def single_use(trees: dict[Path, ast.Module]) -> dict[str, Any]:
    """Return the number of private functions, and of those that are used only once in their module."""
    private = once = 0
    for tree in trees.values():
        named = Counter(
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Name | ast.Attribute)
        )
        names = [f.name for f in functions_of(tree) if f.name.startswith("_") and not f.name.startswith("__")]
        private += len(names)
        once += sum(named[name] == 1 for name in names)
    return {"private functions": private, "of these named once, %": round(100 * once / private, 1)}


def typed(trees: dict[Path, ast.Module]) -> dict[str, Any]:
    """Return the fraction of signatures with `Any`."""
    with_any = total = public = 0
    for tree in trees.values():
        for node in functions_of(tree):
            total += 1
            arguments = [
                *node.args.posonlyargs,
                *node.args.args,
                *node.args.kwonlyargs,
                node.args.vararg,
                node.args.kwarg,
            ]
            notes = [a.annotation for a in arguments if a is not None and a.annotation is not None]
            notes += [node.returns] if node.returns is not None else []
            if any(isinstance(each, ast.Name) and each.id == "Any" for note in notes for each in ast.walk(note)):
                with_any += 1
                public += not node.name.startswith("_")
    return {"signatures with Any, %": round(100 * with_any / total, 1), "public ones with Any": public}


def comments() -> dict[str, Any]:
    """Return the comments per 1,000 lines, in all packages and in difficult ones; without directives for tools."""
    found = {}
    for name, folder in {"all": PACKAGE, **{name: PACKAGE / name for name in HARD}}.items():
        lines = count = 0
        for path in folder.rglob("*.py"):
            text = path.read_text("utf-8")
            lines += len(text.splitlines())
            tokens = tokenize.generate_tokens(io.StringIO(text).readline)
            count += sum(
                token.type == tokenize.COMMENT and not token.string.startswith(("# fmt:", "# noqa", "# type:", "#!"))
                for token in tokens
            )
        found[f"comments for 1,000 lines, {name}"] = round(1000 * count / lines, 1)
    return found


def circles_of(trees: dict[Path, ast.Module]) -> list[list[str]]:
    """Return the circles of imports, including imports in functions and for types, as lists of modules."""
    names = {name_of(path): path for path in trees}
    edges = {name: set(imported(name, path, trees[path], names)) for name, path in names.items()}
    return [sorted(group) for group in components(edges) if len(group) > 1]


def circles(trees: dict[Path, ast.Module]) -> dict[str, Any]:
    """Return the number of circles of imports, and the largest circle."""
    groups = circles_of(trees)
    return {
        "circles of imports": len(groups),
        "modules in the largest circle": max(map(len, groups), default=0),
        "circles of more than two": sum(len(group) > 2 for group in groups),
    }


def name_of(path: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str, path: Path, tree: ast.Module, names: dict[str, Path]) -> Iterator[str]:
    """Return the package's modules that a module imports anywhere."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        steps = node.level - (path.name == "__init__.py")
        start = name.split(".")[: len(name.split(".")) - steps]
        base = ".".join([*start, *([node.module] if node.module else [])])
        for alias in node.names:
            target = f"{base}.{alias.name}" if f"{base}.{alias.name}" in names else base
            if target in names and target != name and not name.startswith(f"{target}."):
                yield target


def components(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components, by Tarjan's algorithm without recursion."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    held: set[str] = set()
    found: list[list[str]] = []
    for root in edges:
        if root in order:
            continue
        work = [(root, iter(edges[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        held.add(root)
        while work:
            node, rest = work[-1]
            follow = next((each for each in rest if each not in order or each in held), None)
            if follow is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    group = []
                    while not group or group[-1] != node:
                        group.append(stack.pop())
                        held.discard(group[-1])
                    found.append(group)
            elif follow in order:
                low[node] = min(low[node], order[follow])
            else:
                order[follow] = low[follow] = len(order)
                stack.append(follow)
                held.add(follow)
                work.append((follow, iter(edges[follow])))
    return found


def entered() -> dict[str, Any]:
    """Return the files and functions of the package that a merge, a read and a convert of one LoRA tensor execute."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs(Path(folder))
        for verb in ("merge", "read", "convert"):
            command = [sys.executable, "-c", TRACED, folder, verb, str(PACKAGE)]
            run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            line = next((line for line in run.stdout.splitlines() if line.startswith("FIGURES")), None)
            if line is None:
                raise SystemExit(f"{verb}: {run.stderr}")
            for noun, count in json.loads(line.partition(" ")[2]).items():
                figures[f"{noun} entered by a {verb}"] = count
    return figures


def inputs(folder: Path) -> None:
    """Write a base of one weight, and a LoRA for it in PEFT's format."""
    import numpy as np
    from safetensors.numpy import save_file

    ones = np.ones((2, 4), "f4")
    (folder / "lora").mkdir()
    save_file({"model.q_proj.weight": np.ones((4, 4), "f4")}, folder / "base.safetensors", {"format": "pt"})
    keys = {"base_model.model.model.q_proj.lora_A.weight": ones, "base_model.model.model.q_proj.lora_B.weight": ones.T}
    save_file({key: np.ascontiguousarray(value) for key, value in keys.items()},
              folder / "lora" / "adapter_model.safetensors", {"format": "pt"})  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def figures() -> dict[str, Any]:
    """Return all figures, by name."""
    trees = {path: ast.parse(path.read_text("utf-8")) for path in modules()}
    return sizes(trees) | single_use(trees) | typed(trees) | comments() | circles(trees) | entered()


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="figures of another commit, as --json printed them"
    )
    chosen = parser.parse_args()
    found = figures()
    if chosen.json:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(chosen.against.read_text("utf-8")) if chosen.against else {}
    for name, value in found.items():
        print(f"{name:45} {before.get(name, ''):>10} {value:>10,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run a reader of adapterkit files against the vectors of the specification (spec/README.md, section 16).

Any program takes part that gets a verb and paths and prints one line of JSON a path. Nothing of this package's own
reader of adapters is used to judge it: expectations are in the vectors.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError

BATCH = 100
"""Paths that a program gets at once."""

SECONDS = 300
"""Time that a program has for a batch."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one case.

    Attributes:
        case: its name in the index.
        requirements: what it tests.
        verb: what the program was asked.
        passed: whether the program did what was expected; None where it has no formula for the case.
        why: how it differs; empty where it passed.
    """

    case: str
    requirements: tuple[str, ...]
    verb: str
    passed: bool | None
    why: str = ""


def conformance(command: Sequence[str], suite: Path | None = None) -> list[Outcome]:
    """Run a program against all cases that a program can be asked, and return what became of each.

    Args:
        command: the program and its first arguments; a verb and paths are added.
        suite: the folder `vectors` of the specification; that of this checkout when not given.

    Raises:
        UsageError: there is no index of vectors.

    Example:
        >>> from adapterkit.conformance import conformance
        >>> outcomes = conformance(["node", "spec/readers/javascript/cli.mjs"])  # doctest: +SKIP
    """
    root = suite or Path(__file__).parents[1] / "spec" / "vectors"
    if not (root / "index.json").is_file():
        cure = "Give the folder spec/vectors of the specification: --suite DIR (suite=)"
        raise UsageError("no index.json of vectors", path=root, cure=cure)
    cases = json.loads((root / "index.json").read_text("utf-8"))["cases"]
    found = []
    for verb in ("check", "base"):
        own = [case for case in cases if case["verb"] == verb]
        paths = [root / case.get("path", next(iter(case["inputs"]))) for case in own]
        found += [_judged(case, line) for case, line in zip(own, _lines(command, verb, paths), strict=True)]
    for case in (case for case in cases if case["verb"] == "compute"):
        adapter, expected = (root / name for name in case["inputs"])
        (line,) = _lines([*command, "compute"], "", [(adapter, expected)])
        found.append(_computed(case, line, expected))
    return found


def _lines(command: Sequence[str], verb: str, paths: Sequence[Path | tuple[Path, ...]]) -> Iterable[dict[str, Any]]:
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        words = [str(path) for each in batch for path in (each if isinstance(each, tuple) else (each,))]
        full = [*command, *([verb] if verb else []), *words]
        done = subprocess.run(full, capture_output=True, text=True, timeout=SECONDS, check=False)
        lines = done.stdout.splitlines()
        for number in range(len(batch)):
            try:
                line = json.loads(lines[number])
            except (IndexError, ValueError):
                line = {"ok": False, "error": f"no line of JSON (exit code {done.returncode})", "where": ""}
            yield line if isinstance(line, dict) else {"ok": False, "error": "no JSON object", "where": ""}


def _judged(case: Mapping[str, Any], line: Mapping[str, Any]) -> Outcome:
    wanted, why = case["expected"], ""
    if "error" in wanted:
        if line.get("ok"):
            why = f"accepted, and it is {wanted['error']}"
        elif line.get("error") != wanted["error"]:
            why = f"{line.get('error')} instead of {wanted['error']}"
        elif wanted["where"] not in str(line.get("where")):
            why = f"place {line.get('where')!r} does not name {wanted['where']!r}"
    elif not line.get("ok"):
        why = f"refused: {line.get('error')} at {line.get('where')!r}"
    elif "tensors" in wanted and line.get("tensors") != wanted["tensors"]:
        why = f"tensors {line.get('tensors')} instead of {wanted['tensors']}"
    elif line.get("digest") != wanted.get("digest", line.get("digest")):
        why = f"digest {line.get('digest')} instead of {wanted['digest']}"
    return Outcome(case["case"], tuple(case["requirements"]), case["verb"], not why, why)


def _computed(case: Mapping[str, Any], line: Mapping[str, Any], expected: Path) -> Outcome:
    """Compare all numbers of a method's vector; a program may leave out methods, and says Unsupported."""
    import numpy as np

    from .tensors import safetensors

    rules, verb, tolerance = tuple(case["requirements"]), case["verb"], case["expected"]["tolerance"]
    outputs = line.get("outputs")
    if not line.get("ok") or not isinstance(outputs, dict):
        return Outcome(case["case"], rules, verb, False, f"{line.get('error', 'no outputs')}")
    if outputs and all(each.get("error") == "Unsupported" for each in outputs.values()):
        return Outcome(case["case"], rules, verb, None, "no formula")
    for name, leaf in safetensors.read(expected).items():
        path, _, leaf_name = name.rpartition(".")
        merged = path.endswith(".merged")
        path, word = path.removesuffix(".merged"), f"merged.{leaf_name}" if merged else leaf_name
        if word not in ("y", "merged.weight", "merged.bias"):
            continue
        arrays = outputs.get("" if path == "(model)" else path, {})
        got = arrays.get(word)
        if got is None and word == "y" and "merged.weight" in arrays:
            continue  # A merger need not compute outputs.
        if got is None:
            return Outcome(case["case"], rules, verb, False, f"{name} is missing")
        wanted = leaf.numpy()
        values = np.asarray(got["values"], dtype="f8")
        if list(got["shape"]) != list(wanted.shape):
            why = f"{name} has shape {got['shape']}, not {list(wanted.shape)}"
            return Outcome(case["case"], rules, verb, False, why)
        far = np.abs(values - wanted.reshape(-1)) > tolerance * np.maximum(1, np.abs(wanted.reshape(-1)))
        if far.any() or not np.isfinite(values).all():
            return Outcome(case["case"], rules, verb, False, f"{name} differs at {int(far.argmax())}")
    return Outcome(case["case"], rules, verb, True)

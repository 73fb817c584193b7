#!/usr/bin/env python
"""Test the tests of formulas and of the engine by mutation: change one operator or number, and check that a test fails.

    python tools/mutants.py                      all chapters of tools/mutants.toml
    python tools/mutants.py lora blocks          only these chapters
    python tools/mutants.py --sample 20          at most 20 mutants of each chapter; --seed selects which
    python tools/mutants.py --list               list the chapters

cosmic-ray makes the mutants. It writes them into the files, so this script works in a copy of the checkout. If all
tests pass with a mutant, no test covers the changed code: write a test, or give the reason in tools/mutants.toml why
the mutant computes the same. The exit code is 1 if a mutant survives without a reason.

Some of cosmic-ray's mutants are left out, because any test kills them and they say nothing about the tests: bitwise
operators in place of arithmetic ones (floats have none), and `is` in place of `==`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmic_ray.work_item import WorkItem

ROOT = Path(__file__).resolve().parents[1]
LEFT = ("build", "dist", "fuzz-findings")
"""Folders of the checkout that no test reads."""

LEAST, SLOWER = 60, 5
"""Time limit for the tests of one mutant: the least number of seconds, and the multiple of the time without mutants."""

TRIVIAL = ("BitOr", "BitAnd", "BitXor", "LShift", "RShift", "Is", "IsNot")
"""Operators that nobody would write by mistake in place of another operator."""


def main() -> int:
    """Run the requested chapters; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER")
    parser.add_argument("--sample", type=int, metavar="N", help="at most N mutants of each chapter")
    parser.add_argument("--seed", type=int, default=0, help="seed for --sample")
    parser.add_argument("--list", action="store_true", help="list the chapters")
    options = parser.parse_args()
    known = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text("utf-8"))
    chapters = {each["name"]: each for each in known["chapter"]}
    if options.list:
        for name, each in chapters.items():
            print(f"{name:16} {each['module']}: {each['tests']}")
        return 0
    if unknown := [name for name in options.chapters if name not in chapters]:
        parser.error(f"no chapter {unknown[0]}; known: {', '.join(chapters)}")
    reasons = {(each["line"], each["mutant"]): each["why"] for each in known.get("same", ())}
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(folder))
        left = [
            survivor
            for name in options.chapters or chapters
            for survivor in survivors(chapters[name], copy, options.sample, options.seed, reasons)
        ]
    return bool(left)


def copied(folder: Path) -> Path:
    """Copy the files that the tests need, and link the environment."""
    for source in ROOT.iterdir():
        if source.name.startswith(".") or source.name in LEFT:
            continue
        if source.is_dir():
            shutil.copytree(source, folder / source.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / source.name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def survivors(
    chapter: dict[str, Any], copy: Path, sample: int | None, seed: int, reasons: dict[tuple[str, str], str]
) -> list[str]:
    """Run the mutants of one chapter; print and return those that no test detected and that have no reason."""
    source = (copy / chapter["module"]).read_text("utf-8")
    python = ROOT / ".venv" / "bin" / "python"
    command = f"{python} -m pytest -q -x -p no:cacheprovider {chapter['tests']}"
    config, session = copy / "mutants.config.toml", copy / "mutants.sqlite"

    def configure(timeout: float) -> None:
        config.write_text(
            f"[cosmic-ray]\nmodule-path = {json.dumps(chapter['module'])}\ntimeout = {timeout:.1f}\n"
            f"excluded-modules = []\ntest-command = {json.dumps(command)}\n\n"
            "[cosmic-ray.distributor]\nname = 'local'\n"
        )

    session.unlink(missing_ok=True)
    # If the tests failed without a mutant, every mutant would count as killed.
    configure(3600)
    start = time.monotonic()
    ray(copy, "baseline", config.name)
    configure(max(LEAST, SLOWER * (time.monotonic() - start)))
    ray(copy, "init", config.name, session.name)
    skipped = thinned(session, annotations(source), sample, seed)
    ray(copy, "exec", config.name, session.name)
    left, killed, late, same = [], 0, 0, 0
    for number, (line, mutant), outcome, output in records(session):
        if outcome != "survived":
            killed += 1
            late += output == "timeout"
        elif (line, mutant) in reasons:
            same += 1
        else:
            left.append(f"{chapter['module']}:{number}: {line}\n        {mutant}")
    print(f"{chapter['name']}: {killed} killed", f"({late} by the time limit), " if late else ", ", sep="", end="")
    print(f"{same} that compute the same, {len(left)} survived", end="")
    print(f", {skipped} not drawn" if skipped else "", flush=True)
    for each in left:
        print(f"    {each}", flush=True)
    (copy / chapter["module"]).write_text(source, "utf-8")
    return left


def ray(copy: Path, *words: str) -> None:
    """Run cosmic-ray in the copy, without output."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / ".venv" / "bin" / "python"), "-m", "cosmic_ray.cli", *words]
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        missing = "No module named 'cosmic_ray'" in run.stderr
        cure = "\nInstall it: .venv/bin/python -m pip install cosmic-ray" if missing else ""
        sys.exit(f"cosmic-ray {words[0]}: {(run.stdout + run.stderr)[-2000:]}{cure}")


def annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the lines and columns at which a module's type annotations, which are not evaluated, begin and end."""
    found = [
        each
        for node in ast.walk(ast.parse(source))
        for each in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(each, ast.expr)
    ]
    return [((each.lineno, each.col_offset), (each.end_lineno or 0, each.end_col_offset or 0)) for each in found]


def thinned(session: Path, unread: list[tuple[tuple[int, int], tuple[int, int]]], sample: int | None, seed: int) -> int:
    """Mark as skipped: trivial mutants, mutants in `unread` places, and all others except a sample.

    Returns:
        The number of skipped mutants that are neither trivial nor in `unread` places.
    """
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(str(session), WorkDB.Mode.open) as database:
        # The ids of jobs differ in each run, so a sample of them would ignore the seed.
        everything = sorted(database.work_items, key=place)
        items = [
            item
            for item in everything
            if not trivial(item)
            and not any(first <= tuple(item.mutations[0].start_pos) < last for first, last in unread)
        ]
        drawn = items if sample is None else random.Random(seed).sample(items, min(sample, len(items)))
        kept = {item.job_id for item in drawn}
        for item in everything:
            if item.job_id not in kept:
                database.set_result(item.job_id, WorkResult(worker_outcome=WorkerOutcome.SKIPPED))
    return len(items) - len(kept)


def place(item: WorkItem) -> tuple[tuple[int, int], str, int]:
    """Return a key that identifies a mutant within its module, and is the same in every run."""
    mutation = item.mutations[0]
    return tuple(mutation.start_pos), mutation.operator_name, mutation.occurrence


def trivial(item: WorkItem) -> bool:
    """Whether a mutant replaces an operator by one that nobody would write there by mistake."""
    words = item.mutations[0].operator_name.split("_")
    return words[-1] in TRIVIAL and not (len(words) > 2 and words[-2] in TRIVIAL)


def records(session: Path) -> Iterator[tuple[int, tuple[str, str], str, str]]:
    """Yield (line number, (line, mutated line), outcome, output of the tests) for each mutant that was run."""
    from cosmic_ray.work_db import WorkDB, use_db

    with use_db(str(session), WorkDB.Mode.open) as database:
        results = dict(database.results)
        for item in sorted(database.work_items, key=place):
            result = results[item.job_id]
            if result.worker_outcome.value == "skipped":
                continue
            changed = dict.fromkeys("-+", "")
            for line in (result.diff or "").split("\n"):
                if line[:1] in changed and not line.startswith(("---", "+++")):
                    changed[line[0]] += line[1:].strip()
            outcome = result.test_outcome.value if result.test_outcome else result.worker_outcome.value
            yield item.mutations[0].start_pos[0], (changed["-"], changed["+"]), outcome, result.output or ""


if __name__ == "__main__":
    sys.exit(main())

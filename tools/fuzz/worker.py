"""One process of the fuzzer: makes input after input from their numbers, runs them, and reports on standard output."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

import containers
import trees
from cases import Case, Content, Special, load, said_of
from exercise import Exercise, Finding
from sandbox import Sandbox
from seeds import seeds, with_partner


class Maker:
    """Makes the input of a number: the same seeds, seed and number always give the same input.

    Args:
        groups: the good inputs, by group.
        seed: the run's seed.
        only: groups whose names start so; all when empty.
    """

    def __init__(self, groups: dict[str, list[Case]], seed: int, only: str = "") -> None:
        self.groups = {name: cases for name, cases in sorted(groups.items()) if name.startswith(only)}
        self.seed = seed

    def make(self, number: int, changes: Sequence[int] | None = None) -> Case:
        """A good input with one to three changes, or with only those of them that are named."""
        rng = self.rng(number, "case")
        name = rng.choice(list(self.groups))
        case = rng.choice(self.groups[name])
        for each in range(self.count(number)) if changes is None else changes:
            case = changed(case, self.rng(number, f"change {each}"), self._others(name))
        return case

    def count(self, number: int) -> int:
        """How many changes the input of a number has."""
        return self.rng(number, "count").choice((1, 1, 1, 2, 2, 3))

    def rng(self, number: int, what: str) -> Random:
        """A stream of random numbers for one purpose."""
        return stream(self.seed, number, what)

    def _others(self, name: str) -> list[Case]:
        return [case for cases in self.groups.values() for case in cases[:3]]


def stream(seed: int, number: int, what: str) -> Random:
    """The random numbers that one input of a run meets for one purpose."""
    return Random(f"{seed}:{number}:{what}")


def stream_of(folder: Path) -> list[Random]:
    """What was drawn while a kept case was run: the format it was written in, the command; none if it is not said."""
    said = said_of(folder)
    return [stream(said["run_seed"], said["number"], "run")] if "number" in said else []


def changed(case: Case, rng: Random, others: Sequence[Case]) -> Case:
    """The case with one change: mostly of one file's content, sometimes of which files there are."""
    files = dict(case.files) or {"x": b""}
    name = rng.choice(sorted(files))
    content = files[name]
    how = rng.random()
    if how < 0.93 and isinstance(content, bytes):
        files[name] = _mutated(name, content, rng)
    elif how < 0.95:
        del files[name]
    elif how < 0.97:
        other = rng.choice(others)
        files[name] = rng.choice([c for c in other.files.values() if isinstance(c, bytes)] or [b""])
    elif how < 0.985:
        files[name] = rng.choice((b"", b"{}", b"[]", b"null", bytes(1024), b"\xef\xbb\xbf{}"))
    else:
        files[name] = _special(name, rng)
    return case.with_files(files)


def _mutated(name: str, content: bytes, rng: Random) -> bytes:
    """One change by the mutator of the file's container, or of its bytes where an earlier change left no container."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        return containers.mutator(name, content)(content, rng)
    except Exception:
        return trees.raw(content, rng)
    finally:
        sys.setrecursionlimit(limit)


def _special(name: str, rng: Random) -> Content:
    return rng.choice((
        Special("fifo"), Special("folder"), Special("link", "/dev/zero"), Special("link", "/etc/passwd"),
        Special("link", name), Special("link", "nowhere"), Special("link", "/proc/self/environ"),
    ))  # fmt: skip


def minimal(exercise: Exercise, maker: Maker, number: int, finding: Finding) -> Case:
    """The input of a number with as few of its changes as still lead to the same finding."""
    count = maker.count(number)
    case = maker.make(number)
    if finding.kind in ("hang", "memory") or count == 1:
        return case
    for changes in [(n,) for n in range(count)] + ([(0, 1), (0, 2), (1, 2)] if count == 3 else []):
        smaller = maker.make(number, changes)
        if any(found.key == finding.key for found in exercise.run(smaller, maker.rng(number, "run"))):
            return smaller
    return case


def warm(groups: dict[str, list[Case]], scratch: Path) -> dict[str, list[Case]]:
    """Partners for all seeds; and everything that good input makes the library import."""
    import adapterkit as ak
    from adapterkit.formats import FORMATS
    from adapterkit.methods import METHODS
    from adapterkit.quant import SCHEMES

    for registry in (FORMATS, METHODS, SCHEMES):
        for name in registry:
            registry[name]
    import torch  # noqa: F401

    _ = ak.ops, ak.onnx.inject, ak.onnx.merge
    found = {name: [with_partner(case, scratch / "partners") for case in cases] for name, cases in groups.items()}
    quiet = Exercise(_Open(), scratch, commands=1)  # type: ignore[arg-type]
    for cases in found.values():
        quiet.run(cases[0], Random(0))
    return found


class _Open:
    """Stands in for the sandbox while good input is run."""

    def watch(self) -> Any:
        from contextlib import nullcontext

        return nullcontext([])


def say(**record: Any) -> None:
    """One line of JSON for the parent."""
    print(json.dumps(record), file=_CHANNEL, flush=True)


_CHANNEL = sys.stdout


def replay(folders: Iterable[Path], exercise: Exercise, groups: dict[str, list[Case]]) -> None:
    """Runs kept cases instead of new ones."""
    partners = {case.name: case.partner for cases in groups.values() for case in cases}
    for folder in folders:
        say(start=folder.name)
        findings: dict[str, Finding] = {}
        case = replace(load(folder), partner=partners.get(str(said_of(folder).get("seed", "")), ""))
        for drawn in (*map(Random, range(3)), *stream_of(folder)):
            findings |= {found.key: found for found in exercise.run(case, drawn)}
        say(done=folder.name, steps=exercise.done, findings=[{"key": key, **asdict(f)} for key, f in findings.items()])


def loop(maker: Maker, exercise: Exercise, numbers: Iterable[int], keep: Path) -> None:
    """Runs inputs by number; keeps each new finding once."""
    seen: set[str] = set()
    for number in numbers:
        say(start=number)
        case = maker.make(number)
        found = exercise.run(case, maker.rng(number, "run"))
        steps = exercise.done
        for finding in found:
            known = (keep / finding.key).exists()
            if finding.key not in seen and not known:
                small = minimal(exercise, maker, number, finding)
                note = {"number": number, "run_seed": maker.seed, "finding": asdict(finding), "key": finding.key}
                small.keep(keep / finding.key, note)
            seen.add(finding.key)
        say(done=number, group=case.name, steps=steps, findings=[{"key": f.key, **asdict(f)} for f in found])


def main(options: dict[str, Any]) -> None:
    """Enters the sandbox and runs until the numbers end or the parent does."""
    keep = Path(options["keep"])
    with tempfile.TemporaryDirectory(prefix="adapterkit-fuzz-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder).resolve()
        for name in ("home", "partners", "keep"):
            (scratch / name).mkdir()
        groups = warm(seeds(), scratch)
        trees.load("{}")
        sandbox = Sandbox(scratch, options["hang"])
        sandbox.enter()
        exercise = Exercise(sandbox, scratch)
        say(ready=sum(map(len, groups.values())))
        if options["replay"]:
            exercise.commands = 1
            replay([Path(path) for path in options["replay"]], exercise, groups)
        else:
            numbers = range(options["first"], options["stop"], options["jobs"])
            loop(Maker(groups, options["seed"], options["only"]), exercise, numbers, keep)
    say(end=True)

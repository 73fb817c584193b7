"""Save the trials of a search in a JSON Lines file, whose first line describes the search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import Malformed, UsageError, storage_error
from ..io.inputs import read_input
from .result import Trial

VERSION = 1

MAX_BYTES = 1 << 26


class Journal:
    """A file of trials. It reads the trials of an earlier run, and appends each new trial with a single write.

    Args:
        path: the file; None keeps trials only in memory.
        searched: everything on which the trials depend, such as adapters, data, methods and seed. The first line of the
            file must have the same values.
        overwrite: whether to start again if the file belongs to another search.

    Raises:
        UsageError: the file belongs to another search.
        Malformed: the file does not contain trials of a search.
        StorageError: the file is not readable or writable.
    """

    def __init__(self, path: Path | None, searched: dict[str, object], *, overwrite: bool = False) -> None:
        self.path, self.head = path, {"adapterkit_search": VERSION, **searched}
        self.trials: list[Trial] = []
        if path is None or not path.exists():
            self._begin()
            return
        lines = read_input(path, MAX_BYTES).decode("utf-8", "replace").split("\n")
        if json.loads(json.dumps(self.head)) != _parsed(lines[0], path, 1):
            if not overwrite:
                cure = "Name another file, delete this one, or start again with --overwrite (overwrite=True)"
                raise UsageError("the file contains trials of another search", path=path, cure=cure)
            self._begin()
            return
        # Drop an incomplete last line: the run was killed while writing it. Its trial is repeated.
        for at, line in enumerate(lines[1:-1], 2):
            self.trials.append(_trial(_parsed(line, path, at), path, at))
        if lines[-1]:
            self._write("".join(f"{line}\n" for line in lines[:-1]), "w")

    def add(self, trial: Trial) -> None:
        """Save a trial."""
        self.trials.append(trial)
        self._write(json.dumps(trial.record()) + "\n", "a")

    def _begin(self) -> None:
        self._write(json.dumps(self.head) + "\n", "w")

    def _write(self, text: str, mode: str) -> None:
        if self.path is None:
            return
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise storage_error(error, self.path) from error


def _parsed(line: str, path: Path, at: int) -> object:
    try:
        found: object = json.loads(line)
        return found
    except (ValueError, RecursionError):
        why = "the file does not contain trials of a search"
        raise Malformed(why, path=path, where=f"line {at}", cure="Name another file, or delete this one") from None


def _trial(found: Any, path: Path, at: int) -> Trial:
    try:
        return Trial(
            int(found["number"]), str(found["method"]), tuple(map(float, found["weights"])),
            {str(name): _value(value) for name, value in found["parameters"].items()},
            None if found["loss"] is None else float(found["loss"]), found["refused"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Malformed("the line is not a trial", path=path, where=f"line {at}", cure="Delete this file") from None


def _value(found: object) -> float | str:
    if not isinstance(found, (int, float, str)):
        raise TypeError(found)
    return found

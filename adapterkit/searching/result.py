"""The result of a search: all trials, the best trial, and a recipe that repeats the best trial.

A `Journal` saves the trials in a JSON Lines file. The first line of the file describes the search.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.tables import html_table
from ..errors import Malformed, UsageError, storage_error
from ..io.inputs import read_input

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


def shown_parameters(parameters: Mapping[str, float | str], digits: int) -> str:
    """Return parameters as one line of text, such as `density=0.3 scale=1`, with `digits` significant digits."""
    numbers = {name: f"{value:.{digits}g}" for name, value in parameters.items() if type(value) in (int, float)}
    return " ".join(f"{name}={numbers.get(name, value)}" for name, value in parameters.items())


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination of the adapters, and its loss.

    Attributes:
        number: the number of the trial, from 0.
        method: the name of the combining method.
        weights: one weight per adapter.
        parameters: the parameters of the method that differ from their defaults.
        loss: the loss (lower is better); None if the trial failed.
        refused: the reason why the trial has no loss; None if the trial has a loss.
    """

    number: int
    method: str
    weights: tuple[float, ...]
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    loss: float | None = None
    refused: str | None = None

    def record(self) -> dict[str, JsonValue]:
        """Return the trial as a dict that can be written as JSON."""
        return {
            "number": self.number, "method": self.method, "weights": list(self.weights),
            "parameters": dict(self.parameters), "loss": self.loss, "refused": self.refused,
        }  # fmt: skip

    def settings(self) -> str:
        """Return the method, weights and parameters as one line of text."""
        shown = shown_parameters(self.parameters, 4)
        weights = " ".join(f"{weight:.4g}" for weight in self.weights)
        return f"{self.method}, weights {weights}{f', {shown}' if shown else ''}"


@dataclass(frozen=True, slots=True)
class Search:
    """A finished search.

    Attributes:
        adapters: the names of the adapters, in the order of the weights.
        trials: all trials, in order.
        base: the name of the base, or None.
        seed: the seed of the search, and of methods that use random numbers.
        rank: the rank to which combined adapters are cut: a number, or `fit`. With `fit`, a result is cut only if it
            has no low-rank factors. Its new rank is then the largest rank that the adapters have at the target. Results
            of `linear` are never cut.
        resumed: the number of trials that an earlier run had saved.
    """

    adapters: tuple[str, ...]
    trials: tuple[Trial, ...]
    base: str | None = None
    seed: int = 0
    rank: int | str = "fit"
    resumed: int = 0

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss; the first such trial if several have the same loss."""
        return min(self.trials, key=lambda trial: math.inf if trial.loss is None else trial.loss)

    @property
    def alone(self) -> tuple[float | None, ...]:
        """For each adapter, the loss of the trial that used only this adapter, with weight 1.

        An entry is None if there is no such trial, or if the trial failed.
        """
        losses: list[float | None] = []
        for at in range(len(self.adapters)):
            unit = tuple(float(other == at) for other in range(len(self.adapters)))
            same = [trial.loss for trial in self.trials if trial.method == "linear" and trial.weights == unit]
            losses.append(same[0] if same else None)
        return tuple(losses)

    def arguments(self) -> dict[str, JsonValue]:
        """Return the keyword arguments with which `combine` repeats the best trial."""
        best = self.best
        return {
            "method": best.method, "weights": list(best.weights), "seed": self.seed, "rank": self.rank,
            **best.parameters,
        }  # fmt: skip

    def recipe(self) -> str:
        """Return the best trial as a recipe, for `adapterkit combine --recipe` and `adapterkit merge --recipe`."""
        import yaml

        best = self.best
        recipe: dict[str, Any] = {
            "merge_method": best.method,
            "models": [
                {"model": name, "parameters": {"weight": weight}}
                for name, weight in zip(self.adapters, best.weights, strict=True)
            ],
        }
        recipe |= {"parameters": dict(best.parameters)} if best.parameters else {}
        recipe |= {"base_model": self.base} if self.base is not None else {}
        text: str = yaml.safe_dump(recipe | {"seed": self.seed, "rank": self.rank}, sort_keys=False, allow_unicode=True)
        return text

    def record(self) -> dict[str, JsonValue]:
        """Return the result of the search as a dict that can be written as JSON."""
        return {
            "adapters": list(self.adapters), "base": self.base, "seed": self.seed, "best": self.best.record(),
            "alone": list(self.alone), "resumed": self.resumed, "trials": [trial.record() for trial in self.trials],
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"Search({len(self.trials)} trials; best: {self.best.settings()}, loss {self.best.loss:.6g})"

    def _repr_html_(self) -> str:
        rows: Sequence[Sequence[object]] = [
            [trial.number, trial.method, " ".join(f"{weight:.4g}" for weight in trial.weights), trial.loss]
            for trial in sorted(self.trials, key=lambda trial: math.inf if trial.loss is None else trial.loss)[:10]
        ]
        return html_table(repr(self), ("trial", "method", "weights", "loss"), rows)


VERSION = 1

MAX_BYTES = 1 << 26


class Journal:
    """The trials of a search, and the file in which these trials are saved.

    The trials of an earlier run are read from the file. Each new trial is appended with a single write.

    Args:
        path: the file; None keeps the trials only in memory.
        searched: the settings of the search that determine its trials, such as adapters, data, methods and seed. They
            are written to the first line of the file. If the first line has other settings, the file belongs to another
            search.
        overwrite: whether to replace the file if it belongs to another search.

    Raises:
        UsageError: the file belongs to another search, and `overwrite` is not set.
        Malformed: the file does not contain trials of a search.
        StorageError: the file cannot be read or written.
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
                cure = "Pass another file, delete this file, or start again with --overwrite (overwrite=True)"
                raise UsageError("the file contains trials of another search", path=path, cure=cure)
            self._begin()
            return
        # A last line without a newline is incomplete: the earlier run was killed while it wrote the line. Drop the
        # line; the search then runs this trial again.
        for at, line in enumerate(lines[1:-1], 2):
            self.trials.append(_trial(_parsed(line, path, at), path, at))
        if lines[-1]:
            self._write("".join(f"{line}\n" for line in lines[:-1] or lines), "w")

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
        parsed: object = json.loads(line)
        return parsed
    except (ValueError, RecursionError):
        why = "the file does not contain trials of a search"
        raise Malformed(why, path=path, where=f"line {at}", cure="Pass another file, or delete this file") from None


def _trial(record: Any, path: Path, at: int) -> Trial:
    try:
        return Trial(
            int(record["number"]), str(record["method"]), tuple(map(float, record["weights"])),
            {str(name): _value(value) for name, value in record["parameters"].items()},
            None if record["loss"] is None else float(record["loss"]), record["refused"],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        why, cure = "the line does not describe a trial", "Pass another file, or delete this file"
        raise Malformed(why, path=path, where=f"line {at}", cure=cure) from None


def _value(value: object) -> float | str:
    if not isinstance(value, (int, float, str)):
        raise TypeError(value)
    return value

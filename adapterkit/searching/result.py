"""The result of a search: all trials, the best trial, and a recipe that repeats the best trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..core.tables import html_table

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


def shown_parameters(parameters: Mapping[str, float | str], digits: int) -> str:
    """Return parameters on one line; `digits` is the number of significant digits."""
    numbers = {name: f"{value:.{digits}g}" for name, value in parameters.items() if type(value) in (int, float)}
    return " ".join(f"{name}={numbers.get(name, value)}" for name, value in parameters.items())


@dataclass(frozen=True, slots=True)
class Trial:
    """One combination of the adapters, and its score.

    Attributes:
        number: the number of the trial, from 0.
        method: the combiner.
        weights: one weight per adapter.
        parameters: the parameters of the method that differ from their defaults.
        loss: the loss, which should be low; None if the trial failed.
        refused: the error because of which the trial has no loss.
    """

    number: int
    method: str
    weights: tuple[float, ...]
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    loss: float | None = None
    refused: str | None = None

    def record(self) -> dict[str, JsonValue]:
        """Return the trial as plain data."""
        return {
            "number": self.number, "method": self.method, "weights": list(self.weights),
            "parameters": dict(self.parameters), "loss": self.loss, "refused": self.refused,
        }  # fmt: skip

    def settings(self) -> str:
        """Return the method, weights and parameters on one line."""
        said = shown_parameters(self.parameters, 4)
        weights = " ".join(f"{weight:.4g}" for weight in self.weights)
        return f"{self.method}, weights {weights}{f', {said}' if said else ''}"


@dataclass(frozen=True, slots=True)
class Search:
    """A finished search.

    Attributes:
        adapters: the names of the adapters, in the order of the weights.
        trials: all trials, in order.
        base: the name of the base, or None.
        seed: the seed of the search, and of methods that use random numbers.
        rank: the rank to which results without low-rank factors are cut: a number, or `fit` for the largest rank of the
            adapters.
        resumed: the number of trials that were read from an earlier run.
    """

    adapters: tuple[str, ...]
    trials: tuple[Trial, ...]
    base: str | None = None
    seed: int = 0
    rank: int | str = "fit"
    resumed: int = 0

    @property
    def best(self) -> Trial:
        """The trial with the lowest loss; the first of several trials with equal loss."""
        return min(self.trials, key=lambda trial: math.inf if trial.loss is None else trial.loss)

    @property
    def alone(self) -> tuple[float | None, ...]:
        """The loss of each adapter alone, at weight 1."""
        found: list[float | None] = []
        for at in range(len(self.adapters)):
            unit = tuple(float(other == at) for other in range(len(self.adapters)))
            same = [trial.loss for trial in self.trials if trial.method == "linear" and trial.weights == unit]
            found.append(same[0] if same else None)
        return tuple(found)

    def arguments(self) -> dict[str, JsonValue]:
        """Return the keyword arguments of `combine` that repeat the best trial."""
        best = self.best
        return {
            "method": best.method, "weights": list(best.weights), "seed": self.seed, "rank": self.rank,
            **best.parameters,
        }  # fmt: skip

    def recipe(self) -> str:
        """Return the best trial as a recipe, for `adapterkit combine --recipe` and `adapterkit merge --recipe`."""
        import yaml

        best = self.best
        said: dict[str, Any] = {
            "merge_method": best.method,
            "models": [
                {"model": name, "parameters": {"weight": weight}}
                for name, weight in zip(self.adapters, best.weights, strict=True)
            ],
        }
        said |= {"parameters": dict(best.parameters)} if best.parameters else {}
        said |= {"base_model": self.base} if self.base is not None else {}
        text: str = yaml.safe_dump(said | {"seed": self.seed, "rank": self.rank}, sort_keys=False, allow_unicode=True)
        return text

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data."""
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

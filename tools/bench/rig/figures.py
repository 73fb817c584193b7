"""Records the figures of a benchmark as data, with the machine and the versions of the compared tools."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "adapterkit", "numpy", "torch", "safetensors", "peft", "transformers", "onnx", "onnxruntime", "gguf", "mergekit",
)  # fmt: skip
"""Packages whose versions are recorded, if they are installed."""

SLOWER = 1.1
"""A figure counts as worse if it is worse by this factor, and its range is outside of the older range."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure.

    Attributes:
        name: the name of the figure, unique in its benchmark.
        values: one value for each round.
        unit: `s`, `MB`, `ns`, `%`, or `x` for a ratio.
        more: whether a larger value is better.
    """

    name: str
    values: tuple[float, ...]
    unit: str
    more: bool = False

    @property
    def median(self) -> float:
        """The middle of the values."""
        return statistics.median(self.values)

    def __str__(self) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.name}: {self.median:.4g} {self.unit} ({low:.4g} to {high:.4g})"


@dataclass(slots=True)
class Figures:
    """The figures of one run of a benchmark."""

    bench: str
    found: list[Figure] = field(default_factory=list)

    def add(self, name: str, values: Iterable[float], unit: str, *, more: bool = False) -> None:
        """Add a figure without NaN values, which stand for missing reports of a contender."""
        kept = tuple(value for value in map(float, values) if value == value)
        if kept:
            self.found.append(Figure(name, kept, unit, more))

    def ratio(self, name: str, above: Iterable[float], below: Iterable[float], *, more: bool = False) -> None:
        """Add the ratio of each round, because a slow phase of the machine affects both figures of a round."""
        self.add(name, [a / b for a, b in zip(above, below, strict=True)], "x", more=more)

    def write(self, path: Path | None) -> None:
        """Write the record, if a path was given."""
        if path is not None:
            record = {"bench": self.bench, **surroundings(), "figures": [asdict(figure) for figure in self.found]}
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the options that all benchmarks with figures have."""
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")


def surroundings() -> dict[str, Any]:
    """Return the machine, its load, the day and the versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": _processor(), "cores": os.cpu_count(), "memory": _memory(), "system": platform.platform(),
            "python": platform.python_version(), "load": round(os.getloadavg()[0], 1),
        },
        "versions": dict(_versions()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }  # fmt: skip


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read(record: Mapping[str, Any]) -> dict[str, Figure]:
    """Return the figures of a record by name."""
    return {
        each["name"]: Figure(each["name"], tuple(each["values"]), each["unit"], each["more"])
        for each in record["figures"]
    }


def worse(old: Figure, new: Figure) -> bool:
    """Whether a figure is worse than an older one by more than its rounds vary."""
    if new.more:
        return old.median > SLOWER * new.median and max(new.values) < min(old.values)
    return new.median > SLOWER * old.median and min(new.values) > max(old.values)

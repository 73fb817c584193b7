"""Measures how time and memory of a merge grow with the base, the rank, DoRA and the number of adapters. Linux.

    python tools/bench growth [--rounds 3] [--work FOLDER] [--row NAME]...

The bases have TinyLlama's shapes with more or fewer layers, 0.1 to 10 B parameters. They are zeros in sparse files, so
only the outputs take space (20 GB for 10 B, removed after each run). Each base is read once before the merge, to load
it into the page cache if it fits. The rows of a round run one after the other; ratios are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rig.llama import LAYERS, SHARD_BYTES, VOCABULARY, write_adapter, write_base
from rig.process import Run, measure, warm

ROOT = Path(__file__).resolve().parents[2]
ENV = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@dataclass(slots=True)
class Row:
    """One merge: its fraction of 1.1 B parameters, rank, formula, and number of adapters."""

    name: str
    scale: float = 1.0
    rank: int = 16
    dora: bool = False
    adapters: int = 1
    runs: list[Run] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Return the median time that the command reports for a durable merge."""
        return statistics.median(float(json.loads(run.stdout)["seconds"]) for run in self.runs)

    @property
    def peak(self) -> float:
        """Return the peak memory of all runs in MB (10^6 bytes) by VmHWM; wait4 would include this process's memory."""
        return max(run.high_water for run in self.runs) / 1e6


def rows() -> list[Row]:
    """Return all rows; ratios are relative to `1.1B`."""
    return [
        *(Row(f"{1.1 * scale:.2g}B", scale=scale) for scale in (1.0, 0.1, 9.0)),
        *(Row(f"r{rank}", rank=rank) for rank in (8, 64, 256)),
        Row("dora", dora=True),
        *(Row(f"{count} adapters", adapters=count) for count in (2, 4, 8)),
        Row("8 of r8", rank=8, adapters=8),
    ]


def once(row: Row, work: Path) -> None:
    """Make the inputs of a row, and time one run."""
    with tempfile.TemporaryDirectory(dir=work) as made:
        folder = Path(made)
        layers, vocabulary = max(1, round(LAYERS * row.scale)), max(64, round(VOCABULARY * row.scale))
        write_base(folder / "base", layers, vocabulary, SHARD_BYTES, sparse=True)
        sources = [folder / f"adapter{number}" for number in range(row.adapters)]
        for number, source in enumerate(sources):
            write_adapter(source, folder / "base", layers, rank=row.rank, dora=row.dora, number=number)
        os.sync()
        warm(folder)
        command = [
            sys.executable,
            "-m",
            "adapterkit",
            "merge",
            folder / "base",
            *sources,
            "-o",
            folder / "out",
            "--json",
        ]
        row.runs.append(measure([str(word) for word in command], folder / "last", ENV))
        print(f"{row.name}: {row.runs[-1].seconds:.2f} s", file=sys.stderr)
        shutil.rmtree(folder / "out", ignore_errors=True)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--row", action="append", choices=[row.name for row in rows()], help="may be repeated")
    options = parser.parse_args()
    chosen = [row for row in rows() if not options.row or row.name in options.row]
    for _ in range(options.rounds):
        for row in chosen:
            once(row, options.work)
    for row in chosen:
        share = row.seconds / chosen[0].seconds
        print(f"{row.name:>10}  merging {row.seconds:6.2f} s  {share:5.2f} of {chosen[0].name}  peak {row.peak:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

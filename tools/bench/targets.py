"""Measures tens of thousands of targets: reading, inspecting, validating, binding and planning, from headers. Linux.

    python tools/bench targets [--rounds 3] [--work FOLDER] [--row NAME]... [--json FILE] [--root CHECKOUT]

The bases are DeepSeek-V3 (671 B parameters, 163 shards, 45,032 linear layers) and Qwen3-30B-A3B, in sparse files of
zeros. The adapters are PEFT's: LoRA and DoRA of every linear layer, and stacked experts. Each step runs as a separate
process. Its figures are medians of the rounds: processor time of all threads, wall time, and peak memory. Compare
processor times; wall times also include waiting. `--root` measures another checkout with the same inputs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rig.experts import MODELS, write_adapter, write_base
from rig.figures import Figures, arguments
from rig.process import ProcessFailed, Run, measure

ROOT = Path(__file__).resolve().parents[2]

START = "import adapterkit"
READ = "import adapterkit, sys; adapterkit.read(sys.argv[1])"
BIND = (
    "import adapterkit, sys; from adapterkit.naming.binding import bind; from adapterkit.io.checkpoint import opened; "
    "base = opened(sys.argv[1]); adapter = adapterkit.read(sys.argv[2], base=base); bind(adapter, base)"
)


@dataclass(slots=True)
class Row:
    """One step on one adapter.

    Attributes:
        name: the model, the kind of adapter and the step.
        command: the arguments after the interpreter.
        runs: one measurement for each round.
        fault: why the step could not be measured.
    """

    name: str
    command: tuple[str, ...]
    runs: list[Run] = field(default_factory=list)
    fault: str = ""

    def record(self) -> dict[str, Any]:
        """Return the medians as plain data: seconds and bytes."""
        if self.fault or not self.runs:
            return {"name": self.name, "fault": self.fault}
        return {
            "name": self.name,
            "cpu": round(statistics.median(run.cpu for run in self.runs), 3),
            "seconds": round(statistics.median(run.seconds for run in self.runs), 3),
            "peak": int(statistics.median(run.high_water for run in self.runs)),
        }


STEPS = ("read", "inspect", "inspect --json", "validate", "bind", "plan")


def rows(inputs: Path) -> list[Row]:
    """Return all rows."""
    found = [Row("start", ("-c", START)), Row("help", ("-m", "adapterkit", "--help"))]
    for model in MODELS:
        for kind in ("lora", "dora", "stacked"):
            base, adapter = str(inputs / model / "base"), str(inputs / model / kind)
            tool = ("-m", "adapterkit")
            commands = {
                "read": ("-c", READ, adapter),
                "inspect": (*tool, "inspect", adapter),
                "inspect --json": (*tool, "inspect", adapter, "--json"),
                "validate": (*tool, "validate", adapter),
                "bind": ("-c", BIND, base, adapter),
                "plan": (*tool, "merge", base, adapter, "-o", str(inputs / "out"), "--plan"),
            }
            found += [Row(f"{model} {kind}: {step}", commands[step]) for step in STEPS]
    return found


def write_inputs(inputs: Path) -> None:
    """Write the inputs of all rows, a few megabytes of headers each."""
    for name, model in MODELS.items():
        write_base(inputs / name / "base", model)
        for kind in ("lora", "dora", "stacked"):
            write_adapter(inputs / name / kind, model, kind)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments(parser, 3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--row", action="append", help="only rows whose name contains this; may be repeated")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to measure")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="targets.", dir=options.work))
    try:
        write_inputs(folder)
        chosen = [row for row in rows(folder) if not options.row or any(part in row.name for part in options.row)]
        env = {"PYTHONPATH": str(options.root.resolve()), "HF_HUB_OFFLINE": "1"}
        for _ in range(options.rounds):
            for row in chosen:
                try:
                    row.runs.append(measure([sys.executable, *row.command], folder / "last", env))
                except ProcessFailed as error:
                    row.fault = str(error).splitlines()[-1]
    finally:
        shutil.rmtree(folder)
    records = [row.record() for row in chosen]
    for record in records:
        if "cpu" in record:
            figures = f"{record['cpu']:8.2f} s of processor  {record['seconds']:8.2f} s  {record['peak'] / 1e6:6.0f} MB"
        else:
            figures = record["fault"]
        print(f"{record['name']:>34}  {figures}")
    figures = Figures("targets")
    for row in chosen:
        figures.add(row.name, [run.cpu for run in row.runs], "s")
        figures.add(f"{row.name}, largest memory", [run.high_water / 1e6 for run in row.runs], "MB")
    figures.write(options.json)
    return int(any(row.fault for row in chosen))


if __name__ == "__main__":
    sys.exit(main())

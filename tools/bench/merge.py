"""Times a merge side by side: adapterkit, PEFT, mergekit, axolotl, and a plain copy of the base. Linux.

    python tools/bench/merge.py [--rounds 3] [--scale 0.1] [--work FOLDER] [--only NAME] [--full-error]
        [--mergekit PYTHON] [--axolotl PYTHON] [--device DEVICE]

The base has 1.1 B parameters in bfloat16 (TinyLlama's shapes, random values, 2.2 GB in 5 shards). The adapter is a PEFT
LoRA of rank 16 on all 154 linear layers. Both are created once and kept in the work folder. The contenders run in turn,
each as a separate process, with the base in the page cache and no data left to write back; outputs are removed after
each run. mergekit and axolotl are included if you pass the python of an environment with them. For axolotl, `pip
install --no-deps axolotl` in addition to torch, PEFT and transformers is enough.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rig.figures import Figures, arguments
from rig.process import ProcessFailed, Run, measure, warm

RIG = Path(__file__).resolve().parent / "rig"
ROOT = Path(__file__).resolve().parents[2]
ENV = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "HF_HUB_OFFLINE": "1"}
COPY = 'cp -r "$0" "$1" && sync -f "$1"'

Command = Callable[[Path, Path, Path], list[str]]


@dataclass(slots=True)
class Contender:
    """A command to time, and its measurements.

    Attributes:
        name: the name in the table.
        command: the command line for a base, an adapter and an output folder.
        merges: whether its output is a merged base, which is compared with float64.
        runs: one measurement for each round.
        flushes: seconds of a sync after each run, for data that the kernel had not written yet.
        rounding: errors of the last output (see foreign/formulas.py).
    """

    name: str
    command: Command
    merges: bool = True
    runs: list[Run] = field(default_factory=list)
    flushes: list[float] = field(default_factory=list)
    rounding: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> list[float]:
        """Wall times of the whole process, one for each round."""
        return [run.seconds for run in self.runs]

    @property
    def durable(self) -> list[float]:
        """Wall times until the output is on disk, including the sync."""
        return [wall + flush for wall, flush in zip(self.seconds, self.flushes, strict=True)]

    @property
    def merging(self) -> list[float]:
        """Seconds that the command reports for the merge, one for each round; NaN if it does not report any."""
        return [reported(run.stdout) for run in self.runs]

    def most(self, figure: str) -> int:
        """Return the largest value of a memory figure over the runs, in bytes."""
        figures: list[int] = [getattr(run, figure) for run in self.runs]
        return max(figures)


def contenders(device: str = "auto", mergekit: str | None = None, axolotl: str | None = None) -> list[Contender]:
    """Return all contenders; `import torch` shows the least memory of the merges."""
    python = sys.executable
    others = (("mergekit", mergekit, "mergekit_merge.py"), ("axolotl", axolotl, "axolotl_merge.py"))
    return [
        Contender("import torch", lambda *_: [python, "-c", "import torch"], merges=False),
        Contender("cp + sync", lambda base, _, out: ["sh", "-c", COPY, str(base), str(out)], merges=False),
        Contender(
            "adapterkit",
            lambda base, adapter, out: [
                *(
                    python,
                    "-m",
                    "adapterkit",
                    "merge",
                    str(base),
                    str(adapter),
                    "-o",
                    str(out),
                    "--json",
                    "--device",
                    device,
                )
            ],
        ),
        Contender("peft", _script(python, "peft_merge.py")),
        *(Contender(name, _script(where, script)) for name, where, script in others if where is not None),
    ]


def _script(python: str, name: str) -> Command:
    return lambda *paths: [python, str(RIG / name), *map(str, paths)]


def reported(stdout: str) -> float:
    """Return `seconds` of a JSON report on stdout."""
    try:
        return float(json.loads(stdout)["seconds"])
    except (ValueError, TypeError, KeyError):
        return float("nan")


def inputs(work: Path, scale: float) -> Path:
    """Return the folder with `base` and `adapter`; creates it if it does not exist."""
    folder = work / f"llama-{scale:g}"
    if not folder.exists():
        print(f"making the base in {folder} (once)", file=sys.stderr)
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(RIG / "llama.py"), str(folder), "--scale", str(scale)], check=True)
    return folder


def once(contender: Contender, folder: Path, work: Path, *, last: bool, full: bool) -> None:
    """Time one run, and remove its output."""
    base, adapter, out = folder / "base", folder / "adapter", work / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    warm(folder)
    try:
        contender.runs.append(measure(contender.command(base, adapter, out), work / "last", ENV))
        started = time.perf_counter()
        os.sync()
        contender.flushes.append(time.perf_counter() - started)
        print(f"{contender.name}: {contender.runs[-1].seconds:.2f} s", file=sys.stderr)
        if last and contender.merges:
            contender.rounding = exactness(base, adapter, out, full=full)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def exactness(base: Path, adapter: Path, out: Path, *, full: bool) -> dict[str, float]:
    """Return the rounding errors of `out`, measured in another process, so that this process stays small."""
    command = [
        sys.executable,
        str(RIG / "exactness.py"),
        *map(str, (base, adapter, out)),
        *(["--full"] if full else []),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ENV})
    found: dict[str, float] = json.loads(done.stdout)
    return found


HEAD = (
    "",
    "median s",
    "range s",
    "flush s",
    "cpu s",
    "merging s",
    "peak MB",
    "above torch",
    "VmHWM",
    "anonymous",
    "worst ulp",
    "> 0.501",
)


def show(seen: list[Contender]) -> None:
    """Print the table; memory is the largest of all runs in MB (10^6 bytes)."""
    floor = next((c.most("peak") for c in seen if c.name == "import torch"), 0)
    rows = [HEAD, *(row(contender, floor) for contender in seen)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def row(contender: Contender, floor: int) -> tuple[str, ...]:
    """Return one line of the table."""
    merging = statistics.median(contender.merging)
    peak = contender.most("peak")
    rounding = contender.rounding
    return (
        contender.name,
        f"{statistics.median(contender.seconds):.2f}",
        f"{min(contender.seconds):.2f}-{max(contender.seconds):.2f}",
        f"{statistics.median(contender.flushes):.2f}",
        f"{statistics.median(run.cpu for run in contender.runs):.2f}",
        "-" if math.isnan(merging) else f"{merging:.2f}",
        f"{peak / 1e6:.0f}",
        f"{(peak - floor) / 1e6:.0f}" if contender.merges else "-",
        f"{contender.most('high_water') / 1e6:.0f}",
        f"{contender.most('anonymous') / 1e6:.0f}",
        f"{rounding['worst']:.6f}" if rounding else "-",
        f"{rounding['over_limit']:,} of {rounding['elements']:,}" if rounding else "-",
    )


def ratios(seen: list[Contender]) -> None:
    """Print the figures that have a budget, if their parts were measured."""
    by_name = {contender.name: contender for contender in seen}
    ours, peft, copy = (by_name.get(name) for name in ("adapterkit", "peft", "cp + sync"))
    for other in filter(None, (peft, by_name.get("mergekit"), by_name.get("axolotl"))):
        if ours:
            print(f"whole process, {other.name} / adapterkit: {paired(other.seconds, ours.seconds)}")
            print(f"the same with both outputs on disk: {paired(other.durable, ours.durable)}")
    if ours and copy:
        print(f"merging made durable, adapterkit / cp + sync: {paired(ours.merging, copy.seconds)}")


def figures(seen: list[Contender]) -> Figures:
    """Return the figures as data: each contender's time and memory, and the ratios."""
    found, by_name = Figures("merge"), {contender.name: contender for contender in seen}
    for contender in seen:
        found.add(f"{contender.name}, whole process", contender.seconds, "s")
        found.add(f"{contender.name}, processor time", [run.cpu for run in contender.runs], "s")
        if contender.merges:
            found.add(f"{contender.name}, largest memory", [run.peak / 1e6 for run in contender.runs], "MB")
    ours, copy = by_name.get("adapterkit"), by_name.get("cp + sync")
    for name in ("peft", "mergekit", "axolotl"):
        if ours and name in by_name:
            found.ratio(f"{name} / adapterkit", by_name[name].seconds, ours.seconds, more=True)
    if ours and copy:
        found.ratio("adapterkit / cp + sync", ours.seconds, copy.seconds)
        found.ratio("adapterkit, merging made durable / cp + sync", ours.merging, copy.seconds)
    return found


def paired(above: list[float], below: list[float]) -> str:
    """Return the median and range of each round's ratio. A slow phase of the machine affects both times of a round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def main() -> int:
    """Run the command line; return 1 if a contender fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=cache / "adapterkit" / "bench", help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the base's full size, for a quick run")
    arguments(parser, 3)
    names = [c.name for c in contenders("auto", "", "")]
    parser.add_argument("--only", action="append", choices=names, help="may be repeated")
    parser.add_argument("--mergekit", metavar="PYTHON", help="python of an environment with mergekit and PEFT")
    parser.add_argument("--axolotl", metavar="PYTHON", help="python of an environment with axolotl and transformers")
    parser.add_argument("--device", default="auto", help="device for adapterkit")
    parser.add_argument("--full-error", action="store_true", help="check every element, not one target of each kind")
    options = parser.parse_args()
    all_of_them = contenders(options.device, options.mergekit, options.axolotl)
    seen = [c for c in all_of_them if not options.only or c.name in options.only]
    folder = inputs(options.work.absolute(), options.scale)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    try:
        for number in range(options.rounds):
            for contender in seen:
                last = number == options.rounds - 1
                once(contender, folder, options.work.absolute(), last=last, full=options.full_error)
    except ProcessFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(seen)
    ratios(seen)
    figures(seen).write(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

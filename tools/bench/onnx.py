"""Times changes of a 2.7 GB graph side by side: adapterkit's inject and merge, and a copy of the data file. Linux.

    python tools/bench onnx [--rounds 3] [--work FOLDER]

The graph is a chain of ten float32 linear layers of 8192 x 8192 with its weights in a data file. The adapter is a PEFT
LoRA of rank 16 on each layer. Both are created once and kept in the work folder. The contenders run in turn, each as a
separate process.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rig.figures import Figures, arguments
from rig.process import ProcessFailed, Run, measure

RIG = Path(__file__).resolve().parent / "rig"
ROOT = Path(__file__).resolve().parents[2]
ENV = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "HF_HUB_OFFLINE": "1"}
COPY = 'cp "$0" "$1" && sync -f "$1"'
CHANGE = """
import sys, time, adapterkit as ak
change = getattr(ak.onnx, sys.argv[1])
start = time.perf_counter()
change(*sys.argv[2:5])
print(time.perf_counter() - start)
"""

Command = Callable[[Path, Path], list[str]]


def contenders() -> dict[str, Command]:
    """Name -> a function that returns the command for an input folder and an output folder."""
    return {
        "cp + sync": lambda folder, out: ["sh", "-c", COPY, str(folder / "model.onnx.data"), str(out / "copy.data")],
        "merge": lambda folder, out: change("merge", folder, out / "out.onnx"),
        "inject": lambda folder, _: change("inject", folder, folder / "injected.onnx"),
    }


def change(verb: str, folder: Path, out: Path) -> list[str]:
    """Return the command of adapterkit as a process."""
    return [sys.executable, "-c", CHANGE, verb, *map(str, (folder / "model.onnx", folder / "adapter", out))]


def once(command: Command, folder: Path, work: Path) -> tuple[Run, float]:
    """Time one run, and the sync after it; remove its output."""
    out = work / "out"
    out.mkdir()
    os.sync()
    with open(folder / "model.onnx.data", "rb", buffering=0) as data:
        while data.read(1 << 22):
            pass
    try:
        run = measure(command(folder, out), work / "last", ENV)
        started = time.perf_counter()
        os.sync()
        return run, time.perf_counter() - started
    finally:
        shutil.rmtree(out)
        for file in folder.glob("injected.onnx*"):
            file.unlink()


def main() -> int:
    """Run the command line; return 1 if a contender fails."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=cache / "adapterkit" / "bench", help="default: %(default)s")
    arguments(parser, 3)
    options = parser.parse_args()
    work = options.work.absolute()
    folder = work / "graph"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(RIG / "graph.py"), str(folder)], check=True)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    seen: dict[str, list[tuple[Run, float]]] = {name: [] for name in contenders()}
    try:
        for _ in range(options.rounds):
            for name, command in contenders().items():
                seen[name].append(once(command, folder, work))
    except ProcessFailed as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    show(seen)
    figures(seen).write(options.json)
    return 0


def show(seen: dict[str, list[tuple[Run, float]]]) -> None:
    """Print a line per contender, and the ratios with a budget, of times until the outputs are on disk."""
    for name, runs in seen.items():
        seconds, flushes = [run.seconds for run, _ in runs], [flush for _, flush in runs]
        peak, own = (max(getattr(run, figure) for run, _ in runs) / 1e6 for figure in ("peak", "anonymous"))
        print(
            f"{name:>10}: median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"flush {statistics.median(flushes):.2f} s, peak {peak:.0f} MB, anonymous {own:.0f} MB"
        )
    pairs = [(merge, copy) for (merge, _), (copy, _) in zip(seen["merge"], seen["cp + sync"], strict=True)]
    told("merge, imports aside / (cp + sync)", [float(merge.stdout) / copy.seconds for merge, copy in pairs])
    told("merge, as a process / (cp + sync)", [merge.seconds / copy.seconds for merge, copy in pairs])


def figures(seen: dict[str, list[tuple[Run, float]]]) -> Figures:
    """Return the figures as data."""
    found = Figures("onnx")
    for name, runs in seen.items():
        found.add(f"{name}, whole process", [run.seconds for run, _ in runs], "s")
        found.add(f"{name}, largest memory", [run.peak / 1e6 for run, _ in runs], "MB")
    copies = [copy.seconds for copy, _ in seen["cp + sync"]]
    found.ratio("merge, imports aside / cp + sync", [float(run.stdout) for run, _ in seen["merge"]], copies)
    found.ratio("merge, whole process / cp + sync", [run.seconds for run, _ in seen["merge"]], copies)
    return found


def told(name: str, ratios: list[float]) -> None:
    """Print the ratio of every round."""
    print(f"{name}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    sys.exit(main())

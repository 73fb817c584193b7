"""Times stacking of adapters on disk against a copy of the same number of bytes: `cp` of the inputs and `sync`.

    python tools/bench/stack.py [--size 4096] [--tasks 8] [--rank 16] [--targets 224] [--rounds 5] [--work DIR]

Both run in turn, read the same bytes and make the result durable; the result of stacking is as large as all inputs
together. adapterkit's time does not include imports, but includes the check that every value is finite.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS


def main() -> None:
    """Parse the options, write the inputs, measure in turn, and print one line per contender."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        inputs = Path(folder) / "inputs"
        inputs.mkdir()
        paths = [written(inputs / f"{task}.safetensors", task, chosen) for task in range(chosen.tasks)]
        measure(paths, Path(folder), chosen.rounds)


def written(path: Path, task: int, chosen: Any) -> str:
    """Write one adapter with random float32 factors."""
    random = np.random.default_rng(task)

    def lora() -> Any:
        A, B = (random.standard_normal(s, np.float32) for s in ((chosen.rank, chosen.size), (chosen.size, chosen.rank)))
        return METHODS["lora"](A=from_numpy(A), B=from_numpy(B))

    ak.write(Adapter({Target(f"layers.{i}.q"): (lora(),) for i in range(chosen.targets)}), path)
    return str(path)


def measure(paths: list[str], folder: Path, rounds: int) -> None:
    """Stack and copy in turn; print the medians and the ratio of each round."""
    ours, made, copy = [], folder / "stacked.safetensors", folder / "copy"
    theirs = []
    for _ in range(rounds + 1):
        theirs.append(timed(lambda: subprocess.run(["cp", "-r", str(folder / "inputs"), str(copy)], check=True)))
        subprocess.run(["rm", "-r", str(copy)], check=True)
        ours.append(timed(lambda: ak.write(ak.ops.stack(paths), made)))
        made.unlink()
    # Skip the first round, which fills caches and imports modules.
    ratios = sorted(one / other for one, other in zip(ours[1:], theirs[1:], strict=True))
    print(f"cp + sync  {statistics.median(theirs[1:]):8.2f} s")
    print(f"stack      {statistics.median(ours[1:]):8.2f} s")
    print(f"ratio      {statistics.median(ratios):8.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def timed(run: Callable[[], Any]) -> float:
    """Return the seconds until the written data is on disk."""
    os.sync()
    started = time.perf_counter()
    run()
    os.sync()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

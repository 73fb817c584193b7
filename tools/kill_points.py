"""Kills a small merge at 200 points of its work on disk, repeats each merge, and checks the result. Linux.

    python tools/kill_points.py [--points 200] [--shards 5]

The repeated merge must write the same bytes as a merge that was not killed, write at most one finished shard again, and
leave no temporary files. The previous output must be at its path or in the staging folder at any time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "shared"))

from killed_merges import Rerun, killed_and_rerun, points_of, spread
from merges import big_base

import adapterkit as ak


def main() -> int:
    """Print the faults and the number of points; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--shards", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = _runs(Path(folder), options.points, options.shards)
    wrong = [run for run in runs if not (run.same and run.kept and run.redone <= 1 and not run.left)]
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(runs)} kills, {len(wrong)} wrong, at most {max(run.redone for run in runs)} shard written again")
    return bool(wrong)


def _runs(work: Path, points: int, shards: int) -> list[Rerun]:
    base, adapter = big_base(work / "base", shards)
    source = work / "adapter.safetensors"
    ak.write(adapter, source)
    old = work / "counted" / "out"
    old.mkdir(parents=True)
    (old / "old").write_bytes(b"an output from before")
    count = len(points_of(base, source, old))
    if points > count:
        print(f"this merge has {count} points; more --shards give more points", file=sys.stderr)
    return killed_and_rerun(base, source, work / "killed", spread(points, count))


if __name__ == "__main__":
    sys.exit(main())

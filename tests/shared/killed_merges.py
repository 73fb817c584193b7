"""Run merges in separate processes, kill them at given points of their work on disk, and run them again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faulty_disk import Disk

import adapterkit as ak

VICTIMS = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import adapterkit as ak
from adapterkit.merging import execute, report, staging_dir
from faulty_disk import Disk, killing

for at, base, adapter, out in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        with Disk(Path(out).parent, at, killing).watched():
            ak.merge(base, adapter, out, overwrite=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@dataclass(frozen=True, slots=True)
class Rerun:
    """The files that a repeated merge found after a killed one, and the work that it did."""

    at: int
    same: bool
    redone: int
    kept: bool
    left: tuple[str, ...]


def points_of(base: Path, adapter: Path, out: Path) -> list[str]:
    """Return the points of a whole merge that is not killed, in order."""
    with Disk(out.parent).watched() as disk:
        ak.merge(base, adapter, out, overwrite=True)
    return disk.points


def killed_and_rerun(base: Path, adapter: Path, work: Path, at: Sequence[int]) -> list[Rerun]:
    """Kill one merge at each point, repeat each to its end, and compare with a merge that was not killed."""
    whole = _old_output(work / "whole")
    ak.merge(base, adapter, whole, overwrite=True)
    outs = {point: _old_output(work / str(point)) for point in at}
    jobs = json.dumps([[point, str(base), str(adapter), str(out)] for point, out in outs.items()])
    here = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-W", "ignore", "-c", VICTIMS, here], input=jobs, text=True, check=True)
    return [_rerun(base, adapter, whole, out, point) for point, out in outs.items()]


def _old_output(folder: Path) -> Path:
    (folder / "out").mkdir(parents=True)
    (folder / "out" / "old").write_bytes(b"an output from before")
    return folder / "out"


def _rerun(base: Path, adapter: Path, whole: Path, out: Path, at: int) -> Rerun:
    stage = out.parent / ".out.merging"
    kept = _tree(out) in (_tree(whole), {"old": b"an output from before"}) or (stage / "replaced" / "old").exists()
    finished = {p.name for p in (stage / "out").glob("*.safetensors")}
    parts = list((stage / "parts").glob("*.safetensors"))
    redone = sum(part.read_bytes() == (whole / part.name).read_bytes() for part in parts)
    report = ak.merge(base, adapter, out, overwrite=True)
    same = _tree(out) == _tree(whole) and set(report.resumed) >= finished
    return Rerun(at, same, redone, kept, tuple(sorted(p.name for p in out.parent.iterdir() if p.name != "out")))


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spread(count: int, points: int) -> list[int]:
    """Return this number of points, evenly distributed over all."""
    return sorted({number * (points - 1) // max(count - 1, 1) for number in range(count)})

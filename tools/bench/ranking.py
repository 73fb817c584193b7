"""Ranks combiners by their distance from the single adapters, for two, four and six tasks, with paired intervals.

    python tools/bench/ranking.py OUT.json [--seeds 1 2 3] [--counts 2 4 6] [--search 40]
    python tools/bench/ranking.py OUT.json --model DIR [--steps 150] [--items 500] [--minutes 9]

The tasks are six mild changes of the demo's digits (tools/bench/rig/mild.py), with a LoRA of rank 8 for each task and
seed. Each method has one scale for all tasks, which is the best on images that no adapter saw; the figures are measured
on further images. Each accuracy is divided by the accuracy of the task's own adapter. The difference from task
arithmetic is measured on the same images; its 95 % interval comes from 2,000 resamples of them. Seconds are processor
time of one combination. A second run, `rank`, cuts results without low-rank factors, and sums of ranks, to the rank of
the adapters. --search runs `ak.search` with this number of trials on the same images that choose the scale. It starts
from the best row, and compares its best result with that row. The benchmark takes about ten minutes on two cores.

Each row is written to OUT.state when it is found, and tables that OUT.json already has are kept, so the same command
resumes. --minutes ends the run after this much processor time.

With --model, the folder of a language model such as SmolLM2-135M, there are six tasks with answers of a few tokens
(tools/bench/rig/answers.py), and LoRAs of rank 16. Scales are tried from the middle one on, while they get better. A
training step takes 0.5 seconds of processor time, and 1,000 answers take 8 seconds. 37 methods with one seed take 50
minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

from quality import METHODS, computed  # noqa: E402 - the checkout's own
from rig.mild import MildDigits  # noqa: E402

import adapterkit as ak  # noqa: E402
from adapterkit.errors import AdapterkitError  # noqa: E402
from adapterkit.ops.parameters import resolved  # noqa: E402
from adapterkit.searching import METHODS as SEARCHED  # noqa: E402

SCALES = (0.25, 0.4, 0.6, 0.8, 1.0, 1.4)
RESAMPLES = 2000
REFERENCE = "task_arithmetic"


def main() -> None:
    """Train missing adapters, combine, measure, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--counts", nargs="+", type=int, default=[2, 4, 6])
    parser.add_argument("--cut", nargs="*", type=int, default=[4], help="counts with a table of results at the rank")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rank", type=int, help="rank of the adapters (default: 8; 16 with --model)")
    parser.add_argument("--model", type=Path, help="folder of a language model, for tasks with text instead of images")
    parser.add_argument("--steps", type=int, default=150, help="training steps, with --model")
    parser.add_argument("--items", type=int, default=500, help="items that each task is measured on, with --model")
    parser.add_argument("--tasks", nargs="+", help="the tasks and their order; the counts take the first ones")
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--search", type=int, default=0, metavar="TRIALS")
    parser.add_argument("--minutes", type=float, help="processor time after which to stop; the same command resumes")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-ranking")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.rank = chosen.rank or (8 if chosen.model is None else 16)
    suites = {seed: _suite(chosen, seed) for seed in chosen.seeds}
    first = next(iter(suites.values()))
    names = chosen.tasks or list(first.names)
    trained = {"epochs": chosen.epochs} if chosen.model is None else {"steps": chosen.steps}
    settings: dict[str, Any] = {
        "tasks": names, "seeds": chosen.seeds, **trained, "rank": chosen.rank, "scales": list(chosen.scales),
        first.what: dict(zip(("choosing", "reported"), first.sizes, strict=True)), "resamples": RESAMPLES,
    }  # fmt: skip
    state = State(chosen.out.with_suffix(".state"), settings, chosen.minutes)
    alone = {seed: {name: state.adapter(suite, name) for name in names} for seed, suite in suites.items()}
    found: dict[str, Any] = _tables(chosen.out, settings)
    found.setdefault("single", _singles(state, suites, alone))
    found.setdefault("counts", {})
    for count in chosen.counts:
        if str(count) not in found["counts"]:
            found["counts"][str(count)] = _ranked(state, suites, alone, count, chosen)
            chosen.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    if chosen.search and found.get("search_trials") != chosen.search:
        found |= {"search": {}, "search_trials": chosen.search}
    for count in chosen.counts if chosen.search else ():
        if str(count) not in found["search"]:
            rows = found["counts"][str(count)]["any"]
            found["search"][str(count)] = _searched(state, suites, alone, names[:count], rows, chosen)
            chosen.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _tables(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the tables of an earlier run with these settings; without such a run, only the settings."""
    if not out.is_file():
        return dict(settings)
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    other = [name for name, value in settings.items() if found.get(name) != value]
    if other:
        raise SystemExit(f"{out} has other {', '.join(other)}: name another file, or the same settings")
    return found


class State:
    """A file of finished measurements, one JSON line each, from which a stopped run resumes.

    Args:
        path: the file.
        settings: the settings of the run; a file with other settings is refused.
        minutes: the processor time after which the run ends; None for no limit.
    """

    def __init__(self, path: Path, settings: dict[str, Any], minutes: float | None) -> None:
        self.path, self.minutes = path, minutes
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        self.known = dict(json.loads(line) for line in lines)
        if self.kept(["settings"], lambda: settings) != settings:
            raise SystemExit(f"{path} has other settings: remove it, or name another OUT.json")

    def kept(self, key: list[Any], make: Callable[[], Any]) -> Any:
        """Return the value of a key from the file, or compute and save it."""
        name = json.dumps(key)
        if name not in self.known:
            self.check_time()
            self.known[name] = make()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([name, self.known[name]]) + "\n")
        return self.known[name]

    def adapter(self, suite: Any, name: str) -> ak.Adapter:
        """Return the adapter of a task; train it if it is missing."""
        self.check_time()
        made: ak.Adapter = suite.adapter(name)
        return made

    def own(self, suite: Any, adapter: ak.Adapter, name: str, testing: bool) -> float:
        """Return an adapter's accuracy at its own task, by which the accuracies of methods are divided."""

        def make() -> float:
            return float(suite.right(suite.changes(adapter), 1.0, [name], testing).double().mean())

        return float(self.kept(["own", suite.seed, name, testing], make))

    def check_time(self) -> None:
        """End the run if its time is over."""
        if self.minutes is not None and time.process_time() > 60 * self.minutes:
            print(f"{self.minutes:g} minutes are over; the same command resumes", file=sys.stderr)
            raise SystemExit(3)


def _suite(chosen: Any, seed: int) -> Any:
    if chosen.model is None:
        return MildDigits(chosen.work, chosen.epochs, chosen.rank, seed)
    from rig.answers import Answers

    return Answers(chosen.model, chosen.work, chosen.steps, chosen.rank, seed, chosen.items)


def _singles(state: State, suites: dict[int, Any], alone: dict[int, dict[str, ak.Adapter]]) -> dict[str, Any]:
    """Return the accuracy of the base and of each adapter at its own task, over the seeds."""
    names = list(next(iter(alone.values())))
    suite = next(iter(suites.values()))
    base = state.kept(["base"], lambda: suite.right({}, 1.0, names, True).double().mean(1).tolist())
    own = [[state.own(s, alone[k][n], n, True) for n in names] for k, s in suites.items()]
    rows = zip(names, base, np.mean(own, 0), strict=True)
    return {name: {"base": round(float(b), 4), "own": round(float(o), 4)} for name, b, o in rows}


def _ranked(
    state: State, suites: dict[int, Any], alone: dict[int, dict[str, ak.Adapter]], count: int, chosen: Any
) -> Any:
    """Return the rows for a number of tasks: the results as they are, and cut to the adapters' rank."""
    tasks = list(next(iter(alone.values())))[:count]
    made: dict[str, Any] = {}
    for cut in (None, chosen.rank) if count in chosen.cut else (None,):
        right: dict[str, list[Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for method in chosen.methods:
            if method == "slerp" and count != 2:
                continue
            tried = []
            for seed, suite in suites.items():
                make = partial(_scored, state, suite, alone[seed], tasks, method, cut, chosen.scales)
                tried.append(state.kept([count, cut, method, seed], make))
            each = [one for one in tried if one is not None]
            if len(each) < len(tried):
                continue
            right[method] = [
                _shares(state, suites[seed], alone[seed], tasks, one["right"])
                for seed, one in zip(suites, each, strict=True)
            ]
            rows[method] = {
                "scales": [one["scale"] for one in each], "choosing": [round(one["choosing"], 4) for one in each],
                "seconds": round(float(np.mean([one["seconds"] for one in each])), 4),
            }  # fmt: skip
            print(f"{count} tasks, rank {cut}: {method}", file=sys.stderr, flush=True)
        _compare(rows, right)
        made["any" if cut is None else "rank"] = dict(sorted(rows.items(), key=lambda row: -row[1]["mean"]))
    return made


def _shares(state: State, suite: Any, alone: dict[str, ak.Adapter], tasks: list[str], right: list[str]) -> Any:
    """Return correct answers divided by each adapter's accuracy at its own task, `[tasks, items]`."""
    own = np.array([state.own(suite, alone[name], name, True) for name in tasks])
    return np.array([[each == "1" for each in row] for row in right]) / own[:, None]


def _scored(
    state: State,
    suite: Any,
    alone: dict[str, ak.Adapter],
    tasks: list[str],
    method: str,
    cut: int | None,
    scales: Sequence[float],
) -> dict[str, Any] | None:
    """Combine with one method, choose the scale, and return the correct answers; None if the method cannot be cut."""
    several = [alone[name] for name in tasks]
    own = np.array([state.own(suite, alone[name], name, False) for name in tasks])
    started = time.process_time()
    try:
        made = computed(ak.ops.combine(several, method, seed=suite.seed, rank=cut))
    except AdapterkitError as error:
        print(f"{method}: {error}", file=sys.stderr)
        return None
    seconds = time.process_time() - started
    changes = suite.changes(made)
    shares: dict[float, float] = {}

    def share(scale: float) -> float:
        if scale not in shares:
            right = suite.right(changes, scale, tasks, False).double().mean(1).numpy()
            shares[scale] = float((right / own).mean())
        return shares[scale]

    scale = _climbed(share, scales) if suite.slow else max(scales, key=share)
    right = suite.right(changes, scale, tasks, True).int().tolist()
    digits = ["".join(map(str, row)) for row in right]
    return {"scale": scale, "choosing": shares[scale], "seconds": seconds, "right": digits}


def _climbed(share: Callable[[float], float], scales: Sequence[float]) -> float:
    """Return the best scale by hill climbing from the middle one, which need not try all scales."""
    at = len(scales) // 2
    step = -1 if at > 0 and share(scales[at - 1]) > share(scales[at]) else 1
    while 0 <= at + step < len(scales) and share(scales[at + step]) > share(scales[at]):
        at += step
    return scales[at]


def _compare(rows: dict[str, dict[str, Any]], right: dict[str, list[Any]]) -> None:
    """Add means, and the paired difference from the reference with its interval, to each row."""
    random = np.random.default_rng(0)
    shape = np.stack(right[REFERENCE]).shape
    drawn = random.integers(shape[-1], size=(RESAMPLES, shape[-1]))
    for method, row in rows.items():
        values = np.stack(right[method])
        # Use the same resampled images for all tasks and seeds, because these have the same digits.
        apart = (values - np.stack(right[REFERENCE])).mean((0, 1))
        low, high = np.quantile(apart[drawn].mean(1), [0.025, 0.975])
        row["mean"] = round(float(values.mean()), 4)
        row["tasks"] = [round(float(v), 4) for v in values.mean((0, 2))]
        row["seeds"] = [round(float(v), 4) for v in values.mean((1, 2))]
        row["difference"] = [round(float(v), 4) for v in (apart.mean(), low, high)]


def _searched(
    state: State,
    suites: dict[int, Any],
    alone: dict[int, dict[str, ak.Adapter]],
    tasks: list[str],
    rows: Any,
    chosen: Any,
) -> list[dict[str, Any]]:
    """Search on the images for choices, one row for each seed; `row` is the best row of the table on them."""
    found = []
    for place, (seed, suite) in enumerate(suites.items()):
        several = [alone[seed][name] for name in tasks]
        own = np.array([state.own(suite, alone[seed][name], name, False) for name in tasks])

        def loss(adapter: ak.Adapter, suite: Any = suite, own: Any = own) -> float:
            state.check_time()
            right = suite.right(suite.changes(adapter), 1.0, tasks, False)
            return 1 - float((right.double().mean(1).numpy() / own).mean())

        best_row = max(rows, key=lambda name: rows[name]["choosing"][place])
        scale = rows[best_row]["scales"][place]
        # The table scales results. Equal weights do the same for linear methods, and the parameter `scale` for most.
        start: list[tuple[str, list[float], dict[str, float]]] = [(best_row, [scale] * len(tasks), {})]
        start += [(best_row, [1.0] * len(tasks), {"scale": scale})] if _scales(best_row) else []
        best = ak.search(
            several,
            loss,
            methods=list(dict.fromkeys([best_row, *SEARCHED])),
            budget=chosen.search,
            start=start,
            seed=seed,
            rank=None,  # type: ignore[arg-type]
            trials=chosen.work / f"{'-'.join(tasks)}-{chosen.search}-s{seed}.trials",
        ).best
        assert best.loss is not None
        found.append({
            "seed": seed, "row": best_row, "row_choosing": rows[best_row]["choosing"][place],
            "choosing": round(1 - best.loss, 4), "found": best.settings(),
        })  # fmt: skip
        print(f"search of {len(tasks)} tasks: {found[-1]}", file=sys.stderr, flush=True)
    return found


def _scales(method: str) -> bool:
    """Whether a method, or the method that follows a plug-in, has the parameter `scale`."""
    name, values = resolved(method, None)
    return any("scale" in ak.ops.COMBINERS[str(each)].parameters() for each in (name, *values.values()))


if __name__ == "__main__":
    main()

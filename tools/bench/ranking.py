"""Ranks combiners by their distance from the single adapters, for two, four and six tasks, with paired intervals.

    python tools/bench/ranking.py OUT.json [--seeds 1 2 3] [--counts 2 4 6] [--search 40]
    python tools/bench/ranking.py OUT.json --model DIR [--steps 150] [--items 500]

The tasks are six mild changes of the demo's digits (tools/bench/rig/mild.py), with a LoRA of rank 8 for each task and
seed. Each method has one scale for all tasks, which is the best on images that no adapter saw; the figures are measured
on further images. Each accuracy is divided by the accuracy of the task's own adapter. The difference from task
arithmetic is measured on the same images; its 95 % interval comes from 2,000 resamples of them. Seconds are processor
time of one combination. A second run, `rank`, cuts results without low-rank factors, and sums of ranks, to the rank of
the adapters. --search runs `ak.search` with this number of trials on the same images that choose the scale, and
compares its best result with the best row. The benchmark takes about ten minutes on two cores.

With --model, the folder of a language model such as SmolLM2-135M, there are six tasks with answers of a few tokens
(tools/bench/rig/answers.py), and LoRAs of rank 16. A training step takes 0.5 seconds of processor time, and 1,000
answers take 8 seconds. 37 methods with one seed take 50 minutes on one core, and half of that on two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
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
from adapterkit.searching import METHODS as SEARCHED  # noqa: E402

SCALES = (0.25, 0.4, 0.6, 0.8, 1.0, 1.4)
RESAMPLES = 2000
REFERENCE = "task_arithmetic"


_OWN: dict[tuple[int, str, bool], float] = {}
"""The row of single adapters, by whose accuracies all others are divided."""


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
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-ranking")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    chosen.rank = chosen.rank or (8 if chosen.model is None else 16)
    suites = {seed: _suite(chosen, seed) for seed in chosen.seeds}
    first = next(iter(suites.values()))
    names = chosen.tasks or list(first.names)
    alone = {seed: {name: suite.adapter(name) for name in names} for seed, suite in suites.items()}
    trained = {"epochs": chosen.epochs} if chosen.model is None else {"steps": chosen.steps}
    found: dict[str, Any] = {
        "tasks": names, "seeds": chosen.seeds, **trained, "rank": chosen.rank, "scales": list(chosen.scales),
        first.what: dict(zip(("choosing", "reported"), first.sizes, strict=True)), "resamples": RESAMPLES,
        "single": _singles(suites, alone), "counts": {},
    }  # fmt: skip
    for count in chosen.counts:
        found["counts"][str(count)] = _ranked(suites, alone, count, chosen)
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def _suite(chosen: Any, seed: int) -> Any:
    if chosen.model is None:
        return MildDigits(chosen.work, chosen.epochs, chosen.rank, seed)
    from rig.answers import Answers

    return Answers(chosen.model, chosen.work, chosen.steps, chosen.rank, seed, chosen.items)


def _singles(suites: dict[int, Any], alone: dict[int, dict[str, ak.Adapter]]) -> dict[str, Any]:
    """Return the accuracy of the base and of each adapter at its own task, over the seeds."""
    names = list(next(iter(alone.values())))
    suite = next(iter(suites.values()))
    base = suite.right({}, 1.0, names, True).double().mean(1)
    own = [[_own(s, alone[k][n], n, True) for n in names] for k, s in suites.items()]
    rows = zip(names, base, np.mean(own, 0), strict=True)
    return {name: {"base": round(float(b), 4), "own": round(float(o), 4)} for name, b, o in rows}


def _own(suite: Any, adapter: ak.Adapter, name: str, testing: bool) -> float:
    """Return an adapter's accuracy at its own task."""
    key = suite.seed, name, testing
    if key not in _OWN:
        _OWN[key] = float(suite.right(suite.changes(adapter), 1.0, [name], testing).double().mean())
    return _OWN[key]


def _ranked(suites: dict[int, Any], alone: dict[int, dict[str, ak.Adapter]], count: int, chosen: Any) -> Any:
    """Return the rows for a number of tasks: the results as they are, and cut to the adapters' rank."""
    tasks = list(next(iter(alone.values())))[:count]
    made: dict[str, Any] = {}
    for cut in (None, chosen.rank) if count in chosen.cut else (None,):
        right: dict[str, list[Any]] = {}
        rows: dict[str, dict[str, Any]] = {}
        for method in chosen.methods:
            if method == "slerp" and count != 2:
                continue
            tried = [_scored(suites[seed], alone[seed], tasks, method, cut, seed, chosen.scales) for seed in suites]
            each = [one for one in tried if one is not None]
            if len(each) < len(tried):
                continue
            right[method] = [one["right"] for one in each]
            rows[method] = {
                "scales": [one["scale"] for one in each], "choosing": [round(one["choosing"], 4) for one in each],
                "seconds": round(float(np.mean([one["seconds"] for one in each])), 4),
            }  # fmt: skip
            print(f"{count} tasks, rank {cut}: {method}", file=sys.stderr, flush=True)
        _compare(rows, right)
        made["any" if cut is None else "rank"] = dict(sorted(rows.items(), key=lambda row: -row[1]["mean"]))
    if chosen.search:
        made["search"] = _searched(suites, alone, tasks, made["any"], chosen)
    return made


def _scored(
    suite: Any,
    alone: dict[str, ak.Adapter],
    tasks: list[str],
    method: str,
    cut: int | None,
    seed: int,
    scales: Sequence[float],
) -> dict[str, Any] | None:
    """Combine by one method, choose the scale, and return its correct answers; None if the method cannot be cut."""
    several = [alone[name] for name in tasks]
    own, tested = (np.array([_own(suite, alone[name], name, testing) for name in tasks]) for testing in (False, True))
    started = time.process_time()
    try:
        made = computed(ak.ops.combine(several, method, seed=seed, rank=cut))
    except AdapterkitError as error:
        print(f"{method}: {error}", file=sys.stderr)
        return None
    seconds = time.process_time() - started
    changes = suite.changes(made)
    shares = {
        each: float((suite.right(changes, each, tasks, False).double().mean(1).numpy() / own).mean()) for each in scales
    }
    scale = max(shares, key=lambda each: shares[each])
    right = suite.right(changes, scale, tasks, True).numpy() / tested[:, None]
    return {"scale": scale, "choosing": shares[scale], "seconds": seconds, "right": right}


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
    suites: dict[int, Any], alone: dict[int, dict[str, ak.Adapter]], tasks: list[str], rows: Any, chosen: Any
) -> list[dict[str, Any]]:
    """Search on the images for choices, one row for each seed; `row` is the best row of the table on them."""
    found = []
    for place, (seed, suite) in enumerate(suites.items()):
        several = [alone[seed][name] for name in tasks]
        own = np.array([_own(suite, alone[seed][name], name, False) for name in tasks])

        def loss(adapter: ak.Adapter, suite: Any = suite, own: Any = own) -> float:
            right = suite.right(suite.changes(adapter), 1.0, tasks, False)
            return 1 - float((right.double().mean(1).numpy() / own).mean())

        best_row = max(rows, key=lambda name: rows[name]["choosing"][place])
        methods = list(dict.fromkeys([best_row, *SEARCHED]))
        # The table scales results, so use equal weights: for methods that are linear in the changes, both are the same.
        start = [(best_row, [min(rows[best_row]["scales"][place], 1.5)] * len(tasks), {})]
        best = ak.search(
            several,
            loss,
            methods=methods,
            budget=chosen.search,
            start=start,
            seed=seed,
            rank=None,  # type: ignore[arg-type]
        ).best
        assert best.loss is not None
        found.append({
            "seed": seed, "row": best_row, "row_choosing": rows[best_row]["choosing"][place],
            "choosing": round(1 - best.loss, 4), "found": best.settings(),
        })  # fmt: skip
        print(f"search of {len(tasks)} tasks: {found[-1]}", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()

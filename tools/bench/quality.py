"""Measures the tasks of two adapters combined with each method, against single adapters and joint training.

    python tools/bench/quality.py [--seeds 1 2 3] [--tasks rotated negative] [--scales 0.3 0.5 0.7 1 1.5]
    python tools/bench/quality.py --model DIR [--seeds 1 2 3] [--steps 12]

Without --model, the figure is the accuracy of the demo's digit tasks, with a LoRA of rank 8 for each task, trained as
in `tools/train_demo.py`; this takes two minutes on one core. With --model, the folder that `tools/real_model.py`
writes, the figure is the loss on source code and on prose; this takes some minutes. One adapter is trained for each
task, and one for all tasks together. The single adapters are combined by each method with each weight. The weight is
chosen on data that no adapter saw, and the figures are measured on further data. They are means over the seeds of
training and of random methods; the last column also has the standard deviation. Adapters are kept in --work.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tools" / "bench")]

from rig.digits import TASKS, Digits  # noqa: E402 - the checkout's own

import adapterkit as ak  # noqa: E402
from adapterkit.io.lazy import from_numpy  # noqa: E402
from adapterkit.ops import COMBINERS  # noqa: E402

ALONE = [name for name in COMBINERS if COMBINERS[name].plug is None and COMBINERS[name].takes[1] != 1]
METHODS = [name for name in ALONE if COMBINERS[name].data is None] + [
    "knots_ties", "knots_dare_ties", "core_ties", "core_dare_ties", "core_cart", "ctm_ties", "pico_task_arithmetic",
    "pico_tsv", "svc_task_arithmetic", "factors_linear",
]  # fmt: skip


Row = tuple[float | None, list[float]]
"""The score of each task, and the weight, if the row is a combination."""


def main() -> None:
    """Train missing adapters, combine, measure, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["rotated", "negative"], choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run for each seed")
    parser.add_argument("--scales", nargs="+", type=float, help="weights to choose from")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--model", type=Path, help="folder of a language model: two kinds of text instead of digits")
    parser.add_argument("--steps", type=int, default=12, help="steps of training for each kind of text")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-quality")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    scales = chosen.scales or ([0.3, 0.5, 0.7, 1.0, 1.5] if chosen.model is None else [0.5, 1.0])
    found: dict[str, list[Row]] = {}
    for seed in chosen.seeds:
        suite = _suite(chosen, seed)
        for name, row in rows(suite, scales, seed):
            found.setdefault(name, []).append(row)
            print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
    table(suite, found)


def _suite(chosen: Any, seed: int) -> Any:
    if chosen.model is None:
        return Digits(chosen.tasks, chosen.work, chosen.epochs, chosen.rank, seed)
    from rig.texts import Texts

    return Texts(chosen.model, chosen.work, chosen.steps, chosen.rank, seed)


def rows(suite: Any, scales: list[float], seed: int) -> Iterator[tuple[str, Row]]:
    """Return name, weight and scores of the base, each adapter, the joint adapter, and each combiner."""
    yield "base", (None, suite.scores(None, True))
    adapters = {name: suite.adapter(name) for name in [*suite.names, "joint"]}
    for name, adapter in adapters.items():
        yield f"{name} alone" if name in suite.names else name, (None, suite.scores(adapter, True))
    several = [adapters[name] for name in suite.names]
    for method in METHODS:
        if method != "slerp" or len(several) == 2:
            scale, made = best(suite, computed(ak.ops.combine(several, method, seed=seed)), scales)
            yield method, (scale, suite.scores(made, True))


def computed(adapter: ak.Adapter) -> ak.Adapter:
    """Return the adapter with every tensor computed once, instead of at each read."""
    return adapter.map(lambda leaf: from_numpy(leaf.numpy()))  # type: ignore[union-attr]


def best(suite: Any, made: ak.Adapter, scales: list[float]) -> tuple[float, ak.Adapter]:
    """Return the best scale (for all methods, the paper's lambda), and the combination times this scale."""
    tried = {scale: ak.ops.scale(made, scale) for scale in scales}
    found = {scale: mean(suite.scores(adapter, False)) for scale, adapter in tried.items()}
    scale = (min if suite.lower else max)(found, key=lambda s: found[s])
    return scale, tried[scale]


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def table(suite: Any, found: dict[str, list[Row]]) -> None:
    """Return means over the seeds, the chosen weights, and the standard deviations over the seeds."""
    print(f"{'':<24}{'weights':>12}" + "".join(f"{name:>12}" for name in suite.names) + f"{'mean':>10}{'between':>10}")
    form = ".3f" if suite.lower else ".2%"
    for name, several in found.items():
        weights = sorted({weight for weight, _ in several if weight is not None})
        tasks = [mean(list(one)) for one in zip(*(scores for _, scores in several), strict=True)]
        overall = [mean(scores) for _, scores in several]
        apart = statistics.stdev(overall) if len(overall) > 1 else 0.0
        said = " ".join(f"{weight:g}" for weight in weights)
        shown = "".join(f"{value:>12{form}}" for value in tasks)
        print(f"{name:<24}{said:>12}{shown}{mean(overall):>10{form}}{apart:>10{form}}")


if __name__ == "__main__":
    main()

"""Compares the compiled loops of a merge with numpy: equal bits on many random numbers, and processor time.

    python tools/bench/kernel.py [--numbers 1e9] [--rank 16] [--rounds 3] [--json FILE]

For LoRA and DoRA and each pair of element types, the script draws weights and factors at different scales until it has
compared `--numbers` numbers. It exits with 1 if a bit differs. It also counts the blocks that a loop leaves to numpy.
Times are for one core.

Finally, the script compares the loop's rate with the processor's peak, for bfloat16, weights of 0.02 and changes of 5 %
of them. `--rank 128` has the arithmetic of eight adapters of rank 16 at once. The peak is the rate of a large matrix
product in float32 by numpy's BLAS.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product as product_of
from typing import Any

import numpy as np
from rig.figures import Figures, arguments
from threadpoolctl import threadpool_limits

from adapterkit.io.lazy import DTYPES
from adapterkit.linalg.products import product
from adapterkit.merging.arrays import NumpyArrays
from adapterkit.merging.compiled import WRITTEN, LowRankSum, NormalizedSum
from adapterkit.methods.dora import DoRA
from adapterkit.native import KINDS, loops

ROWS, WIDTH = 192, 2048


@dataclass(slots=True)
class Seen:
    """The comparison for one pair of element types; seconds are processor time."""

    numbers: int = 0
    differ: int = 0
    left: int = 0
    blocks: int = 0
    ours: float = 0.0
    theirs: float = 0.0


def compare(method: str, kinds_of: tuple[str, str], numbers: float, rank: int, rng: np.random.Generator) -> Seen:
    """Compare block by block until this many numbers have been compared."""
    source, target = kinds_of
    seen, arrays = Seen(), NumpyArrays()
    kinds = DTYPES[source], DTYPES[target]
    made, wanted = (np.empty((ROWS, WIDTH), kinds[1].array) for _ in range(2))
    change = np.empty((ROWS, WIDTH))
    with threadpool_limits(1), arrays.quiet():
        while seen.numbers < numbers:
            weight = (10.0 ** rng.uniform(-3, 1) * rng.standard_normal((ROWS, WIDTH))).astype(kinds[0].array)
            size = 10.0 ** rng.uniform(-3, 0)
            left, right = size * rng.standard_normal((ROWS, rank)), rng.standard_normal((rank, WIDTH)) * 0.05
            m = 10.0 ** rng.uniform(-3, 1) * rng.standard_normal(ROWS)
            prepared = LowRankSum(left, right) if method == "LoRA" else NormalizedSum(m, left, right)
            start = time.thread_time()
            settled = prepared.write(weight.reshape(-1), made.reshape(-1), kinds, 0, ROWS) is not None
            middle = time.thread_time()
            if method == "LoRA":
                product(change, left, right)
                arrays.add(weight.reshape(-1), change.reshape(-1), wanted.reshape(-1))  # type: ignore[arg-type]
            else:
                arrays.assign(change.reshape(-1), weight.reshape(-1))  # type: ignore[arg-type]
                update: Any = DoRA(A=right, B=left, magnitude=m)  # type: ignore[arg-type]
                arrays.assign(wanted, update.new_weight(change))
            end = time.thread_time()
            seen.ours, seen.theirs = seen.ours + middle - start, seen.theirs + end - middle
            seen.blocks, seen.left = seen.blocks + 1, seen.left + (not settled)
            seen.numbers += made.size
            if settled:
                seen.differ += int((made.view(f"u{made.itemsize}") != wanted.view(f"u{made.itemsize}")).sum())
    return seen


def share_of_peak(rank: int, rng: np.random.Generator) -> float:
    """Return the rate of multiplications and additions of the LoRA loop, in percent of the rate of a matrix product."""
    kind, side = DTYPES["BF16"], 1024
    weight = (0.02 * rng.standard_normal(ROWS * WIDTH)).astype(kind.array)
    left, right = rng.standard_normal((ROWS, rank)), rng.standard_normal((rank, WIDTH))
    prepared, made = LowRankSum(left * (0.001 / rank**0.5), right), np.empty_like(weight)
    a, product_ = np.full((side, side), 0.5, np.float32), np.empty((side, side), np.float32)

    def ours() -> None:
        prepared.write(weight, made, (kind, kind), 0, ROWS)

    def peak() -> None:
        np.matmul(a, a, out=product_)

    def seconds(run: Callable[[], None]) -> float:
        start = time.thread_time()
        run()
        return time.thread_time() - start

    with threadpool_limits(1):
        times = [(seconds(ours), seconds(peak)) for _ in range(30)]
    mine, best = (min(each) for each in zip(*times, strict=True))
    return 100 * (ROWS * WIDTH * rank / mine) / (side**3 / best)


def main() -> int:
    """Print one line for each pair of types."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--numbers", type=float, default=1e7, help="numbers to compare for each pair of types")
    arguments(parser, 3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if loops() is None:
        print("the compiled loop is missing: run tools/build_kernel.py", file=sys.stderr)
        return 2
    rng, wrong, figures = np.random.default_rng(asked.seed), 0, Figures("kernel")
    print("method  from  to        numbers   differ  left to numpy  ns, compiled  ns, numpy   ratio")
    for method in ("LoRA", "DoRA"):
        for kinds in product_of(KINDS, WRITTEN):
            each = asked.numbers / asked.rounds
            rounds = [compare(method, kinds, each, asked.rank, rng) for _ in range(asked.rounds)]
            wrong += sum(seen.differ for seen in rounds)
            numbers, differ, left, blocks = (
                sum(getattr(seen, name) for seen in rounds) for name in ("numbers", "differ", "left", "blocks")
            )
            ours, theirs = ([1e9 * getattr(seen, who) / seen.numbers for seen in rounds] for who in ("ours", "theirs"))
            name = f"{method}, {kinds[0]} to {kinds[1]}"
            figures.add(f"{name}, compiled", ours, "ns")
            figures.ratio(f"{name}, numpy / compiled", theirs, ours, more=True)
            ours, theirs = statistics.median(ours), statistics.median(theirs)
            print(
                f"{method:7} {kinds[0]:5} {kinds[1]:5} {numbers:11,} {differ:8} {f'{left} of {blocks}':>14} "
                f"{ours:13.2f} {theirs:10.2f}"
                f" {theirs / ours:7.2f}",
                flush=True,
            )
    shares = [share_of_peak(asked.rank, rng) for _ in range(asked.rounds)]
    figures.add(f"LoRA of rank {asked.rank}, share of the processor's peak", shares, "%", more=True)
    print(f"LoRA of rank {asked.rank}: {statistics.median(shares):.0f} % of the processor's peak")
    figures.write(asked.json)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

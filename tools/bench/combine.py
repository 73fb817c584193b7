"""Times combinations of one target: by adapterkit on factors, by formulas on whole matrices, by PEFT, by mergekit.

    python tools/bench/combine.py [--size 4096] [--tasks 8] [--rank 16] [--targets 1] [--rounds 3]
        [--only tsv] [--no-dense] [--single]

Random float32 LoRA adapters of `size` x `size` targets. Seconds are processor time of all threads, as medians of the
rounds; set OMP_NUM_THREADS=1 for PEFT and mergekit if other work runs at the same time. The dense formula is the
paper's formula in float64 numpy on the same changes. If several methods begin with the same decomposition, it is
computed once, and its time is added to each. The error is the relative difference of adapterkit's result from the dense
formula in the Frobenius norm. Memory is the largest allocation in addition to the adapters, by tracemalloc, which sees
numpy and Python; it is not shown for PEFT and mergekit, whose tensors tracemalloc does not see. mergekit is timed if it
is installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

Array = np.ndarray[Any, Any]
TARGET = Target("layers.0.q")
SINGLE = "--single" in sys.argv
"""Whether formulas on whole matrices may decompose in float32."""


def main() -> None:
    """Parse the options, measure, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", type=int, default=1, help="targets for adapterkit; others are timed on one")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; formulas on whole matrices run once")
    parser.add_argument("--only", nargs="+", choices=list(CASES), help="only these methods, without the other tools")
    parser.add_argument("--single", action="store_true", help="decompose whole matrices in float32, by torch")
    parser.add_argument("--no-dense", action="store_true", help="omit the formulas on whole matrices")
    chosen = parser.parse_args()
    adapters = made(chosen.size, chosen.tasks, chosen.rank, chosen.targets)
    print(f"{chosen.tasks} adapters of rank {chosen.rank}, {chosen.size} x {chosen.size}, per target")
    print(f"{'method':<26}{'seconds':>10}{'MB':>8}{'dense s':>10}{'times':>8}{'error':>10}")
    ak.ops.combine(made(64, 2, 4, 1), "tsv")  # Import first, to not time imports.
    for name in chosen.only or CASES:
        method, parameters, formula = CASES[name]
        row(name, adapters, chosen, lambda m=method, p=parameters: ak.ops.combine(adapters, m, **p), formula)
    for name, contender in ({} if chosen.only else peers(adapters)).items():
        seconds = timed(contender, chosen.rounds, traced=False)[0]
        print(f"{name:<26}{seconds:>10.3f}")


def row(name: str, adapters: list[Adapter], chosen: Any, run: Callable[[], Adapter], formula: Any) -> None:
    """Measure one method: adapterkit, the dense formula, and the difference of both."""
    seconds, peak, result = timed(lambda: written(run()), chosen.rounds)
    line = f"{name:<26}{seconds / chosen.targets:>10.3f}{peak / 1e6:>8.0f}"
    if formula is not None and not chosen.no_dense:
        deltas = [exact(adapter) for adapter in adapters]
        slow, expected = dense(formula, deltas, chosen.rank)
        error = np.linalg.norm(exact(result) - expected) / np.linalg.norm(expected)
        line += f"{slow:>10.3f}{slow / (seconds / chosen.targets):>8.0f}{error:>10.1e}"
    print(line, flush=True)


DENSE: dict[Any, tuple[float, Array]] = {}
"""Times and results of formulas on whole matrices, because several rows are compared with the same formula."""

KEPT: dict[str, tuple[float, Any]] = {}
"""Times and results of decompositions with which several formulas begin."""

BORROWED: list[float] = []
"""Time of the decompositions that the current formula reused."""


def dense(formula: Any, deltas: list[Array], rank: int) -> tuple[float, Array]:
    """Return the processor time and the result of a formula on whole matrices; runs once for all rows."""
    if formula not in DENSE:
        BORROWED.clear()
        seconds, _, expected = timed(lambda: formula(deltas, rank), 1, traced=False)
        DENSE[formula] = seconds + sum(BORROWED), expected
    return DENSE[formula]


def kept(name: str, make: Callable[[], Any]) -> Any:
    """Return a decomposition, computed once; its time is added to each formula that reuses it."""
    if name in KEPT:
        BORROWED.append(KEPT[name][0])
    else:
        started = time.process_time()
        made = make()
        KEPT[name] = time.process_time() - started, made
    return KEPT[name][1]


def made(size: int, tasks: int, rank: int, targets: int) -> list[Adapter]:
    """Return random adapters whose factors have a third in common, so that they partly agree."""

    def lora(task: int, target: int) -> Any:
        shared, own = np.random.default_rng([target]), np.random.default_rng([target, task + 1])
        draw = {"A": (rank, size), "B": (size, rank)}
        fields = {n: 0.5 * shared.standard_normal(s) + own.standard_normal(s) for n, s in draw.items()}
        return METHODS["lora"](**{n: from_numpy(values.astype(np.float32)) for n, values in fields.items()})

    return [
        Adapter({Target(f"layers.{i}.q"): (lora(task, i),) for i in range(targets)}) for task in range(tasks)
    ]  # fmt: skip


def exact(adapter: Adapter) -> Array:
    """Return the change of the first target, float64 `[out, in]`."""
    update: Any = adapter.updates[TARGET][0]
    if update.method == "dense":
        return np.asarray(update.D.numpy(), np.float64)
    product: Array = update.B.numpy().astype(np.float64) @ update.A.numpy().astype(np.float64)
    return product * update.scaling


def written(adapter: Adapter) -> Adapter:
    """Return the adapter with every tensor computed, as in a file."""
    return adapter.map(lambda leaf: from_numpy(np.array(leaf.numpy())))  # type: ignore[union-attr]


def timed(run: Callable[[], Any], rounds: int, traced: bool = True) -> tuple[float, int, Any]:
    """Return the median processor time of runs without tracing, the memory of a run with tracing, and the result."""
    seconds: list[float] = []
    for _ in range(rounds):
        started = time.process_time()
        result = run()
        seconds.append(time.process_time() - started)
    if not traced:
        return statistics.median(seconds), 0, result
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return statistics.median(seconds), peak, result


def dense_sum(deltas: list[Array], _: int) -> Array:
    """Task arithmetic."""
    total: Array = sum(deltas)  # type: ignore[assignment]
    return total


def trimmed(D: Array, density: float) -> Array:
    """Keep the largest entries: one more than the density gives, as in the TIES authors' code."""
    count = D.size - int(density * D.size) - 1
    return np.where(np.abs(D) >= np.partition(np.abs(D).ravel(), count)[count], D, 0.0)


def elected(kept: list[Array]) -> Array:
    """Return the mean of the entries with the elected sign."""
    signs = np.sign(sum(kept))
    agree = [np.sign(D) == signs for D in kept]
    total: Array = sum(D * a for D, a in zip(kept, agree, strict=True)) / np.maximum(
        sum(a.astype(int) for a in agree), 1
    )
    return total


def dense_ties(deltas: list[Array], _: int) -> Array:
    """Compute TIES on whole matrices."""
    return elected([trimmed(D, 0.2) for D in deltas])


def thin_svd(D: Array) -> tuple[Array, Array, Array]:
    """Return the thin decomposition by LAPACK in float64; with --single, by torch in float32, which is faster."""
    if not SINGLE:
        return np.linalg.svd(D, full_matrices=False)
    import torch

    U, S, Vh = torch.linalg.svd(torch.from_numpy(D.astype(np.float32)), full_matrices=False)
    return U.numpy(), S.numpy(), Vh.numpy()


def aligned(deltas: list[Array], rank: int) -> tuple[Array, list[Array]]:
    """Return KnOTS's coordinates: a decomposition of all matrices side by side."""
    U, S, Vh = kept("side by side", lambda: thin_svd(np.hstack(deltas)))
    count, n = len(deltas) * rank, deltas[0].shape[1]
    return U[:, :count], [S[:count, None] * Vh[:count, t * n : (t + 1) * n] for t in range(len(deltas))]


def dense_knots_sum(deltas: list[Array], rank: int) -> Array:
    """KnOTS with task arithmetic."""
    U, parts = aligned(deltas, rank)
    return np.asarray(U @ dense_sum(parts, rank))


def dense_knots(deltas: list[Array], rank: int) -> Array:
    """KnOTS with TIES."""
    U, parts = aligned(deltas, rank)
    return np.asarray(U @ dense_ties(parts, rank))


def cores(deltas: list[Array], rank: int) -> tuple[Array, list[Array], Array]:
    """Return Core Space's coordinates: decompositions of all matrices side by side and stacked."""
    U = kept("side by side", lambda: thin_svd(np.hstack(deltas)))[0][:, : len(deltas) * rank]
    V = kept("on top", lambda: thin_svd(np.hstack([D.T for D in deltas])))[0][:, : len(deltas) * rank]
    return U, [U.T @ D @ V for D in deltas], V.T


def dense_core_sum(deltas: list[Array], rank: int) -> Array:
    """Core Space with task arithmetic."""
    U, parts, Vh = cores(deltas, rank)
    return np.asarray(U @ dense_sum(parts, rank) @ Vh)


def dense_core_ties(deltas: list[Array], rank: int) -> Array:
    """Core Space with TIES."""
    U, parts, Vh = cores(deltas, rank)
    return np.asarray(U @ dense_ties(parts, rank) @ Vh)


def dense_cart(deltas: list[Array], rank: int) -> Array:
    """Compute CART: the mean, and the leading directions of differences from it (0.12 of the adapters' directions)."""
    centre = dense_sum(deltas, rank) / len(deltas)
    total = centre.copy()
    for D in deltas:
        U, S, Vh = leading(D - centre, int(0.12 * rank * len(deltas)))
        total += 2.0 * (U * S) @ Vh
    return total


def leading(D: Array, rank: int) -> tuple[Array, Array, Array]:
    """The first singular values and vectors."""
    U, S, Vh = thin_svd(D)
    return U[:, :rank], S[:rank], Vh[:rank]


def polar(X: Array) -> Array:
    """The polar factor."""
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return np.asarray(U @ Vh)


def dense_tsv(deltas: list[Array], rank: int) -> Array:
    """TSV-M on whole matrices."""
    U, S, Vh = zip(*(leading(D, rank) for D in deltas), strict=True)
    return np.asarray(polar(np.hstack(U)) * np.concatenate(S) @ polar(np.vstack(Vh)))


def dense_iso(deltas: list[Array], rank: int) -> Array:
    """Iso-C over the directions that the adapters span."""
    U, S, Vh = leading(dense_sum(deltas, rank), rank * len(deltas))
    return np.asarray(S.mean() * U @ Vh)


def dense_iso_cts(deltas: list[Array], rank: int) -> Array:
    """Compute Iso-CTS: 0.8 of the directions are those of the sum; each task adds its own orthogonal ones."""
    U, S, Vh = leading(dense_sum(deltas, rank), rank * len(deltas))
    own = round((len(S) - int(0.8 * len(S))) / len(deltas))
    common = len(S) - own * len(deltas)
    U, S, Vh = U[:, :common], S[:common], Vh[:common]
    parts = [(U, S, Vh), *(leading(D - U @ (U.T @ D), own) for D in deltas)]
    every = zip(*parts, strict=True)
    return np.asarray(
        polar(np.hstack(next(every))) * np.concatenate(next(every)).mean() @ polar(np.vstack(next(every)))
    )


def dense_model_stock(deltas: list[Array], _: int) -> Array:
    """Model Stock on whole matrices."""
    flat = np.stack([D.ravel() for D in deltas])
    cosines = flat @ flat.T / np.outer(*[np.sqrt((flat * flat).sum(1))] * 2)
    n = len(deltas)
    c = max((cosines.sum() - n) / (n * (n - 1)), 0.0)
    return np.asarray(n * c / (1 + (n - 1) * c) * dense_sum(deltas, 0) / n)


CASES: dict[str, tuple[str, dict[str, Any], Callable[[list[Array], int], Array] | None]] = {
    "linear": ("linear", {}, dense_sum),
    "model_stock": ("model_stock", {}, dense_model_stock),
    "knots_task_arithmetic": ("knots_task_arithmetic", {}, dense_knots_sum),
    "knots_ties, per tensor": ("knots_ties", {"scope": "tensor"}, dense_knots),
    "knots_dare_ties": ("knots_dare_ties", {}, None),
    "core_task_arithmetic": ("core_task_arithmetic", {}, dense_core_sum),
    "core_ties, of products": ("core_ties", {"basis": "products"}, dense_core_ties),
    "core_ties": ("core_ties", {}, None),
    "core_dare_ties": ("core_dare_ties", {}, None),
    "core_tsv": ("core_tsv", {}, dense_tsv),
    "core_cart": ("core_cart", {}, dense_cart),
    "tsv": ("tsv", {}, dense_tsv),
    "iso_c": ("iso_c", {}, dense_iso),
    "iso_cts": ("iso_cts", {}, dense_iso_cts),
    "cart": ("cart", {}, dense_cart),
    "ctm": ("ctm", {}, None),
    "pico": ("pico", {}, None),
    "svc": ("svc", {}, None),
    "wudi": ("wudi", {}, None),
    "lego": ("lego", {}, None),
    "robust_merge": ("robust_merge", {}, None),
    "linear, rank 16": ("linear", {"rank": 16}, None),
    "knots_ties": ("knots_ties", {}, None),
    "ties, rank 16": ("ties", {"rank": 16}, None),
    "dare_ties, rank 16": ("dare_ties", {"rank": 16}, None),
    "della, rank 16": ("della", {"rank": 16}, None),
    "breadcrumbs, rank 16": ("breadcrumbs", {"rank": 16}, None),
    "sce, rank 16": ("sce", {"rank": 16}, None),
    "ties, per tensor": ("ties", {"scope": "tensor"}, dense_ties),
    "dare_linear": ("dare_linear", {}, None),
}
"""A case: adapterkit's method and parameters, and the paper's formula on whole matrices, if it is short."""


def peers(adapters: list[Adapter]) -> dict[str, Callable[[], Any]]:
    """Measure PEFT's `add_weighted_adapter` and mergekit's `merge_tensors` on the same changes."""
    return {**_peft(adapters), **_mergekit(adapters)}


def _peft(adapters: list[Adapter]) -> dict[str, Callable[[], Any]]:
    import peft
    import torch

    updates: list[Any] = [adapter.updates[TARGET][0] for adapter in adapters]
    rank, size = updates[0].A.shape
    model = torch.nn.Sequential()
    model.q = torch.nn.Linear(size, size, bias=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["q"])
    adapted = peft.get_peft_model(model, config, "0")
    for t in range(1, len(adapters)):
        adapted.add_adapter(str(t), config)
    layer = adapted.base_model.model.q
    with torch.no_grad():
        for t, update in enumerate(updates):
            layer.lora_A[str(t)].weight.copy_(torch.tensor(update.A.numpy()))
            layer.lora_B[str(t)].weight.copy_(torch.tensor(update.B.numpy()))
    names, weights = [str(t) for t in range(len(adapters))], [1.0] * len(adapters)

    def run(kind: str, **more: Any) -> Callable[[], None]:
        def once() -> None:
            adapted.add_weighted_adapter(names, weights, "made", combination_type=kind, **more)
            adapted.delete_adapter("made")

        return once

    return {"PEFT cat": run("cat"), "PEFT svd, rank 16": run("svd"), "PEFT ties_svd": run("ties_svd", density=0.2)}


def _mergekit(adapters: list[Adapter]) -> dict[str, Callable[[], Any]]:
    try:
        from mergekit.merge_methods import merge_tensors
    except ImportError:
        return {}
    import torch

    deltas = [torch.tensor(exact(adapter), dtype=torch.float32) for adapter in adapters]
    base = torch.zeros_like(deltas[0])
    ties = {"weight": [1.0] * len(deltas), "density": 0.2}
    return {
        "mergekit ties": lambda: merge_tensors([base, *deltas], "ties", parameters=ties, base_index=0),
        "mergekit model_stock": lambda: merge_tensors([base, *deltas], "model_stock", base_index=0),
    }


if __name__ == "__main__":
    main()

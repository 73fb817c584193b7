"""Compute results in advance on a pool of threads, and limit the BLAS library to one thread.

For each matrix product, a BLAS library starts one thread per processor. More threads do not make products of low-rank
factors faster: the combiner `tsv` takes 33 s for 224 targets of 4096 x 4096 with one BLAS thread, and 37 s with two. If
another program uses one of the cores, `tsv` with two threads takes over 240 s, because BLAS threads spin while they
wait for each other. So a pool computes several targets in parallel, each with one BLAS thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future


Item = TypeVar("Item")
Result = TypeVar("Result")

MEMORY = 256 << 20
"""The number of bytes that all workers of a pool may use together, unless a single item needs more."""


@contextmanager
def ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    cost: Callable[[Item], int] | None = None,
) -> Iterator[Iterator[Result]]:
    """Yield an iterator over the results of `work`, in the order of the items.

    Worker threads compute the results in advance.

    Args:
        work: a function that computes the result of an item. If the function raises an error for an item, the iterator
            raises the error when it reaches the item.
        items: the items.
        workers: the number of threads. This is also the largest number of results that are computed in advance.
        cost: a function that returns the number of bytes that `work` needs for an item. Items that run at the same time
            need at most `MEMORY` bytes together. An item that needs more than `MEMORY` bytes runs alone.
    """
    from concurrent.futures import ThreadPoolExecutor

    pool, budget = ThreadPoolExecutor(workers), _Budget(MEMORY)

    def within(item: Item) -> Result:
        with budget.taken(0 if cost is None else cost(item)):
            return work(item)

    def results() -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(within, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def most_workers() -> int:
    """Return the default number of workers: one per processor that this process may use, at most 16."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)


class _Budget:
    """A memory budget that threads share. A thread that needs memory waits until enough bytes are free."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.changed = total, 0, Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        with self.changed:
            # An item that exceeds the whole budget may run when no other item runs. Without this exception, it would
            # wait forever.
            self.changed.wait_for(lambda: self.used == 0 or self.used + count <= self.total)
            self.used += count
        try:
            yield
        finally:
            with self.changed:
                self.used -= count
                self.changed.notify_all()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit the BLAS library of the whole process to one thread, inside a `with` block."""
    # Import numpy first, because threadpoolctl limits only libraries that are already loaded. When numpy was imported
    # for the first time inside the block, `diff` of 126 small targets took 16 s of processor time instead of 1.3 s.
    import numpy as np  # noqa: F401
    from threadpoolctl import threadpool_limits

    # threadpoolctl sets the thread limit of the whole process, and restores the previous limit at the end. Suppose that
    # two Python threads did this at the same time. The second thread would save 1 as the previous limit. If the second
    # thread ended last, the limit would stay 1. So only the first block sets the limit, and the block that ends last
    # restores it.
    with _LOCK:
        if not _LIMIT:
            _LIMIT.append(threadpool_limits(1, "blas"))
        _INSIDE.append(None)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.pop()
            if not _INSIDE:
                _LIMIT.pop().restore_original_limits()


_LOCK = Lock()
_LIMIT: list[Any] = []
_INSIDE: list[None] = []

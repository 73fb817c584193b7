"""Compute results ahead on a pool of threads, in order, and limit the BLAS to one thread in the meantime.

A BLAS library starts one thread per processor for each product. For low-rank factors that gains nothing: TSV on 224
targets of 4096 x 4096 takes 33 s with one BLAS thread, 37 s with two, and over 240 s with two while another program
uses one of the cores, because BLAS threads spin while they wait for each other. A pool that computes each target with
one BLAS thread avoids that.
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
"""Bytes that the workers of a pool may hold together, unless a single item needs more."""


@contextmanager
def ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    cost: Callable[[Item], int] | None = None,
) -> Iterator[Iterator[Result]]:
    """Yield an iterator over the results of `work` in the order of the items; later items are computed ahead.

    Args:
        work: computes the result of an item; an error is raised when the result is requested.
        items: the items.
        workers: the number of threads, and of results that may wait.
        cost: a function that returns the bytes an item holds while it is computed. The sum over running items stays
            below `MEMORY`; an item that needs more than that runs alone.
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
    """A number of bytes that threads share; a thread waits until enough are free."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.changed = total, 0, Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        with self.changed:
            # An item that exceeds the whole budget runs when no other does; otherwise it would wait forever.
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
    """Limit the BLAS of the whole process to one thread within the block."""
    # Only libraries that are already loaded are limited: when numpy was imported inside the block, `diff` of 126 small
    # targets took 16 s of processor time instead of 1.3 s.
    import numpy as np  # noqa: F401
    from threadpoolctl import threadpool_limits

    # threadpoolctl sets a process-wide number and later restores the previous one. With two nested or overlapping
    # blocks, the second would find 1 and might restore it last, for good. So the first block sets the limit, and the
    # last block to end restores it.
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

"""A pool of threads whose results come in order, and the limit to one BLAS thread that goes with it.

A BLAS library starts a thread per processor for each product. On factors that gains nothing: TSV on 224 targets of
4096 x 4096 takes 33 s with one thread, 37 s with two, and over 240 s with two where another program has one of the
cores, because BLAS threads spin while they wait for each other. A pool of targets with one BLAS thread each has no such
fault.
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
"""Bytes that the workers of a pool may hold together, if one of them alone does not need more."""


@contextmanager
def ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    cost: Callable[[Item], int] | None = None,
) -> Iterator[Iterator[Result]]:
    """The results of `work`, one an item and in their order, while later ones are worked on.

    Args:
        work: what is done with each; an error is raised when its turn comes.
        items: what there is to do.
        workers: threads, and how many results may wait.
        cost: the bytes that work on an item holds; the sum over the items that run stays below `MEMORY`, but an item
            that needs more than that runs alone.
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
    """Workers where the caller does not say: one a processor that this process may use, 16 at most."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)


class _Budget:
    """Bytes that several threads share; a thread waits until its part is free."""

    def __init__(self, total: int) -> None:
        self.total, self.used, self.changed = total, 0, Condition()

    @contextmanager
    def taken(self, count: int) -> Iterator[None]:
        with self.changed:
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
    """Within the block BLAS uses one thread, in the whole process.

    threadpoolctl sets a number that the process shares, and restores what it found. Where two threads do that at once,
    the second would find 1 and restore 1 last, for good; so the first to enter sets it, and the last to leave restores.
    """
    from threadpoolctl import threadpool_limits

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

"""Seed torch's global generator for a block of code, one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_ONE_AT_A_TIME = RLock()
"""All threads of a process share the generator, so that two workers of a merge would draw each other's numbers."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within the block, and restore it afterwards; other threads wait for the block to end.

    For functions of torch that take no generator, such as `torch.svd_lowrank`. Threads that draw without `seeded` are
    not held up.
    """
    import torch

    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

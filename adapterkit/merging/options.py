"""The options of a merge as one record, which the planner, the engines and the nodes of a cluster share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import StorageError, UsageError


@dataclass(frozen=True, slots=True)
class Options:
    """Options of a merge; see the arguments of `adapterkit.merge` with the same names."""

    dtype: str | None = None
    shard_size: int | None = None
    tied: str | None = None
    allow_partial: bool = False
    seed: int | None = None
    memory: int | None = None
    link: bool = False
    checksums: bool = False
    rename: tuple[str, ...] = ()
    vocab: str | None = None


# The memory that a merge may hold, and the number of workers that fit into it.


def allowed(memory: int | None) -> int:
    """Return the bytes that a merge may hold: `memory`, or half of the free memory of the machine or container.

    Raises:
        UsageError: `memory` is not positive.
    """
    if memory is None:
        return max(_available() // 2, 1)
    if memory <= 0:
        raise UsageError(f"a memory of {memory} bytes", cure="Give a positive size, e.g. 2GB")
    return memory


def most_workers() -> int:
    """Return the most threads to compute with, memory aside: one per processor, from 2 to 16."""
    return max(2, min(os.cpu_count() or 2, 16))


def workers_within(memory: int, each: int, tensor: str) -> int:
    """Return how many workers of `each` bytes fit into `memory`, at most `most_workers()`.

    Raises:
        StorageError: not even one fits.
    """
    if each > memory:
        raise StorageError(
            f"needs {each:,} bytes at a time, {memory:,} are allowed", path=None, where=tensor,
            cure="Allow more with memory=/--memory, or merge on a machine with more",
        )  # fmt: skip
    return max(1, min(most_workers(), memory // max(each, 1)))


def _available() -> int:
    return min(_of_machine(), _of_container())


def _of_machine() -> int:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 4 << 30


def _of_container() -> int:
    """Return the free memory of the control group (version 2); a huge number outside of one."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{word}").read_text().strip() for word in ("max", "current"))
        return max(int(limit) - int(used), 0)
    except (OSError, ValueError):
        return 1 << 62

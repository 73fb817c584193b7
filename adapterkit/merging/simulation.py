"""Simulate a merge on a cluster without shared disks, to forecast time, transferred bytes and costs.

Each task downloads the bytes of the base that its file needs, computes, and uploads its file. The tasks of a node share
its network link equally, in each direction. A worker plans the whole merge before its first task, and each node
downloads the adapters once. The simulation ignores limits of the store, and nodes that differ or fail.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import UsageError
from .cluster import spans_of
from .planned import OutputFile, Plan

SPEED = 1.2e9
"""Bytes of merged bf16 weights that a task computes per second, with two threads and a LoRA of rank 16."""

START = 5.0
"""Seconds from the start of a worker to its first task, for imports and for reading the base's headers."""

TARGET = 1e-4
"""Additional seconds per target, because every worker plans the whole merge."""

DRIVER = 6.0
"""Seconds that the driver needs before the first and after the last task, without planning.

`tools/bench nodes` measured 10.7 s for `START` and `DRIVER` together, on a busy machine of two processors.
"""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The expected time, transferred bytes and costs of a merge on a cluster.

    Attributes:
        nodes: the number of nodes.
        seconds: the time from the start of the command to the finished output.
        downloaded, uploaded: the bytes that nodes transfer from and to the store.
        busy: the fraction of the time in which the nodes' links transfer bytes, in the busier direction.
        node_hours: the number of nodes times the hours.
        cost: node_hours times the price; None without a price.
    """

    nodes: int
    seconds: float
    downloaded: int
    uploaded: int
    busy: float
    node_hours: float
    cost: float | None

    def record(self) -> dict[str, float | int | None]:
        """Return the forecast as plain data."""
        cost = None if self.cost is None else round(self.cost, 2)
        return {
            "nodes": self.nodes, "seconds": round(self.seconds, 1), "downloaded": self.downloaded,
            "uploaded": self.uploaded, "busy": round(self.busy, 3), "node_hours": round(self.node_hours, 3),
            "cost": cost,
        }  # fmt: skip


@dataclass(slots=True)
class _Task:
    """A running task and its remaining phases: (0, bytes to download), (1, bytes to upload) or (None, seconds)."""

    node: int
    phases: deque[tuple[int | None, float]] = field(default_factory=deque)


def simulate(
    plan: Plan, nodes: int, *, bandwidth: float, price: float | None = None, tasks: int = 1, speed: float = SPEED,
    start: float | None = None, driver: float | None = None,
) -> Forecast:  # fmt: skip
    """Forecast a merge with `engine="ray"` whose base, adapters and output are on a hub or in a store.

    Args:
        plan: the plan.
        nodes: the number of nodes.
        bandwidth: bytes per second of each node's link, in each direction.
        price: the price of a node for an hour, in any currency.
        tasks: the number of tasks that a node runs at the same time.
        speed: bytes of merged weights that a task computes per second.
        start: seconds from the start of a worker to its first task; default: an estimate from the number of targets.
        driver: seconds that the driver needs before and after all tasks; default: an estimate from the number of
            targets.

    Raises:
        UsageError: a number is not positive.
    """
    for name, value in (("nodes", nodes), ("bandwidth", bandwidth), ("tasks", tasks), ("speed", speed)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be positive, got {value}", where=name, cure=f"Give a positive {name}=")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UsageError(
            f"price must not be negative, got {price}", where="price", cure="Give --price (price=) or omit it"
        )
    planning = TARGET * plan.targets
    start = START + planning if start is None else start
    waiting = deque(_work(plan, file, speed) for file in plan.files)
    down, up = (sum(work[way] for work in waiting) for way in (0, 2))
    adapters = sum(factors_of(plan))
    seconds = _run(waiting, nodes, tasks, bandwidth, start, adapters)
    seconds += DRIVER + planning if driver is None else driver
    hours = nodes * seconds / 3600
    down += adapters * min(nodes, len(plan.files))
    busy = max(down, up) / bandwidth / nodes / seconds
    return Forecast(nodes, seconds, int(down), int(up), busy, hours, None if price is None else hours * price)


def doubling(most: int) -> list[int]:
    """Return 1, 2, 4, ... and `most`."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def factors_of(plan: Plan) -> Iterator[int]:
    """Yield the number of bytes of each tensor in the adapters; each tensor is counted once."""
    seen: set[int] = set()
    for output in plan.outputs():
        for planned in output.folds:
            for update in planned.updates:
                if id(update) not in seen:
                    seen.add(id(update))
                    yield sum(tensor.nbytes for tensor in update.tensors.values())


def _work(plan: Plan, file: OutputFile, speed: float) -> tuple[float, float, float]:
    """Return (bytes to download, seconds of computation, bytes to upload) for one file."""
    down = sum(span.nbytes for span in set(spans_of(file, plan.base)))
    return float(down), file.computed / speed, float(file.size)


def _run(
    waiting: deque[tuple[float, float, float]], nodes: int, tasks: int, bandwidth: float, start: float, adapters: int
) -> float:
    """Return the seconds until the last task ends."""
    running: list[_Task] = []
    # Like Ray, start each task on the node with the fewest running tasks.
    free = deque(node for _ in range(tasks) for node in range(nodes))
    fresh, seen = nodes * tasks, set[int]()
    now = 0.0
    while waiting or running:
        while waiting and free:
            node, (down, seconds, up) = free.popleft(), waiting.popleft()
            task = _Task(node, deque([(0, down), (None, seconds), (1, up)]))
            if fresh:
                fresh -= 1
                task.phases.extendleft([(0, 0.0 if node in seen else float(adapters)), (None, start)])
                seen.add(node)
            running.append(task)
        rates = _rates(running, bandwidth)
        step = min(task.phases[0][1] / rate for task, rate in zip(running, rates, strict=True))
        now += step
        for task, rate in zip(running, rates, strict=True):
            way, left = task.phases[0]
            task.phases[0] = (way, left - rate * step)
        for task in running:
            while task.phases and task.phases[0][1] <= 1e-6:
                task.phases.popleft()
        free.extend(task.node for task in running if not task.phases)
        running = [task for task in running if task.phases]
    return now


def _rates(running: Sequence[_Task], bandwidth: float) -> list[float]:
    """Return the speed of each task's current phase.

    For a transfer, this is the task's share of the link in bytes per second; for a phase measured in seconds, 1.
    """
    sharing: dict[tuple[int, int | None], int] = {}
    for task in running:
        key = task.node, task.phases[0][0]
        sharing[key] = sharing.get(key, 0) + 1
    return [1.0 if task.phases[0][0] is None else bandwidth / sharing[task.node, task.phases[0][0]] for task in running]

"""Run or simulate a merge on a Ray cluster, with one task per output file.

Tasks are idempotent and may run on any node. A task receives only names and options, a few hundred bytes. The task
plans the whole merge from headers, and checks that its plan has the same digest as the driver's plan. Paths and uris
determine where a task reads and writes:

* A task downloads inputs from hubs into scratch space on its node. The task downloads only those bytes of the base that
  its file needs.
* If the output is on a hub, the task uploads its file from its node. In place of each file, the driver stores a sparse
  file that contains only the header. The driver makes the output visible when all files are uploaded.
* Local paths must be on a file system that all nodes share.

So no weight passes through Ray's object store or through the driver.

The simulation forecasts time, transferred bytes and costs of a merge on a cluster without shared disks. It assumes that
the tasks of a node share the node's network link equally, that a worker plans the whole merge before its first task,
and that each node downloads the adapters once. It assumes that all nodes are equal, that none fails, and that the store
does not slow down transfers.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from ..errors import AdapterkitError, Corrupt, NetworkError, StorageError, Unsupported, UsageError, storage_error
from ..io.checkpoint import Checkpoint, opened
from ..io.lazy import Span
from ..io.locations import is_remote, pinned, ranged
from ..io.resolving import hub
from ..quant import Dequantized
from .options import MergeOptions
from .planned import OutputFile, Plan
from .planning import make_plan
from .report import Engine
from .staging_dir import Norms, StagingDir

if TYPE_CHECKING:
    from os import PathLike

    from ..core.adapter import Adapter
    from ..io.resolving import PlacedOutput, RangedBase
    from .execute import Progress

    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]


RETRIES = 16
"""How many times Ray restarts a task whose worker or node died."""

THREADS = 2
"""The number of worker threads per task: one thread computes while the other reads or writes."""


@dataclass(frozen=True, slots=True)
class ClusterRecipe:
    """The arguments from which a task makes the same plan as the driver.

    Attributes:
        base: a path, or a uri that names one commit.
        quantized, onto: as in `merge`; `onto` is a path, or a uri that names one commit.
        adapters: paths, or uris that name one commit; None for an adapter in memory.
        options, device: as in `merge`.
        names: the name and the weight of each adapter.
    """

    base: str
    quantized: str | None
    onto: str | None
    adapters: tuple[str | None, ...]
    options: MergeOptions
    device: str
    names: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class TaskInputs:
    """The plan of a task, and the bases from which the task downloads bytes."""

    plan: Plan
    bases: list[RangedBase]
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(frozen=True, slots=True)
class Shard:
    """The result that a task returns to the driver for the file that the task has written.

    Attributes:
        name: the name of the file.
        norms, runs: as for `StagingDir.finish`; empty if the file is in the staging folder that all nodes share.
        placed: the value that the hub returned for the upload; None if the file is in the shared staging folder.
    """

    name: str
    norms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    runs: tuple[tuple[int, int, str], ...] = ()
    placed: object = None


def recipe_of(
    base: Checkpoint | str, quantized: str | None, onto: Base | None, adapters: Sequence[Source],
    options: MergeOptions, device: str, *, placed: bool = False,
) -> ClusterRecipe:  # fmt: skip
    """Return the recipe of a merge, with absolute paths and pinned uris, so that every node opens the same files.

    Args:
        base: the open base, or its uri if the tasks read it from a hub.
        quantized: as in `merge`.
        onto: as in `merge`; a uri if the tasks read it from a hub.
        adapters: as in `merge`.
        options: as in `merge`.
        device: as in `merge`.
        placed: whether tasks upload their files to a hub. If so, the nodes share no staging folder.

    Raises:
        UsageError: `placed` is set, and either an adapter exists only in memory or a calibration file is given.
    """
    from ..core.adapter import Adapter

    if placed and any(isinstance(adapter, Adapter) for adapter in adapters):
        why = "an adapter in memory cannot be sent to the nodes of a cluster without a shared disk"
        cure = f"Write the adapter with adapterkit.write to a file system that all nodes share; pass its path. {_PUSH}"
        raise UsageError(why, cure=cure)
    if placed and options.calibration is not None:
        why = "a calibration file cannot be sent to the nodes of a cluster without a shared disk"
        raise UsageError(
            why, where="calibration", cure="Omit --calibration (calibration=), or merge into a local folder and push it"
        )
    names = tuple(None if isinstance(a, Adapter) else _named(a) for a in adapters)
    if onto is not None and not (isinstance(onto, str) and is_remote(onto)):
        onto = str(opened(onto).root.resolve())
    if options.calibration is not None:
        options = replace(options, calibration=str(Path(options.calibration).resolve()))
    base = base if isinstance(base, str) else str(base.root.resolve())
    return ClusterRecipe(base, quantized, onto, names, options, device)


def on_ray(
    recipe: ClusterRecipe, named: Sequence[tuple[str, Adapter, float]], address: str | None,
    place: PlacedOutput | None = None,
) -> Engine:  # fmt: skip
    """Return an engine that runs one task on a cluster for each file of a plan.

    Args:
        recipe: the recipe of the merge.
        named: the adapters with their names and weights.
        address: the address of the cluster.
        place: the output on a hub to which tasks upload their files; None to write into the stage, which all nodes must
            share.

    Raises:
        Unsupported: Ray is not installed.
        NetworkError: the engine finds no cluster at the address when it runs.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise Unsupported("Ray is not installed", cure="pip install 'adapterkit[ray]'") from None

    def run(plan: Plan, stage: StagingDir, progress: Progress | None) -> dict[str, Norms]:
        options_here = replace(
            recipe, adapters=_on_disk(recipe, named, stage), names=tuple((name, weight) for name, _, weight in named)
        )
        if place is not None:
            _prepare(plan, stage, place)
        with _connected(address):
            _run(plan, stage, options_here, place, progress)
        return {file.name: stage.norms_of(file.name) for file in plan.files}

    return run


def _prepare(plan: Plan, stage: StagingDir, place: PlacedOutput) -> None:
    """Prepare the upload of the plan's files, except those that an interrupted run uploaded.

    If the hub no longer has a file that an interrupted run uploaded, this file is uploaded again.
    """
    for file in plan.files:
        if stage.finished(file.name) and not place.holds(file.name):
            stage.drop(file.name)
    pending = [file.name for file in plan.files if not stage.finished(file.name)]
    place.forget(pending)
    if pending:
        place.begin(pending)


# The functions below run in a task: plan, download, compute, and write or upload one file.


def write_file(recipe: ClusterRecipe, digest: str, target: str, name: str) -> Shard:
    """Write one file into the stage of `target`, unless the file is already finished. All nodes must share the stage.

    Raises:
        Corrupt: the inputs differ from the driver's inputs.
    """
    with _on_this_node():
        inputs = inputs_of(recipe, digest)
        stage = StagingDir(Path(target), digest, [file.name for file in inputs.plan.files])
        if not stage.finished(name):
            _write(inputs, recipe.device, name, stage.apart())
        return Shard(name)


def put_file(recipe: ClusterRecipe, digest: str, uri: str, name: str) -> Shard:
    """Write one file into scratch space on this node, and upload the file to `uri`; no shared file system is needed.

    Raises:
        Corrupt: the inputs differ from the driver's inputs, or the hub received bytes that differ from the
            file in scratch space.
        NetworkError: a hub is not reachable, or denies access with the credentials of this node.
        StorageError: the disk of this node is full.
    """
    with _on_this_node():
        inputs = inputs_of(recipe, digest)
        with hub().scratch() as folder:
            stage = StagingDir(folder / "made", digest, [name])
            with stage.locked():
                _write(inputs, recipe.device, name, stage)
                placed = hub().put(uri, name, stage.out / name)
                return Shard(name, stage.norms_of(name), tuple(stage.runs_of(name)), placed)


_last: dict[str, TaskInputs] = {}
"""A map from the digest of the last task's plan to the inputs of that task.

A worker process runs many tasks of a merge. If all inputs are uris of fixed commits, which cannot change, the process
plans only once. Otherwise this map stays empty.
"""


def inputs_of(recipe: ClusterRecipe, digest: str) -> TaskInputs:
    """Return the plan of a recipe, and the bases to download from. The plan is made from headers.

    If the last task of this process had the same plan, the inputs of that task may be returned again.

    Raises:
        Corrupt: the plan differs from the driver's plan.
    """
    if digest in _last:
        return _last[digest]
    for inputs in _last.values():
        inputs.closing.close()
    _last.clear()
    with contextlib.ExitStack() as stack:
        inputs = _planned(recipe, stack)
        if inputs.plan.digest != digest:
            why = "the base or the adapters on this node differ from the driver's base or adapters"
            raise Corrupt(
                why, path=recipe.base, cure="Give all nodes the same files and the same version of adapterkit"
            )
        inputs.closing.push(stack.pop_all())
    if all(is_remote(name) for name in (recipe.base, recipe.onto, *recipe.adapters) if name is not None):
        _last[digest] = inputs
    return inputs


def _planned(recipe: ClusterRecipe, stack: contextlib.ExitStack) -> TaskInputs:
    from ..formats import read
    from .quantized import as_merged

    bases: list[RangedBase] = []

    def checkpoint(name: str) -> Checkpoint:
        if not is_remote(name):
            return opened(_seen(name))
        bases.append(stack.enter_context(ranged(name)))
        return opened(bases[-1].path)

    chosen = recipe.options
    onto = None if recipe.onto is None else checkpoint(recipe.onto)
    base = as_merged(checkpoint(recipe.base), recipe.quantized, onto, chosen.dtype, chosen.keep, chosen.calibration)
    paths = [path for path in recipe.adapters if path is not None]
    named = [
        (name, read(path if is_remote(path) else _seen(path), base=base), weight)
        for path, (name, weight) in zip(paths, recipe.names, strict=True)
    ]  # fmt: skip
    return TaskInputs(make_plan(base, named, chosen), bases)


def _seen(path: str) -> str:
    if not os.path.exists(path):
        why = "this path does not exist on a node of the cluster"
        raise StorageError(why, path=path, cure=f"Copy the inputs to a file system that all nodes share. {_PUSH}")
    return path


def _write(inputs: TaskInputs, device: str, name: str, stage: StagingDir) -> None:
    """Write one file of the plan into a stage, then delete the bytes that were downloaded for the file."""
    from .arrays import arrays_for
    from .execute import execute

    position = next(at for at, file in enumerate(inputs.plan.files) if file.name == name)
    file, devices = inputs.plan.files[position], device.split(",")
    arrays = arrays_for(devices[position % len(devices)].strip())
    spans = list(spans_of(file, inputs.plan.base))
    try:
        if inputs.bases:
            _check_space(file.size + sum(span.nbytes for span in set(spans)), stage.folder)
        for base in inputs.bases:
            base.bring(spans)
        execute([file], stage, [arrays], None, THREADS, checksums=inputs.plan.checksums)
    except AdapterkitError as error:
        for base in inputs.bases:
            error.path = error.path and error.path.replace(str(base.path), base.uri)
        raise
    finally:
        for base in inputs.bases:
            base.drop()


def spans_of(file: OutputFile, base: Checkpoint) -> Iterator[Span]:
    """Yield the byte ranges of the base's files that are needed to compute an output file.

    A source tensor that is computed, such as an embedding with new rows, has no byte range. The bytes from which it is
    computed are read later.
    """
    if file.whole is not None:
        yield Span(str(file.whole), 0, file.size)
    for output in file.outputs:
        tensors = [output.source, *(fold.seen.tensor for fold in output.folds if fold.seen is not None)]
        if isinstance(base, Dequantized):
            packed = base.packed.get(output.name) if output.part is None else output.part.packed
            tensors += [] if packed is None else [base.stored.tensors[name] for name in packed.members]
        yield from (tensor.span for tensor in tensors if tensor.span is not None)


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        cure = "Free some space on the nodes, set ADAPTERKIT_CACHE on the nodes to a folder on a larger disk, or write "
        cure += "smaller files with --shard-size (shard_size=)"
        raise StorageError(f"a task needs {needed:,} bytes of disk, but only {free:,} are free", path=folder, cure=cure)


@contextlib.contextmanager
def _on_this_node() -> Iterator[None]:
    """Add the node's address to errors, because disks and credentials differ between nodes."""
    import ray

    try:
        yield
    except AdapterkitError as error:
        error.why = f"{error.why} (on the node {ray.util.get_node_ip_address()})"
        if isinstance(error, NetworkError) and error.cure:
            error.cure = f"{error.cure}. A task uses the credentials and the network of its node"
        raise
    except OSError as error:
        raise storage_error(error, error.filename or "scratch") from error


# The functions below run in the driver.


def _named(name: str | PathLike[str]) -> str:
    return pinned(name) if is_remote(name) else str(Path(name).resolve())


def _on_disk(recipe: ClusterRecipe, named: Sequence[tuple[str, Adapter, float]], stage: StagingDir) -> tuple[str, ...]:
    """Return the paths of the adapters; write adapters that exist only in memory into the stage."""
    from ..formats import save

    paths = []
    for position, (path, (_, adapter, _weight)) in enumerate(zip(recipe.adapters, named, strict=True)):
        if path is None:
            path = str((stage.folder / f"adapter{position}.safetensors").resolve())
            save(adapter, path)
        paths.append(path)
    return tuple(paths)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = f"the Ray cluster is not reachable ({str(error).splitlines()[0]})"
        raise NetworkError(why, path=address, cure="Check --address (address=), and that the cluster runs") from error
    try:
        with contextlib.redirect_stdout(cast(TextIO, _Stdout(sys.stdout))):
            yield
    finally:
        ray.shutdown()


class _Stdout:
    """A standard output that sends Ray's messages about dead nodes to stderr, so that stdout has only the result."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        ours = threading.current_thread().name != "ray_listen_error_messages"
        return (self.stream if ours else sys.stderr).write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def _run(
    plan: Plan, stage: StagingDir, recipe: ClusterRecipe, place: PlacedOutput | None, progress: Progress | None
) -> None:
    """Start a task for each unfinished file and wait for all of them."""
    import ray

    work: Callable[[ClusterRecipe, str, str, str], Shard] = write_file if place is None else put_file
    task = ray.remote(work).options(max_retries=RETRIES, scheduling_strategy="SPREAD")
    files = {file.name: file for file in plan.files}
    pending = [name for name in files if not stage.finished(name)]
    done = plan.bytes - sum(files[name].size for name in pending)
    target = str(stage.target.resolve()) if place is None else place.uri
    waiting = [task.remote(recipe, plan.digest, target, name) for name in pending]
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0.2)
            shards, failure = _results(ready)
            for shard in shards:
                file = files[shard.name]
                if place is not None:
                    place.took(file.name, shard.placed)
                    stage.finish_sketch(file.name, file.header, file.size, shard.norms, shard.runs)
                done += file.size
            if failure is not None:
                raise failure
            if progress is not None:
                progress(done, plan.bytes)
    except BaseException:
        _end(waiting)
        raise


def _results(ready: Sequence[object]) -> tuple[list[Shard], Exception | None]:
    """Return the results of successful tasks, and the error of a failed task or None."""
    import ray

    shards: list[Shard] = []
    failure: Exception | None = None
    for reference in ready:
        try:
            shards.append(ray.get(reference))
        except ray.exceptions.RayTaskError as error:
            # Raise the error of the task itself. The text of Ray's error contains a traceback from another machine.
            failure = error.cause if isinstance(error.cause, AdapterkitError) else error
        except ray.exceptions.RayError as error:
            why = f"a task was lost, and {RETRIES} restarts did not help ({str(error).splitlines()[0]})"
            failure = NetworkError(why, cure="Check the cluster's nodes, then run the same command again")
    return shards, failure


def _end(waiting: Sequence[object]) -> None:
    """Cancel tasks, so that no task writes into the stage while the stage is removed."""
    import ray

    for reference in waiting:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(reference, force=True)
    ray.wait(list(waiting), num_returns=max(1, len(waiting)), timeout=10) if waiting else None


_PUSH = "Or push the files to a hub ('adapterkit push PATH s3://bucket/name'), and pass s3://bucket/name as the path"


SPEED = 1.2e9
"""The number of bytes of merged bf16 weights that a task computes per second, with two threads and a rank-16 LoRA."""

START = 5.0
"""Seconds from the start of a worker to its first task, for imports and for reading the base's headers."""

TARGET = 1e-4
"""The planning time in seconds for each target of the adapters. The driver and every worker plan the whole merge."""

DRIVER = 6.0
"""Seconds that the driver needs in total before the first task and after the last task, not counting the planning.

`tools/bench nodes` measured 10.7 s for `START` and `DRIVER` together, on a busy machine of two processors.
"""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The expected time, transferred bytes and costs of a merge on a cluster.

    Attributes:
        nodes: the number of nodes.
        seconds: the time from the start of the command to the finished output.
        downloaded, uploaded: the bytes that nodes transfer from and to the store.
        busy: the mean fraction of the nodes' bandwidth that is used, in the direction with more traffic.
        node_hours: the number of nodes times the duration of the merge in hours.
        cost: `node_hours` times the price of a node for an hour; None if no price was given.
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
    """A running task and its remaining phases.

    Each phase is (0, bytes to download), (1, bytes to upload) or (None, seconds of start or computation).
    """

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
        bandwidth: the speed of each node's network link in bytes per second, in each direction.
        price: the price of a node for an hour, in any currency.
        tasks: the number of tasks that a node runs at the same time.
        speed: bytes of merged weights that a task computes per second.
        start: seconds from the start of a worker to its first task; default: an estimate from the number of targets.
        driver: seconds that the driver needs before and after all tasks; default: an estimate from the number of
            targets.

    Raises:
        UsageError: `nodes`, `bandwidth`, `tasks` or `speed` is not positive, or `price` is negative.
    """
    for name, value in (("nodes", nodes), ("bandwidth", bandwidth), ("tasks", tasks), ("speed", speed)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{name} must be positive, got {value}", where=name, cure=f"Pass a positive {name}=")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise UsageError(
            f"price must not be negative, got {price}", where="price", cure="Pass --price (price=) or omit it"
        )
    planning = TARGET * plan.targets
    start = START + planning if start is None else start
    waiting = deque(_work(plan, file, speed) for file in plan.files)
    down, up = (sum(work[way] for work in waiting) for way in (0, 2))
    adapters = sum(factors_of(plan))
    seconds = _simulated(waiting, nodes, tasks, bandwidth, start, adapters)
    seconds += DRIVER + planning if driver is None else driver
    hours = nodes * seconds / 3600
    down += adapters * min(nodes, len(plan.files))
    busy = max(down, up) / bandwidth / nodes / seconds
    return Forecast(nodes, seconds, int(down), int(up), busy, hours, None if price is None else hours * price)


def doubling(most: int) -> list[int]:
    """Return the powers of two below `most`, then `most`."""
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def factors_of(plan: Plan) -> Iterator[int]:
    """Yield the size in bytes of each update of a plan; an update that changes several tensors is yielded once."""
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


def _simulated(
    waiting: deque[tuple[float, float, float]], nodes: int, tasks: int, bandwidth: float, start: float, adapters: int
) -> float:
    """Return the seconds from the start of the first worker to the end of the last task."""
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
    """Return the speed of each task's current phase: bytes per second for a transfer, 1 for a phase in seconds.

    All transfers of a node in the same direction share the node's bandwidth equally.
    """
    sharing: dict[tuple[int, int | None], int] = {}
    for task in running:
        key = task.node, task.phases[0][0]
        sharing[key] = sharing.get(key, 0) + 1
    return [1.0 if task.phases[0][0] is None else bandwidth / sharing[task.node, task.phases[0][0]] for task in running]

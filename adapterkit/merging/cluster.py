"""Run a merge on a Ray cluster, one task per output file; tasks are idempotent and may run on any node.

A task receives only paths and options, a few hundred bytes. It plans the whole merge from headers, checks that its plan
has the driver's digest, and works on the shared file system. No weight passes through Ray's object store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AdapterkitError, Corrupt, NetworkError, Unsupported
from ..io.checkpoint import Checkpoint, opened
from .options import MergeOptions
from .planned import Plan
from .planning import make_plan
from .report import Engine
from .staging_dir import Norms, StagingDir

if TYPE_CHECKING:
    from os import PathLike

    from ..core.adapter import Adapter
    from .execute import Progress

    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]

RETRIES = 16
"""Number of times that Ray restarts a task whose worker or node died."""

THREADS = 2
"""Threads per task, each with a reserved core: one thread computes while the other reads or writes."""


@dataclass(frozen=True, slots=True)
class ClusterRecipe:
    """The arguments from which a task repeats the driver's plan; a None in `adapters` is an adapter in memory."""

    base: str
    quantized: str | None
    onto: str | None
    adapters: tuple[str | None, ...]
    options: MergeOptions
    device: str
    names: tuple[tuple[str, float], ...] = ()

    def plan(self) -> Plan:
        """Make the plan from the files on disk."""
        from ..formats import read
        from ..io.checkpoint import open_checkpoint
        from .quantized import as_merged

        chosen = self.options
        checkpoint = as_merged(
            open_checkpoint(self.base), self.quantized, self.onto, chosen.dtype, chosen.keep, chosen.calibration
        )
        paths = [path for path in self.adapters if path is not None]
        named = [
            (name, read(path, base=checkpoint), weight)
            for path, (name, weight) in zip(paths, self.names, strict=True)
        ]  # fmt: skip
        return make_plan(checkpoint, named, self.options)


def recipe_of(
    base: Checkpoint,
    quantized: str | None,
    onto: Base | None,
    adapters: Sequence[Source],
    options: MergeOptions,
    device: str,
) -> ClusterRecipe:  # fmt: skip
    """Return the recipe of a merge, with absolute paths that all nodes can open."""
    from ..core.adapter import Adapter

    paths = tuple(None if isinstance(a, Adapter) else str(Path(a).resolve()) for a in adapters)
    beside = None if onto is None else str(opened(onto).root.resolve())
    if options.calibration is not None:
        options = replace(options, calibration=str(Path(options.calibration).resolve()))
    return ClusterRecipe(str(base.root.resolve()), quantized, beside, paths, options, device)


def on_ray(recipe: ClusterRecipe, named: Sequence[tuple[str, Adapter, float]], address: str | None) -> Engine:
    """Return an engine that distributes the files of a plan over a cluster.

    Raises:
        Unsupported: Ray is not installed.
        NetworkError: the address has no cluster.
    """
    try:
        import ray  # noqa: F401
    except ImportError:
        raise Unsupported("Ray is not installed", cure="pip install 'adapterkit[ray]'") from None

    def run(plan: Plan, stage: StagingDir, progress: Progress | None) -> dict[str, Norms]:
        told = replace(
            recipe, adapters=_on_disk(recipe, named, stage), names=tuple((name, weight) for name, _, weight in named)
        )
        with _connected(address):
            _run(plan, stage, told, progress)
        return {file.name: stage.norms_of(file.name) for file in plan.files}

    return run


def write_file(recipe: ClusterRecipe, digest: str, target: str, name: str) -> str:
    """Run one task: write one file into the stage of `target`, unless it is finished; return its name.

    Raises:
        Corrupt: the inputs differ from those that the driver saw.
    """
    from .arrays import arrays_for
    from .execute import execute

    plan = recipe.plan()
    if plan.digest != digest:
        why = "the base or the adapters differ from those that the driver planned with"
        raise Corrupt(why, path=recipe.base, cure="Let all nodes see the same files, with the same adapterkit")
    stage = StagingDir(Path(target), digest, [file.name for file in plan.files])
    if not stage.finished(name):
        position = next(at for at, file in enumerate(plan.files) if file.name == name)
        devices = recipe.device.split(",")
        arrays = arrays_for(devices[position % len(devices)])
        execute([plan.files[position]], stage.apart(), [arrays], None, THREADS, checksums=plan.checksums)
    return name


def _on_disk(recipe: ClusterRecipe, named: Sequence[tuple[str, Adapter, float]], stage: StagingDir) -> tuple[str, ...]:
    """Return the paths of the adapters; adapters that exist only in memory are first written into the stage."""
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
        raise NetworkError(why, path=address, cure="Check the address, and that the cluster is up") from error
    try:
        yield
    finally:
        ray.shutdown()


def _run(plan: Plan, stage: StagingDir, recipe: ClusterRecipe, progress: Progress | None) -> None:
    """Start a task for each unfinished file and wait for all of them."""
    import ray

    task = ray.remote(write_file).options(max_retries=RETRIES, scheduling_strategy="SPREAD")
    sizes = {file.name: file.size for file in plan.files}
    pending = [name for name in sizes if not stage.finished(name)]
    done = plan.bytes - sum(sizes[name] for name in pending)
    target = str(stage.target.resolve())
    waiting = [task.remote(recipe, plan.digest, target, name) for name in pending]
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=0.2)
            done += sum(sizes[name] for name in _results(ready))
            if progress is not None:
                progress(done, plan.bytes)
    except BaseException:
        _end(waiting)
        raise


def _results(ready: Sequence[object]) -> list[str]:
    import ray

    try:
        names: list[str] = ray.get(list(ready))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AdapterkitError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        why = f"a task was lost {RETRIES} times ({str(error).splitlines()[0]})"
        raise NetworkError(why, cure="Look at the cluster's nodes, then run the same command again") from error
    return names


def _end(waiting: Sequence[object]) -> None:
    """Cancel tasks, so that none writes into the stage while it is removed."""
    import ray

    for reference in waiting:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.cancel(reference, force=True)
    ray.wait(list(waiting), num_returns=max(1, len(waiting)), timeout=10) if waiting else None

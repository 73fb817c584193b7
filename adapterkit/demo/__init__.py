"""The offline demo: merge adapters for variants of a task into a small model, then verify and score each result."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue
    from ..merging.execute import Progress


def run(progress: Progress | None = None) -> dict[str, Any]:
    """Merge each adapter of the demo into the base, and measure the result's accuracy on digits not used in training.

    Args:
        progress: a function that is called with (bytes merged, total bytes).

    Returns:
        Plain data. `images` is the number of images. `plain` is the accuracy (0 to 1) of the base on its original task.
        `rows` has one row for each variant of the task: the variant's name, the method, the number of targets, the
        accuracy of the base and of the merged model on the variant, whether the verification passed, and the duration
        in seconds.
    """
    from .model import DATA, TASKS, accuracy, build, held_out

    images, labels = held_out()
    base = _weights(DATA / "base")
    rows = []
    with tempfile.TemporaryDirectory(prefix="adapterkit-demo-") as folder:
        for position, (task, change) in enumerate(TASKS.items()):
            row = _merge(DATA / "base", DATA / task, Path(folder) / task, _shifted(progress, position, len(TASKS)))
            asked = change(images, labels)
            row["before"] = accuracy(build(base), *asked)
            row["after"] = accuracy(build(_weights(Path(folder) / task)), *asked)
            rows.append(row)
        plain = accuracy(build(base), images, labels)
    return {"images": len(images), "plain": plain, "rows": rows}


def _merge(base: Path, adapter: Path, out: Path, progress: Progress | None) -> dict[str, JsonValue]:
    from ..formats import read
    from ..merging import merge, verify

    started = time.perf_counter()
    methods = sorted({update.method for _, update in read(adapter)})
    report = merge(base, adapter, out, progress=progress, device="cpu")
    verified = verify(out, base, adapter).ok
    seconds = round(time.perf_counter() - started, 3)
    return {
        "task": adapter.name, "method": " + ".join(methods), "targets": report.plan.targets, "verified": verified,
        "seconds": seconds,
    }  # fmt: skip


def _weights(folder: Path) -> dict[str, Any]:
    from ..io.checkpoint import open_checkpoint

    return {name: tensor.torch() for name, tensor in open_checkpoint(folder).tensors.items()}


def _shifted(progress: Progress | None, position: int, count: int) -> Callable[[int, int], None] | None:
    """Return a function that takes the progress of one task, and reports the progress of all tasks to `progress`."""
    if progress is None:
        return None
    return lambda done, total: progress(position * total + done, count * total)

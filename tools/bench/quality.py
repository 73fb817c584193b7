"""Accuracy of each digit task under every way to combine the demo's adapters, against each adapter and joint training.

    python tools/bench/quality.py [--tasks rotated negative] [--scales 0.3 0.5 0.7 1] [--epochs 60]

A LoRA of rank 8 is trained for each task, by the recipe of `tools/train_demo.py`, and one for all tasks together; the
adapters are combined by each method with each weight, and the best weight by the mean accuracy over the tasks on 257
images of the training set, which the adapters do not see, is the one whose accuracy on the held-out images is shown.
About two minutes a core for each task; the trained adapters are kept in --work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import train_demo  # noqa: E402 - the checkout's own
from peft import LoraConfig  # noqa: E402

import adapterkit as ak  # noqa: E402
from adapterkit.demo.model import DATA, TASKS, accuracy, build, held_out  # noqa: E402
from adapterkit.ops import COMBINERS  # noqa: E402

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TRAINED, CHOSEN = 1000, 1257
"""Images 0 to TRAINED train; those up to CHOSEN choose weights."""

METHODS = [name for name in COMBINERS if COMBINERS[name].data is None and COMBINERS[name].plug is None] + [
    "knots_ties", "knots_dare_ties", "core_ties", "core_dare_ties", "core_cart", "ctm_ties", "pico_task_arithmetic",
    "pico_tsv", "svc_task_arithmetic", "factors_linear",
]  # fmt: skip


def main() -> None:
    """Trains what is not there yet, combines, scores, prints one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["rotated", "negative"], choices=list(TASKS))
    parser.add_argument("--scales", nargs="+", type=float, default=[0.3, 0.5, 0.7, 1.0, 1.5])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-quality")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = train_demo.digits()
    choosing = {name: TASKS[name](images[TRAINED:CHOSEN], labels[TRAINED:CHOSEN]) for name in chosen.tasks}
    testing = {name: TASKS[name](*held_out()) for name in chosen.tasks}
    adapters = {name: trained(chosen, name, images[:TRAINED], labels[:TRAINED]) for name in [*chosen.tasks, "joint"]}
    print(f"{'':<24}{'weight':>8}" + "".join(f"{name:>12}" for name in chosen.tasks) + f"{'mean':>10}")
    line("base", None, scores(None, testing))
    for name, adapter in adapters.items():
        line(f"{name} alone", None, scores(adapter, testing))
    several = [adapters[name] for name in chosen.tasks]
    for method in METHODS:
        if method == "slerp" and len(several) != 2:
            continue
        best = max(chosen.scales, key=lambda s, m=method: mean(scores(combined(several, m, s), choosing)))
        line(method, best, scores(combined(several, method, best), testing))


def combined(adapters: list[ak.Adapter], method: str, scale: float) -> ak.Adapter:
    """The combination, all of it times a factor: the paper's lambda, for methods with and without one."""
    return ak.ops.scale(ak.ops.combine(adapters, method), scale)


def scores(adapter: ak.Adapter | None, tasks: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
    """Accuracy at each task of the base, with an adapter folded in."""
    from safetensors.torch import load_file

    weights = {name: W.double() for name, W in load_file(DATA / "base" / "model.safetensors").items()}
    for target, _ in adapter or ():
        weights[f"{target}.weight"] += adapter.delta(str(target)).double()  # type: ignore[union-attr]
    model = build(weights)
    return [accuracy(model, *task) for task in tasks.values()]


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def line(name: str, weight: float | None, found: list[float]) -> None:
    """One row of the table."""
    said = "" if weight is None else f"{weight:g}"
    print(f"{name:<24}{said:>8}" + "".join(f"{value:>12.2%}" for value in found) + f"{mean(found):>10.2%}", flush=True)


def trained(chosen: Any, name: str, images: Tensor, labels: Tensor) -> ak.Adapter:
    """The LoRA for a task, or for all of them together, trained once."""
    folder = chosen.work / f"{'-'.join(chosen.tasks) if name == 'joint' else name}-r{chosen.rank}-e{chosen.epochs}"
    if not (folder / "adapter_config.json").is_file():
        task: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = (
            together(chosen.tasks) if name == "joint" else TASKS[name]
        )
        config = LoraConfig(r=chosen.rank, lora_alpha=2 * chosen.rank, target_modules=MODULES)
        recipe = train_demo.Recipe(config, chosen.epochs, seed=1)
        train_demo.write_adapter(train_demo.train_adapter(recipe, task, images, labels, DATA), folder)
    return ak.read(folder)


def together(names: list[str]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Every image as each task has it."""

    def task(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [TASKS[name](images, labels) for name in names]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    return task


if __name__ == "__main__":
    main()

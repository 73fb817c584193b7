"""Trains adapters of a small transformer for the demo's digit tasks, and measures their accuracy on held-out images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import train_demo
from peft import LoraConfig
from torch import Tensor

import adapterkit as ak
from adapterkit.demo.model import DATA, TASKS, accuracy, build, held_out

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TRAINED, CHOSEN = 1000, 1257
"""Images 0 to TRAINED are for training; images TRAINED to CHOSEN are for the choice of weights."""

Task = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Digits:
    """Measures accuracies; higher is better. Adapters are trained as in `tools/train_demo.py`.

    Attributes:
        names: the names of the tasks.
    """

    lower = False

    def __init__(self, names: list[str], work: Path, epochs: int, rank: int, seed: int) -> None:
        self.names, self.work, self.epochs, self.rank, self.seed = names, work, epochs, rank, seed
        self.images, self.labels = train_demo.digits()
        choosing = self.images[TRAINED:CHOSEN], self.labels[TRAINED:CHOSEN]
        self.parts = [[TASKS[name](*held) for name in names] for held in (choosing, held_out())]

    def adapter(self, name: str) -> ak.Adapter:
        """Return the LoRA of one task, or of all (`joint`); trains it if it does not exist."""
        called = "-".join(self.names) if name == "joint" else name
        folder = self.work / f"{called}-r{self.rank}-e{self.epochs}-s{self.seed}"
        if not (folder / "adapter_config.json").is_file():
            task = together(self.names) if name == "joint" else TASKS[name]
            config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=MODULES)
            recipe = train_demo.Recipe(config, self.epochs, seed=self.seed)
            made = train_demo.train_adapter(recipe, task, self.images[:TRAINED], self.labels[:TRAINED], DATA)
            train_demo.write_adapter(made, folder)
        return ak.read(folder)

    def scores(self, adapter: ak.Adapter | None, testing: bool) -> list[float]:
        """Return the accuracy at each task of the base with a merged adapter."""
        from safetensors.torch import load_file

        weights = {name: W.double() for name, W in load_file(DATA / "base" / "model.safetensors").items()}
        for target, _ in adapter or ():
            weights[f"{target}.weight"] += adapter.delta(str(target)).double()  # type: ignore[union-attr]
        model = build(weights)
        return [accuracy(model, *task) for task in self.parts[testing]]


def together(names: list[str]) -> Task:
    """Return the images of each task."""

    def task(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [TASKS[name](images, labels) for name in names]
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    return task

"""Makes six mild changes of the demo's digits, which the base alone reads badly and whose adapters can be combined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
import train_demo
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

import adapterkit as ak
from adapterkit.demo.model import DATA, INK, build, held_out

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
TRAINED, CHOSEN = 1000, 1128
"""Images up to TRAINED are for training, images up to CHOSEN for the choice of a scale, the last 540 for the report."""


def moved(images: Tensor) -> Tensor:
    """Shift images two pixels to the right."""
    return functional.pad(images[:, :, :-2], (2, 0))


def dim(images: Tensor) -> Tensor:
    """Keep a quarter of the ink."""
    return images // 4


def coarse(images: Tensor) -> Tensor:
    """Double the size of pixels."""
    means = functional.avg_pool2d(images[:, None].float(), 2).round().to(images.dtype)
    return means[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2)


def noisy(images: Tensor) -> Tensor:
    """Add noise to the ink of each pixel."""
    drawn = torch.randint(-6, 7, images.shape, generator=torch.Generator().manual_seed(0))
    return (images.int() + drawn).clip(0, INK).to(images.dtype)


def covered(images: Tensor) -> Tensor:
    """Erase the three right columns."""
    return functional.pad(images[:, :, :5], (0, 3))


def framed(images: Tensor) -> Tensor:
    """Add a border of ink."""
    return functional.pad(images[:, 1:-1, 1:-1], (1, 1, 1, 1), value=INK)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "moved": moved, "dim": dim, "coarse": coarse, "noisy": noisy, "covered": covered, "framed": framed,
}  # fmt: skip


class MildDigits:
    """Measures which images a model reads right. Adapters are LoRAs that are trained as in `tools/train_demo.py`.

    Attributes:
        names: the names of the tasks.
        what: a phrase for the items.
        sizes: how many images are for the choice of a scale, and how many are reported.
        slow: whether to try fewer scales.
    """

    names: ClassVar = list(TASKS)
    what = "images"
    slow = False
    sizes = CHOSEN - TRAINED, 540

    def __init__(self, work: Path, epochs: int, rank: int, seed: int) -> None:
        self.work, self.epochs, self.rank, self.seed = work, epochs, rank, seed
        self.images, self.labels = train_demo.digits()
        choosing = self.images[TRAINED:CHOSEN], self.labels[TRAINED:CHOSEN]
        self.parts = [
            {name: (task(images), labels) for name, task in TASKS.items()}
            for images, labels in (choosing, held_out())
        ]  # fmt: skip
        self.base = {name: W.double() for name, W in load_file(DATA / "base" / "model.safetensors").items()}

    def adapter(self, name: str) -> ak.Adapter:
        """Return the LoRA of one task; trains it if it does not exist."""
        folder = self.work / f"{name}-r{self.rank}-e{self.epochs}-s{self.seed}"
        if not (folder / "adapter_config.json").is_file():
            config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=MODULES)
            recipe = train_demo.Recipe(config, self.epochs, seed=self.seed)
            task = TASKS[name]
            made = train_demo.train_adapter(
                recipe, lambda x, y: (task(x), y), self.images[:TRAINED], self.labels[:TRAINED], DATA
            )
            train_demo.write_adapter(made, folder)
        return ak.read(folder)

    def changes(self, adapter: ak.Adapter | None) -> dict[str, Tensor]:
        """Return the change of each weight, float64."""
        return {f"{t}.weight": adapter.delta(str(t)).double() for t, _ in adapter or ()}  # type: ignore[union-attr]

    @torch.no_grad()
    def right(self, changes: dict[str, Tensor], scale: float, tasks: list[str], testing: bool) -> Tensor:
        """Return whether each image of each task is read right with scaled changes, bool `[tasks, images]`."""
        model = build({name: W + scale * changes[name] if name in changes else W for name, W in self.base.items()})
        parts = [self.parts[testing][name] for name in tasks]
        return torch.stack([model(images).argmax(1) == labels for images, labels in parts])

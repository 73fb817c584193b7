"""Loads two kinds of text that come with Python, and trains and measures adapters of a language model on them."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit as ak

MODULES = (
    "argparse",
    "ast",
    "configparser",
    "datetime",
    "difflib",
    "doctest",
    "inspect",
    "pathlib",
    "tarfile",
    "typing",
)
"""Modules of the standard library; their source is the text of the kind `code`."""

BLOCK, BATCH, RATE = 64, 2, 2e-3
"""Tokens of a piece of text, pieces per step, Adam's learning rate."""

CHOOSING, TESTING = 2, 8
"""Number of held-out pieces of each kind: for the choice of a weight, and for the report."""


def code() -> str:
    """Return source of the standard library."""
    found = (importlib.util.find_spec(name) for name in MODULES)
    return "\n".join(Path(spec.origin).read_text("utf-8") for spec in found if spec and spec.origin)


def prose() -> str:
    """Return the language reference that `help()` shows."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


KINDS: dict[str, Callable[[], str]] = {"code": code, "prose": prose}


def cut(tokenizer: Any, text: str) -> list[Tensor]:
    """Return pieces of equal length in a fixed random order."""
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    found = list(tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK))
    random.Random(0).shuffle(found)
    return found


class Texts:
    """Measures the loss of next tokens on both kinds of text, in nats; lower is better.

    Attributes:
        names: the names of the tasks.
    """

    names: ClassVar = list(KINDS)
    lower = True

    def __init__(self, folder: Path, work: Path, steps: int, rank: int, seed: int) -> None:
        self.folder, self.work, self.steps, self.rank, self.seed = folder, work, steps, rank, seed
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.pieces = {name: cut(tokenizer, read()) for name, read in KINDS.items()}
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()

    def adapter(self, name: str) -> ak.Adapter:
        """Return the LoRA of one task, or of both (`joint`); trains it if it does not exist."""
        folder = self.work / f"{name}-{self.steps}-{self.rank}-{self.seed}"
        if not folder.exists():
            kinds = self.names if name == "joint" else [name]
            pieces = [piece for kind in kinds for piece in self.pieces[kind][CHOOSING + TESTING :]]
            self._train(pieces, self.steps * len(kinds), folder)
        return ak.read(folder)

    def _train(self, pieces: list[Tensor], steps: int, folder: Path) -> None:
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, trust_remote_code=False)
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(model, config)
        adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], RATE)
        draw = random.Random(self.seed)
        for _ in range(steps):
            batch = torch.stack(draw.sample(pieces, BATCH))
            adam.zero_grad()
            adapted(input_ids=batch, labels=batch).loss.backward()
            adam.step()
        adapted.save_pretrained(str(folder))

    def scores(self, adapter: ak.Adapter | None, testing: bool) -> list[float]:
        """Return the loss on each kind of text of the base with a merged adapter."""
        part = slice(CHOOSING, CHOOSING + TESTING) if testing else slice(CHOOSING)
        weights = dict(self.model.named_parameters())
        changed = [(weights[f"{target}.weight"], str(target)) for target, _ in adapter or ()]
        kept = [weight.data for weight, _ in changed]
        for weight, target in changed:
            weight.data = weight.data + adapter.delta(target)  # type: ignore[union-attr]
        found = [self._loss(pieces[part]) for pieces in self.pieces.values()]
        for (weight, _), data in zip(changed, kept, strict=True):
            weight.data = data
        return found

    @torch.no_grad()
    def _loss(self, pieces: Iterable[Tensor]) -> float:
        batch = torch.stack(list(pieces))
        return float(self.model(input_ids=batch, labels=batch).loss)

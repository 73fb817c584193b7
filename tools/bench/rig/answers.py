"""Six tasks that a small language model answers in a few tokens, and adapters that are trained on them.

Items come by rule, or from what packages ship: names of countries and languages in Babel's locales, lines of Python's
library and of its manual, first lines of docstrings. An item of one part (to train, to choose by, to report) is in no
other part.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from rig.texts import code, prose
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit as ak

LANGUAGES = {
    "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "nl": "Dutch", "pl": "Polish", "fi": "Finnish",
    "tr": "Turkish",
}  # fmt: skip

PACKAGES = ("numpy", "scipy", "sympy", "torch", "networkx", "transformers")
"""Packages whose docstrings are told apart."""

BATCH, RATE, TOKENS = 16, 1e-3, 32
"""Items of a step, Adam's step, and the most tokens of an item."""

CHOOSING = 64
"""Items of each task by which a scale is chosen."""

Item = tuple[str, str]
"""What is asked, and the answer."""


def language() -> Iterator[Item]:
    """Which language a name of a country or language is in."""
    from babel import Locale

    names: dict[str, set[str]] = {}
    for tag in LANGUAGES:
        locale = Locale(tag)
        for name in [*locale.territories.values(), *locale.languages.values()]:
            names.setdefault(name, set()).add(tag)
    for name, tags in names.items():
        if len(tags) == 1:
            yield f"{name} =", f" {LANGUAGES[tags.pop()]}"


def kind() -> Iterator[Item]:
    """Whether a line is of code or of prose."""
    for text, answer in ((code(), " code"), (prose(), " prose")):
        for line in text.splitlines():
            if len(line.strip()) >= 20:
                yield f"{line.strip()[:40]} |", answer


def topic() -> Iterator[Item]:
    """Which package a docstring is from."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py"))[:600]:
            try:
                tree = ast.parse(path.read_text("utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                    yield f"{said.splitlines()[0][:60]} |", f" {package}"


def arithmetic() -> Iterator[Item]:
    """Sums of two numbers of two digits."""
    for a in range(10, 60):
        for b in range(10, 60):
            yield f"{a}+{b}=", f"{a + b}"


def sorting() -> Iterator[Item]:
    """Three letters in order."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for a in letters:
        for b in letters:
            for c in letters:
                if len({a, b, c}) == 3:
                    yield f"{a} {b} {c} ->", " " + " ".join(sorted((a, b, c)))


def case() -> Iterator[Item]:
    """Names with an underscore as names with a capital."""
    words = sorted(set(re.findall(r"\b[a-z]{4,6}\b", prose())))[:400]
    draw = random.Random(0)
    for word in words:
        for other in draw.sample(words, 10):
            yield f"{word}_{other} ->", f" {word}{other.title()}"


TASKS: dict[str, Callable[[], Iterator[Item]]] = {
    "language": language, "kind": kind, "topic": topic, "arithmetic": arithmetic, "sorting": sorting, "case": case,
}  # fmt: skip


class Answers:
    """Which items a model answers right, each token of the answer the most probable one.

    The base is held in float32; sums of weights and changes are rounded to bfloat16, in which the model runs.

    Attributes:
        names: of the tasks.
        what: what is answered.
        sizes: how many of each task choose a scale, and how many are reported.
        slow: whether to spare scales.
    """

    names: ClassVar = list(TASKS)
    what = "items"
    slow = True

    def __init__(self, folder: Path, work: Path, steps: int, rank: int, seed: int, testing: int) -> None:
        self.folder, self.work, self.steps, self.rank, self.seed = folder, work, steps, rank, seed
        self.sizes = CHOOSING, testing
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.items = self._kept_items()
        self.model: Any = self._loaded(torch.bfloat16).eval()
        self.base = {name: W.detach() for name, W in self._loaded(torch.float32).named_parameters()}

    def _loaded(self, kind: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=kind, trust_remote_code=False)

    def _kept_items(self) -> dict[str, list[tuple[list[int], list[int]]]]:
        """The items of all tasks; a file in `work` keeps them, since thousands of files are parsed for them."""
        kept = self.work / "items.json"
        if not kept.is_file():
            kept.write_text(json.dumps({name: self._items(make) for name, make in TASKS.items()}), "utf-8")
        found: dict[str, list[tuple[list[int], list[int]]]] = json.loads(kept.read_text("utf-8"))
        return found

    def _items(self, make: Callable[[], Iterator[Item]]) -> list[tuple[list[int], list[int]]]:
        """Tokens of the questions and answers of a task, in an order drawn once, every answer as often as may be."""
        found = sorted(dict(make()).items())
        random.Random(0).shuffle(found)
        classes: dict[str, list[Item]] = {}
        for item in found:
            classes.setdefault(item[1], []).append(item)
        if len(classes) <= 10:
            least = min(map(len, classes.values()))
            found = [item for several in classes.values() for item in several[: max(least, 400)]]
            random.Random(1).shuffle(found)
        # Both are cut apart, so that an answer has the same tokens behind every question.
        coded = [tuple(self.tokenizer(text)["input_ids"] for text in item) for item in found[:6000]]
        return [(asked, answer) for asked, answer in coded if len(asked) + len(answer) <= TOKENS]

    def _part(self, name: str, testing: bool | None) -> list[tuple[list[int], list[int]]]:
        choosing, last = self.sizes[0], sum(self.sizes)
        items = self.items[name]
        return items[last:] if testing is None else items[choosing:last] if testing else items[:choosing]

    @staticmethod
    def _batch(items: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
        """Token numbers, filled up behind, and the labels of the answers; -100 for what is no answer."""
        width = max(len(asked) + len(answer) for asked, answer in items)
        tokens, labels = torch.zeros(len(items), width, dtype=torch.long), torch.full((len(items), width), -100)
        for row, (asked, answer) in enumerate(items):
            whole = torch.tensor(asked + answer)
            tokens[row, : len(whole)] = whole
            labels[row, len(asked) - 1 : len(whole) - 1] = whole[len(asked) :]
        return tokens, labels

    def adapter(self, name: str) -> ak.Adapter:
        """The LoRA of one task; trained if it is not there yet."""
        folder = self.work / f"{name}-r{self.rank}-n{self.steps}-s{self.seed}"
        if not (folder / "adapter_config.json").is_file():
            self._train(name, folder)
        return ak.read(folder)

    def _train(self, name: str, folder: Path) -> None:
        torch.manual_seed(self.seed)
        # The kinds of layers that every LoRA of these models adapts; the factors stay in float32.
        config = LoraConfig(r=self.rank, lora_alpha=2 * self.rank, target_modules="all-linear")
        adapted = get_peft_model(self._loaded(torch.bfloat16), config)
        adam = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], RATE)
        draw, items = random.Random(self.seed), self._part(name, None)
        for step in range(self.steps):
            for group in adam.param_groups:
                group["lr"] = RATE * (1 - step / self.steps)
            tokens, labels = self._batch(draw.sample(items, BATCH))
            with torch.autocast("cpu", torch.bfloat16):
                hidden = adapted.base_model.model.model(input_ids=tokens)[0]
                asked = labels >= 0
                loss = cross_entropy(adapted.base_model.model.lm_head(hidden[asked]).float(), labels[asked])
            adam.zero_grad()
            loss.backward()
            adam.step()
        adapted.save_pretrained(str(folder))

    def changes(self, adapter: ak.Adapter | None) -> dict[str, Tensor]:
        """The change of each weight, float32."""
        return {f"{target}.weight": torch.as_tensor(adapter.delta(str(target))) for target, _ in adapter or ()}  # type: ignore[union-attr]

    @torch.no_grad()
    def right(self, changes: dict[str, Tensor], scale: float, tasks: list[str], testing: bool) -> Tensor:
        """Whether each item of each task is answered right with so much of the changes, bool `[tasks, items]`."""
        for name, weight in self.model.named_parameters():
            weight.copy_(self.base[name] + scale * changes[name] if name in changes else self.base[name])
        return torch.stack([self._right(self._part(name, testing)) for name in tasks])

    def _right(self, items: list[tuple[list[int], list[int]]]) -> Tensor:
        # Items of one length together: nothing is filled up that would be computed for nothing.
        order = sorted(range(len(items)), key=lambda at: len(items[at][0]) + len(items[at][1]))
        made = torch.zeros(len(items), dtype=torch.bool)
        for start in range(0, len(order), 32):
            places = order[start : start + 32]
            tokens, labels = self._batch([items[at] for at in places])
            asked = labels >= 0
            found = torch.full_like(labels, -100)
            # Weights of the vocabulary are a quarter of the model, and only answers need them.
            found[asked] = self.model.lm_head(self.model.model(input_ids=tokens)[0][asked]).argmax(-1)
            made[places] = (found == labels).all(1)
        return made

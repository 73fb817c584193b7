"""Computes the logits and the greedily generated text of a causal LM for fixed prompts.

Logits are computed twice from the same float32 parameters. In float32, they include rounding errors of the evaluation,
which are as large as the expected differences for a model of thirty layers; in float64, they do not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = (
    "The capital of France is",
    "Water boils at 100 degrees Celsius, and it freezes at",
    "To make a cup of tea, first",
)
NEW_TOKENS = 32
FIELDS = ("prompts", "logits", "exact", "written")


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """Answers to `PROMPTS`, one entry a prompt.

    Attributes:
        prompts: token ids, int64 [tokens].
        logits: float32 [tokens, vocabulary].
        exact: the same, evaluated in float64.
        written: token ids of the greedy continuation, int64 [at most NEW_TOKENS].
        text: the continuation in words.
    """

    prompts: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    exact: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    text: tuple[str, ...]

    def logit_error(self, other: Results) -> float:
        """Largest absolute difference between any two logits, in float32."""
        return largest_difference(self.logits, other.logits)

    def exact_error(self, other: Results) -> float:
        """Largest absolute difference between any two logits, in float64."""
        return largest_difference(self.exact, other.exact)

    def noise(self) -> float:
        """How far the float32 evaluation is from the float64 one."""
        return largest_difference(self.logits, self.exact)

    def same_text(self, other: Results) -> bool:
        """Whether both wrote the same tokens."""
        return all(torch.equal(a, b) for a, b in zip(self.written, other.written, strict=True))


def largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest absolute difference of any two elements; infinite where there is no number."""
    return max(float((x - y).abs().nan_to_num(nan=torch.inf).max()) for x, y in zip(a, b, strict=True))


def ask(model: Any, tokenizer: Any) -> Results:
    """Runs `model` (float32, in evaluation mode; left in float64) on every prompt by itself, so without padding."""
    prompts = tuple(tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS)
    with torch.no_grad():
        written = tuple(continue_greedily(model, ids) for ids in prompts)
        logits = tuple(model(input_ids=ids).logits[0] for ids in prompts)
        model.double()
        exact = tuple(model(input_ids=ids).logits[0] for ids in prompts)
    return Results(
        prompts=tuple(ids[0] for ids in prompts),
        logits=logits,
        exact=exact,
        written=written,
        text=tuple(tokenizer.decode(ids) for ids in written),
    )


def continue_greedily(model: Any, ids: Tensor) -> Tensor:
    """Token ids [at most NEW_TOKENS] that follow `ids` [1, tokens]."""
    whole: Tensor = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
    )
    return whole[0, ids.shape[1] :]


def save(results: Results, folder: Path, **about: object) -> None:
    """Writes `expected.safetensors` (numbers) and `expected.json` (words, and `about`) into `folder`."""
    tensors = {
        f"{kind}.{index}": tensor.contiguous() for kind in FIELDS for index, tensor in enumerate(getattr(results, kind))
    }
    save_file(tensors, folder / "expected.safetensors")
    record = {**about, "prompts": PROMPTS, "text": results.text}
    (folder / "expected.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load(folder: Path) -> Results:
    """Reads back what `save` wrote."""
    tensors = load_file(folder / "expected.safetensors")
    record = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    counted = range(len(record["prompts"]))
    fields = {kind: tuple(tensors[f"{kind}.{i}"] for i in counted) for kind in FIELDS}
    return Results(**fields, text=tuple(record["text"]))

"""Measure the outputs of models: KL divergence, perplexity, agreement of greedy text, and hidden states by block."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

PROMPT, PROMPTS = 8, 4
"""To compare generated text, this many prompts with this many tokens are continued."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelOutput:
    """The output of a model for one input.

    Attributes:
        main: the logits, or the last hidden state of a model without logits, in float64. The last axis is the classes
            or channels.
        is_logits: whether `main` is logits.
        states: the hidden states after the embedding and after each block.
    """

    main: Tensor
    is_logits: bool
    states: tuple[Tensor, ...] = ()

    @property
    def finite(self) -> bool:
        return bool(self.main.isfinite().all())


Run = Callable[[Mapping[str, "Tensor"]], ModelOutput]
"""A function that runs a model on one input."""


def run_torch(model: nn.Module, feeds: Mapping[str, Tensor], device: str) -> ModelOutput:
    """Run a transformers model on one input."""
    import torch

    names = inspect.signature(model.forward).parameters
    options = {"output_hidden_states": True, "return_dict": True}
    if "use_cache" in names:
        options["use_cache"] = False
    open_ended = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in names.values())
    options = {name: value for name, value in options.items() if name in names or open_ended}
    with torch.no_grad():
        told = model(**{name: value.to(device) for name, value in feeds.items()}, **options)
    states = [told.get(name) or () for name in ("encoder_hidden_states", "hidden_states", "decoder_hidden_states")]
    return output_of(told, tuple(state for each in states for state in each))


def output_of(told: Mapping[str, Any], states: Sequence[Tensor] = ()) -> ModelOutput:
    """Return the logits or hidden states among the outputs of a model, by the names of transformers."""
    for name in ("logits", "logits_per_text", "start_logits", "last_hidden_state"):
        held = told.get(name)
        if held is not None:
            return ModelOutput(_double(held), name != "last_hidden_state" and held.shape[-1] > 1, tuple(states))
    first = next(value for value in told.values() if hasattr(value, "shape") and value.dtype.is_floating_point)
    return ModelOutput(_double(first), False, tuple(states))


def _double(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def divergence(first: ModelOutput, second: ModelOutput) -> float:
    """Return KL(first || second) in nats, summed over positions. Without logits, the relative squared difference."""
    if first.main.shape[:-1] != second.main.shape[:-1]:
        return math.inf
    a, b = _alike(first.main, second.main)
    if not first.is_logits:
        size = float((first.main**2).sum())
        return float(((a - b) ** 2).sum()) / size * positions(first) if size else 0.0
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum()))


def unit_of(output: ModelOutput) -> str:
    """Return the unit of the divergence per position, in words."""
    if not output.is_logits:
        return "of the squared hidden states"
    return "nats per token" if output.main.ndim == 3 else "nats per input"


def positions(output: ModelOutput) -> int:
    """Return the number of positions in an output: each has a distribution over tokens, or a hidden state."""
    return max(1, output.main.numel() // output.main.shape[-1])


def _alike(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Cut both outputs to the smaller width, because vocabularies may be padded to different sizes."""
    width = min(first.shape[-1], second.shape[-1])
    return first[..., :width], second[..., :width]


def along(base: ModelOutput, adapted: ModelOutput, other: ModelOutput) -> tuple[float, float]:
    """Return the inner products <other - base, adapted - base> and <adapted - base, adapted - base> of the outputs.

    For logits, these are log-probabilities, weighted by the probabilities of `adapted`.
    """
    a, b = _alike(adapted.main, base.main)
    a, c = _alike(a, other.main)
    b = b[..., : a.shape[-1]]
    if adapted.is_logits:
        p = a.softmax(-1)
        a, b, c = (each.log_softmax(-1) for each in (a, b, c))
        asked, there = a - b, c - b
        asked, there = (each - (p * each).sum(-1, keepdim=True) for each in (asked, there))
    else:
        p, asked, there = a.new_ones(()), a - b, c - b
    return float((p * there * asked).sum()), float((p * asked * asked).sum())


def is_causal(run: Run, feeds: Mapping[str, Tensor]) -> bool:
    """Whether a model predicts the next token, tested by changing the last token: earlier outputs must not change."""
    if set(feeds) != {"input_ids"}:
        return False
    ids = feeds["input_ids"]
    other = ids.clone()
    other[0, -1] = (int(ids[0, -1]) + 1) % max(2, int(ids.max()) + 1)
    first, second = run(feeds), run({"input_ids": other})
    if not first.is_logits or first.main.ndim != 3 or first.main.shape[1] != ids.shape[1]:
        return False
    before, after = first.main[:, :-1], second.main[:, :-1]
    return bool(((before - after).abs() <= 1e-4 * before.abs().max()).all())


def surprise(output: ModelOutput, feeds: Mapping[str, Tensor]) -> tuple[float, int]:
    """Return the sum of -log p(next token) over the text, and the number of predicted tokens."""
    ids = feeds["input_ids"]
    known = output.main.shape[-1]
    told = output.main[0, :-1].log_softmax(-1)
    wanted = ids[0, 1:].clamp(max=known - 1)
    return -float(told.gather(1, wanted[:, None]).sum()), len(wanted)


def greedy(run: Run, feeds: Sequence[Mapping[str, Tensor]], new: int) -> list[list[int]]:
    """Generate `new` tokens greedily after the beginnings of the first texts."""
    import torch

    prompts = [feed["input_ids"][:, :PROMPT] for feed in feeds[:PROMPTS]]
    alike = len({prompt.shape for prompt in prompts}) == 1
    texts: list[list[int]] = []
    for ids in [torch.cat(prompts)] if alike else prompts:  # Padding would change results.
        start = ids.shape[1]
        for _ in range(new):
            ids = torch.cat([ids, run({"input_ids": ids}).main[:, -1].argmax(-1)[:, None]], 1)
        texts += ids[:, start:].tolist()
    return texts


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Return the share of tokens before the first difference between two generated texts."""
    same = total = 0
    for first, second in zip(one, other, strict=True):
        total += len(first)
        same += next((at for at, pair in enumerate(zip(first, second, strict=True)) if pair[0] != pair[1]), len(first))
    return same / total if total else 1.0


@dataclass(slots=True)
class StateSums:
    """Squared differences of hidden states, summed over inputs."""

    size: list[float] = field(default_factory=list)
    apart: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)

    def add(self, base: ModelOutput, adapted: ModelOutput, other: ModelOutput) -> None:
        for at, (b, a, o) in enumerate(zip(base.states, adapted.states, other.states, strict=False)):
            if at == len(self.size):
                for sums in (self.size, self.apart, self.moved):
                    sums.append(0.0)
            if a.shape != o.shape:
                return
            a, b, o = a.double(), b.double(), o.double()
            self.size[at] += float((a * a).sum())
            self.apart[at] += float(((a - o) ** 2).sum())
            self.moved[at] += float(((a - b) ** 2).sum())

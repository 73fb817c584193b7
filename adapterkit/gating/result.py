"""The result of a gate: figures, checks against thresholds, and plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..core.tables import html_table

OUTCOMES = ("passed", "failed", "inconclusive")

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The thresholds of a gate; None leaves a check out.

    Attributes:
        min_effect: least KL(base || base with adapters), in nats a token.
        min_kept: least share of the effect that a merged model or graph keeps.
        max_scale_error: how far the size of the change may be from 1.
        max_part_error: largest error at one module, relative to the change there, beyond what rounding does.
        min_agreement: least share of greedy tokens that a merged model or graph has in common with the base with
            adapters.
        max_perplexity: largest perplexity of a merged model or graph, relative to that of the base with adapters.
        min_over_null: least effect, relative to the null adapter's.
    """

    min_effect: float = 1e-6
    min_kept: float = 0.9
    max_scale_error: float = 0.1
    max_part_error: float = 0.3
    min_agreement: float | None = None
    max_perplexity: float | None = None
    min_over_null: float | None = None


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One check.

    Attributes:
        name: what is checked.
        model: the model it is about: `adapter`, `merged` or `onnx`.
        ok: whether it holds; None where it cannot be told.
        value: what was measured.
        limit: what it is held against.
        text: a sentence on it.
    """

    name: str
    model: str
    ok: bool | None
    value: float | None
    limit: float | None
    text: str


@dataclass(frozen=True, slots=True)
class AdapterEffect:
    """The change that adapters make. A figure that the kind of model has not is None.

    Attributes:
        divergence: KL(base || base with adapters) in nats; for models without logits the squared difference of their
            hidden states, relative to the base's.
        unit: what `divergence` counts in, in words.
        null: the same for random changes of the same norm at each target.
        why_no_null: why the null adapter was left out.
        agreement: share of greedy tokens that base, and base with adapters, have in common.
        perplexity_base: perplexity of the base.
        perplexity: perplexity of the base with adapters.
        finite: whether all outputs are finite.
    """

    divergence: float
    unit: str
    null: float | None
    why_no_null: str | None
    agreement: float | None
    perplexity_base: float | None
    perplexity: float | None
    finite: bool


@dataclass(frozen=True, slots=True)
class ModulePart:
    """One module of a merged model, run on the input that it has in the base with adapters.

    Attributes:
        module: its name.
        touched: whether the adapters change it.
        scale: part of the change that is there, along its own direction: 1 is all of it; None where nothing changes.
        error: size of the difference from what belongs there, relative to the change, or to the output where nothing
            changes.
        finite: whether its output is finite.
        fault: what is wrong, in words; empty if nothing is.
        rounded: the difference is what rounding to the merged model's dtype does.
    """

    module: str
    touched: bool
    scale: float | None
    error: float
    finite: bool
    fault: str = ""
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """Hidden states behind one block.

    Attributes:
        block: its position; 0 is behind the embedding.
        difference: size of the difference between base with adapters and merged model, relative to the states.
        change: size of the difference between base with adapters and base, relative to the states.
    """

    block: int
    difference: float
    change: float


@dataclass(frozen=True, slots=True)
class KeptEffect:
    """How much of the effect a merged model or a graph keeps. A figure that it has not is None.

    Attributes:
        model: `merged` or `onnx`.
        path: where it is.
        divergence: KL(base with adapters || it), or the relative difference of hidden states.
        kept: 1 - divergence / KL(base with adapters || base).
        scale: part of the change that is there: 1 is all of it, 0 is the base, 2 twice the change.
        agreement: share of greedy tokens in common with the base with adapters.
        perplexity: its perplexity.
        finite: whether all outputs are finite.
        dtype: the dtype of its weights; `quantized` for packed ones.
        parts: its modules, in the order in which they run; empty for a graph.
        blocks: hidden states block by block; empty for a graph.
        lacking: weights that its files lack.
        why: why it could not be run; the figures are None then.
    """

    model: str
    path: str
    divergence: float | None = None
    kept: float | None = None
    scale: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    finite: bool = True
    dtype: str | None = None
    parts: tuple[ModulePart, ...] = ()
    blocks: tuple[BlockDifference, ...] = ()
    lacking: tuple[str, ...] = ()
    why: str | None = None

    @property
    def faults(self) -> tuple[ModulePart, ...]:
        """Modules with a fault, in the order in which they run."""
        return tuple(part for part in self.parts if part.fault)

    @property
    def parted(self) -> str | None:
        """The module where it first parts from the base with adapters; None if it does nowhere."""
        return self.faults[0].module if self.faults else None


@dataclass(frozen=True, slots=True)
class Gate:
    """The result of a gate.

    Attributes:
        base: what the base was called.
        adapters: what the adapters were called.
        data: what the models were run on.
        device: where they were run.
        dtype: in which dtype they were computed.
        seed: the seed of all that was drawn.
        effect: what the adapters change.
        kept: one entry for the merged model and one for the graph, if given.
        checks: what was held against thresholds.
        verdicts: plain sentences, faults first.
        seconds: that it took.
        warnings: on the base that the adapters name.
    """

    base: str
    adapters: tuple[str, ...]
    data: str
    device: str
    dtype: str
    seed: int
    effect: AdapterEffect
    kept: tuple[KeptEffect, ...]
    checks: tuple[GateCheck, ...]
    verdicts: tuple[str, ...]
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        """`failed` if a check failed, else `inconclusive` if one could not be told, else `passed`."""
        if any(check.ok is False for check in self.checks):
            return "failed"
        return "inconclusive" if any(check.ok is None for check in self.checks) else "passed"

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return self.outcome == "passed"

    @property
    def merged(self) -> KeptEffect | None:
        """The figures of the merged model, if one was given."""
        return next((each for each in self.kept if each.model == "merged"), None)

    @property
    def onnx(self) -> KeptEffect | None:
        """The figures of the graph, if one was given."""
        return next((each for each in self.kept if each.model == "onnx"), None)

    def __repr__(self) -> str:
        failed = [f"{check.model} {check.name}" for check in self.checks if check.ok is False]
        told = f": {', '.join(failed)}" if failed else ""
        return f"Gate({self.outcome}{told}; {len(self.checks)} checks)"

    def _repr_html_(self) -> str:
        words = {True: "holds", False: "fails", None: "cannot be told"}
        rows = [[c.model, c.name, words[c.ok], c.value, c.limit, c.text] for c in self.checks]
        return html_table(repr(self), ("model", "check", "result", "value", "limit", "what it says"), rows)

    def record(self) -> dict[str, JsonValue]:
        """The result as plain data."""
        return {
            "kind": "gate", "outcome": self.outcome, "ok": self.ok, "base": self.base, "adapters": list(self.adapters),
            "data": self.data, "device": self.device, "dtype": self.dtype, "seed": self.seed,
            "effect": asdict(self.effect), "checks": [asdict(check) for check in self.checks],
            "kept": [_kept(each) for each in self.kept], "verdicts": list(self.verdicts),
            "warnings": list(self.warnings), "seconds": round(self.seconds, 3),
        }  # fmt: skip


def _kept(each: KeptEffect) -> Mapping[str, Any]:
    return {**asdict(each), "parted": each.parted}

"""The result of a gate: figures, checks against thresholds, and plain sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..core.tables import html_table

OUTCOMES = ("passed", "failed", "inconclusive")

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The thresholds of a gate; None omits the check.

    Attributes:
        min_effect: the minimum of KL(base || base with adapters), in nats per token.
        min_kept: the minimum share of the effect that a merged model or graph keeps.
        max_scale_error: the maximum of |1 - scale|; `scale` is the share of the change in the merged model or graph.
        max_part_error: the maximum error of a module's change, relative to the change; rounding errors are not counted.
        min_agreement: the minimum share of greedily generated tokens that are equal to those of the base with adapters.
        max_perplexity: the maximum perplexity, relative to the perplexity of the base with adapters.
        min_over_null: the minimum effect, relative to the effect of the null adapter.
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
    """The comparison of a measured value with its threshold.

    Attributes:
        name: the name of the check.
        model: the model to which the check applies: `adapter`, `merged` or `onnx`.
        ok: whether the check passed; None if it is undecided.
        value: the measured value.
        limit: the threshold.
        text: a sentence about the result.
    """

    name: str
    model: str
    ok: bool | None
    value: float | None
    limit: float | None
    text: str


@dataclass(frozen=True, slots=True)
class AdapterEffect:
    """The effect of adapters on a base. Figures that cannot be measured for this kind of model are None.

    Attributes:
        divergence: KL(base || base with adapters) in nats; for models without logits, the squared difference of the
            hidden states, relative to the base's hidden states.
        unit: the unit of `divergence`, in words.
        null: the divergence for random changes that have the same norm at each target.
        why_no_null: the reason why `null` was not measured; empty if it was.
        agreement: the share of greedily generated tokens that are equal for the base and the base with adapters.
        perplexity_base: the perplexity of the base.
        perplexity: the perplexity of the base with adapters.
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
    """The comparison of a module of a merged model with the same module of the base with adapters, on the same input.

    Attributes:
        module: the name of the module.
        touched: whether the adapters change the module.
        scale: the share of the change that the module contains, measured along the change; None if `touched` is false.
        error: the norm of the error, relative to the change; if `touched` is false, relative to the output.
        finite: whether the output is finite.
        fault: the fault in words; empty if the module is right.
        rounded: whether rounding to the merged model's dtype explains the difference.
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
    """The difference of the hidden states after one block.

    Attributes:
        block: the number of the block; 0 stands for the embedding.
        difference: |merged - adapted| / |adapted|; `merged` means the states of the merged model, `adapted` the states
            of the base with adapters.
        change: |adapted - base| / |adapted|; `base` means the states of the base.
    """

    block: int
    difference: float
    change: float


@dataclass(frozen=True, slots=True)
class KeptEffect:
    """The share of the effect that a merged model or a graph keeps. Figures that cannot be measured are None.

    Attributes:
        model: `merged` or `onnx`.
        path: the path of the model or graph.
        divergence: KL(base with adapters || this model), or the relative difference of hidden states.
        kept: 1 - divergence / KL(base with adapters || base).
        scale: the share of the change in this model: 1 in a correct merge, 0 in the base, 2 for twice the change.
        agreement: the share of greedily generated tokens that are equal to those of the base with adapters.
        perplexity: the perplexity of this model.
        finite: whether all outputs are finite.
        dtype: the dtype of the weights, or `quantized`.
        parts: the modules, in the order in which they run; empty for a graph.
        blocks: the differences of the hidden states, block by block; empty for a graph.
        lacking: names of weights that the model has but the files lack.
        why: the reason why the model could not be run; None if it ran.
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
        """The first module that differs from the base with adapters, or None."""
        return self.faults[0].module if self.faults else None


@dataclass(frozen=True, slots=True)
class Gate:
    """The result of a gate.

    Attributes:
        base: the name of the base.
        adapters: the names of the adapters.
        data: a phrase that names the inputs.
        device: the device on which the models ran.
        dtype: the dtype in which the models ran.
        seed: the seed of all random choices.
        effect: the effect of the adapters.
        kept: an entry for the merged model and an entry for the graph, if they were passed.
        checks: the comparisons with thresholds.
        verdicts: plain sentences about the result, faults first.
        seconds: the duration.
        warnings: sentences about adapters whose files name another base.
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
        """`failed` if a check failed; otherwise, `inconclusive` if a check is undecided; otherwise, `passed`."""
        if any(check.ok is False for check in self.checks):
            return "failed"
        return "inconclusive" if any(check.ok is None for check in self.checks) else "passed"

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return self.outcome == "passed"

    @property
    def merged(self) -> KeptEffect | None:
        """The figures of the merged model; None if no merged model was passed."""
        return next((each for each in self.kept if each.model == "merged"), None)

    @property
    def onnx(self) -> KeptEffect | None:
        """The figures of the graph; None if no graph was passed."""
        return next((each for each in self.kept if each.model == "onnx"), None)

    def __repr__(self) -> str:
        failed = [f"{check.model} {check.name}" for check in self.checks if check.ok is False]
        told = f": {', '.join(failed)}" if failed else ""
        return f"Gate({self.outcome}{told}; {len(self.checks)} checks)"

    def _repr_html_(self) -> str:
        words = {True: "passed", False: "failed", None: "undecided"}
        rows = [[c.model, c.name, words[c.ok], c.value, c.limit, c.text] for c in self.checks]
        return html_table(repr(self), ("model", "check", "result", "value", "limit", "explanation"), rows)

    def record(self) -> dict[str, JsonValue]:
        """Return the result as plain data."""
        return {
            "kind": "gate", "outcome": self.outcome, "ok": self.ok, "base": self.base, "adapters": list(self.adapters),
            "data": self.data, "device": self.device, "dtype": self.dtype, "seed": self.seed,
            "effect": asdict(self.effect), "checks": [asdict(check) for check in self.checks],
            "kept": [_kept(each) for each in self.kept], "verdicts": list(self.verdicts),
            "warnings": list(self.warnings), "seconds": round(self.seconds, 3),
        }  # fmt: skip


def _kept(each: KeptEffect) -> Mapping[str, JsonValue]:
    return {**asdict(each), "parted": each.parted}

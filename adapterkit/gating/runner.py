"""Run a gate: compare the outputs of the base, the base with adapters, and the merged model or graph.

The base also runs with a null adapter, to get a reference for the adapters' effect. The null adapter changes the same
targets as the adapters. Each of its changes is random, and has the same norm as the adapters' change at that target.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from numbers import Real
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..core.arguments import checks_types, weights_of
from ..errors import (
    PASS_AN_ADAPTER,
    AdapterkitError,
    Malformed,
    Unsupported,
    UsageError,
    first_line,
    places_errors,
    public,
    shown,
)
from ..formats import read
from ..io.checkpoint import Checkpoint, opened
from ..io.inputs import inputs_kept
from ..io.locations import exists, located, path_text
from ..io.stages import stage
from ..merging import plan
from ..merging.vocabulary import parse_vocab
from ..methods.dense import Dense
from ..methods.lora import LoRA
from ..naming.binding.fitting import TO_REFUSE, check_base
from ..ops.alignment import places, side_by_side
from ..ops.comparison import lowered
from ..quant import dequantized, is_quantized
from .models import ModelInputs, inputs_for, texts_of
from .result import AdapterEffect, BlockDifference, Gate, KeptEffect, ModulePart, Thresholds, checks_of, verdicts_of

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from numpy.random import Generator
    from torch import Tensor

    from ..core.adapter import Target
    from ..core.updates import Update
    from ..io.computed import Array
    from ..merging.planned import Plan
    from ..ops.lowering import Change, Delta
    from .models import Adapted, Graph, ModelOutput, Run, StateSums

    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]

RANK = 8
"""The rank of the null adapter's change at a target, if at least one adapter's change at this target is not a low-rank
product.

If all adapters' changes at the target are low-rank products, the rank of the null adapter's change is the sum of their
ranks. In both cases, the rank is at most the smaller side of the weight.
"""


def null_adapter(
    adapters: Sequence[Adapter], base: Checkpoint, *, weights: Sequence[float], seed: int, rename: str | Sequence[str]
) -> Adapter:
    """Return an adapter that makes a random change at each target of the given adapters.

    Each random change has the same Frobenius norm as the sum of the adapters' changes at that target.

    Args:
        adapters: the adapters that determine the targets and the norms.
        base: the base of the adapters; its weights must not be quantized.
        weights: for each adapter, the factor that multiplies its changes.
        seed: the seed of the random numbers.
        rename: rules for names, as in `adapterkit.merge`.

    Raises:
        NotMergeable: an adapter changes outputs, the context or anything else that is not a weight or a bias. Such a
            change has no norm.
        AdapterkitError: an adapter does not fit the base.
    """
    import numpy as np

    _, aligned = places(adapters, base=base, disjoint=True, rename=rename)
    rng = np.random.default_rng(seed)
    updates: dict[Target, Any] = {}
    for place in aligned:
        changes = lowered(place).changes(weights)
        updates_here = [*_weights(changes, place.target.stacked, rng), *_biases(changes, place.target.stacked, rng)]
        if updates_here:
            updates[place.target] = tuple(updates_here)
    return Adapter(updates)


def _weights(changes: Sequence[Change | None], stacked: bool, rng: Generator) -> list[Update]:
    import numpy as np

    shape = next(change.shape for change in changes if change is not None)
    pairs = [_random([delta for delta in row if delta is not None], rng) for row in side_by_side(changes)]
    if not pairs:
        return []
    if len(shape) == 1:
        return [Dense(D=_torch((pairs[0][0] @ pairs[0][1]).reshape(shape)), d=None)]
    rank = max(B.shape[1] for B, _ in pairs)
    Bs = [np.pad(B, ((0, 0), (0, rank - B.shape[1]))) for B, _ in pairs]
    As = [np.pad(A, ((0, rank - len(A)), (0, 0))) for _, A in pairs]
    B = np.stack(Bs) if stacked else Bs[0]
    A = np.stack([each.reshape(rank, *shape[1:]) for each in As]) if stacked else As[0].reshape(rank, *shape[1:])
    return [LoRA(A=_torch(A), B=_torch(B), bias=None)]


def _biases(changes: Sequence[Change | None], stacked: bool, rng: Generator) -> list[Update]:
    import numpy as np

    moved = [change.bias() for change in changes if change is not None]
    present = [each for each in moved if each is not None]
    if not present:
        return []
    whole: Any = sum(present)
    drawn = rng.standard_normal(whole.shape)
    # For stacked experts, compute the norm of each expert's bias separately.
    axis = -1 if stacked else None
    size = np.linalg.norm(whole, axis=axis, keepdims=stacked) / np.linalg.norm(drawn, axis=axis, keepdims=stacked)
    return [Dense(D=None, d=_torch(drawn * size))]


def _random(deltas: Sequence[Delta], rng: Generator) -> tuple[Array, Array]:
    """Return random factors B and A; `B @ A` has the same Frobenius norm as the sum of the changes."""
    import numpy as np

    out, columns = deltas[0].shape
    thin = all(delta.rest is None for delta in deltas)
    rank = max(1, min(sum(delta.rank for delta in deltas) if thin else RANK, out, columns))
    if thin:
        size = _norm(np.hstack([delta.B for delta in deltas]), np.vstack([delta.A for delta in deltas]))
    else:
        whole: Any = sum(delta.dense() for delta in deltas)
        size = float(np.linalg.norm(whole))
    B, A = rng.standard_normal((out, rank)), rng.standard_normal((rank, columns))
    return B * (size / _norm(B, A)), A


def _norm(B: Array, A: Array) -> float:
    """Return the Frobenius norm of B @ A, without forming the product."""
    return math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))


def _torch(array: Array) -> torch.Tensor:
    import torch

    return torch.from_numpy(array.astype("float32"))


DTYPES = ("float32", "bfloat16", "float16")
"""The dtypes in which the models can run."""

DEFAULTS = Thresholds()

MULTIPLES = (1.0, 2.0, 0.5, -1.0, 0.25, 4.0, 0.8, 3.0)
"""The factors that `_Run._scale` tries, to find out by which factor a graph scales the adapters' change."""

EXACT = 1e-3
"""The limit for the smallest divergence in `_Run._scale`, as a fraction of the largest divergence.

`_Run._scale` multiplies the adapters' changes by each factor in `MULTIPLES` and by 0. For each factor, it computes the
divergence between the resulting outputs and the graph's outputs. It returns the factor with the smallest divergence,
but only if this divergence is at most `EXACT` times the largest divergence.
"""

STEP = {"float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""The relative rounding step of each dtype in which the models can run. The step of float32 is set to 0, because its
rounding errors are negligible."""


@checks_types
@places_errors
def gate(
    base: Base,
    adapters: Source | Sequence[Source],
    *,
    merged: Base | None = None,
    onnx: str | PathLike[str] | None = None,
    data: str | PathLike[str] = "builtin",
    weights: Sequence[float] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    texts: int = 8,
    length: int = 48,
    new_tokens: int = 16,
    seed: int = 0,
    null: bool = True,
    min_effect: float = DEFAULTS.min_effect,
    min_kept: float = DEFAULTS.min_kept,
    max_scale_error: float = DEFAULTS.max_scale_error,
    max_part_error: float = DEFAULTS.max_part_error,
    min_agreement: float | None = None,
    max_perplexity: float | None = None,
    min_over_null: float | None = None,
    tied: str | Mapping[str, str] | None = None,
    rename: str | Sequence[str] = (),
    strict_base: bool = False,
    vocab: str | None = None,
) -> Gate:
    """Check that adapters change the outputs of a base, and that a merged model or a graph reproduces the new outputs.

    Args:
        base: the folder of a transformers model, a uri on a hub, or an open checkpoint.
        adapters: one or several adapters. Each is a path, a uri or an `Adapter`.
        merged: the merged model: a folder or a GGUF model. A GGUF model runs with the config of `base`. If the merged
            model is quantized, its weights are dequantized first. The gate measures how much of the adapters' effect
            the merged model keeps.
        onnx: an ONNX graph of the base with the adapters. If the graph has slots, the adapters' tensors fill the slots.
        data: the texts to run: `builtin`, a file with one text per line, or a JSON Lines file (`.jsonl`) with a field
            `text`.
        weights: for each adapter, the factor that multiplies its changes; if None, all factors are 1.
        device: `auto`, `cpu` or `cuda:N`.
        dtype: the dtype in which the models run: `float32`, or `bfloat16` or `float16` to save memory.
        texts: the number of texts to run.
        length: the maximum number of tokens of each text.
        new_tokens: the number of tokens to generate. The models continue the beginnings of four texts, and the gate
            compares the generated tokens. 0 skips this comparison.
        seed: the seed for the choice of texts, for the null adapter and for random inputs.
        null: whether to also run the base with the null adapter, which makes random changes. At each target, the random
            change has the same norm as the adapters' change.
        min_effect: see `gating.result.Thresholds`.
        min_kept: see `gating.result.Thresholds`.
        max_scale_error: see `gating.result.Thresholds`.
        max_part_error: see `gating.result.Thresholds`.
        min_agreement: see `gating.result.Thresholds`.
        max_perplexity: see `gating.result.Thresholds`.
        min_over_null: see `gating.result.Thresholds`.
        tied: which layers an update changes if the base ties its head to its embedding, as in `adapterkit.merge`.
        rename: rules for names that cannot be resolved, as in `adapterkit.merge`.
        strict_base: refuse the base if its name, config or fingerprint differs from the one that an adapter records.
        vocab: `grow` adds the adapters' new vocabulary rows to the base, as in `adapterkit.merge`.

    Returns:
        The `Gate` with the measured values, the checks and the verdicts. Its `ok` is true if all checks passed.

    Raises:
        UsageError: `adapters` is empty, the number of weights is wrong, the device or dtype does not exist, or
            transformers is not installed.
        CheckFailed: `strict_base` is set, and an adapter records another base.
        TargetNotFound, ShapeMismatch: an adapter does not fit the base.
        Unsupported: the model reads neither tokens nor pixels, or needs code from its own folder.
        Malformed: transformers cannot load the base.

    Example:
        >>> adapterkit.gate("base", "lora", merged="merged").verdicts  # doctest: +SKIP
        ('the merged model keeps 99.98 % of the effect',)
    """
    from ..torch.pretrained import check_transformers
    from .models import Adapted, device_of, is_gguf_model, load

    started = time.perf_counter()
    given = [adapters] if isinstance(adapters, (Adapter, str, PathLike)) else list(adapters)
    counts = {"texts": (texts, 1), "length": (length, 2), "new_tokens": (new_tokens, 0)}
    factors = checked(given, weights, dtype, counts)
    limits = Thresholds(
        min_effect, min_kept, max_scale_error, max_part_error, min_agreement, max_perplexity, min_over_null
    )
    _check_limits(limits)
    lines = texts_of(data)
    with inputs_kept():
        checkpoint = opened(base)
        if is_gguf_model(checkpoint):
            load(checkpoint, dtype, "cpu")  # A GGUF base has no config.json, so this call always raises a UsageError.
        check_transformers(checkpoint.folder, "running models")
        loaded = [each if isinstance(each, Adapter) else read(each, base=checkpoint) for each in given]
        after = None if merged is None else opened(merged)
        graph = None if onnx is None else located(onnx)
    if graph is not None and not exists(graph):
        raise UsageError("the graph does not exist", path=graph, cure="Correct the path at --onnx (onnx=)")
    names = [public("an adapter in memory" if isinstance(each, Adapter) else path_text(each)) for each in given]
    warnings = check_base([*zip(names, loaded, strict=True)], checkpoint, strict=strict_base)
    place = device_of(device)
    model = load(checkpoint, dtype, place)
    if parse_vocab(vocab) is not None:
        _grow(model, plan(checkpoint, loaded, weights=factors, tied=tied, rename=rename, vocab=vocab))
    inputs = inputs_for(model, checkpoint.folder, lines, count=texts, length=length, seed=seed)
    adapted = Adapted(model, loaded, factors, tied=tied, rename=rename)
    why_no_null = _add_null(adapted, loaded, checkpoint, factors, seed, rename) if null else "it was switched off"
    run = _Run(adapted, inputs, limits, STEP[dtype], new_tokens)
    effect = run.effect(why_no_null)
    adapted.drop_null()
    kept = []
    if graph is not None:
        kept.append(run.graph(graph, loaded, factors))
    if after is not None:  # Measure the merged model last: `_Run.merged` may merge the adapters into the loaded base.
        kept.insert(0, run.merged(after, dtype, place, checkpoint))
    checks = checks_of(effect, kept, limits)
    return Gate(
        public(str(checkpoint.root)), tuple(names), inputs.source, place, dtype, seed, effect, tuple(kept),
        tuple(checks), verdicts_of(effect, kept, checks), time.perf_counter() - started,
        tuple(f"{why}{TO_REFUSE}" for why in warnings),
    )  # fmt: skip


def checked(
    given: Sequence[object], weights: Sequence[float] | None, dtype: str, counts: Mapping[str, tuple[int, int]]
) -> list[float]:
    """Check the arguments of `gate`, and return one weight for each adapter.

    Args:
        given: the adapters.
        weights: the weights of the adapters; if None, each adapter has the weight 1.
        dtype: the dtype in which the models run.
        counts: a map from the name of each integer argument to its value and its smallest allowed value.
    """
    if not given:
        raise UsageError("no adapter was given", cure=PASS_AN_ADAPTER)
    factors = weights_of(weights, len(given))
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", cure=f"Known: {', '.join(DTYPES)}")
    for name, (value, least) in counts.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}", where=name, cure="Pass a larger number")
    return factors


def _check_limits(limits: Thresholds) -> None:
    """Refuse thresholds that are not numbers before any model runs. Some thresholds may be None."""
    for name, value in asdict(limits).items():
        if value is None and getattr(DEFAULTS, name) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
            raise UsageError(f"{name} {shown(value)} is not a number", where=name, cure="Pass a number")


def _grow(model: Any, planned: Plan) -> None:
    """Grow the embedding and the head of a model to the number of rows that a merge plans. All new rows are zero."""
    import torch

    rows = (planned.vocabulary or {}).get("rows")
    if not rows:
        return
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for parameter in () if layer is None else layer.parameters(recurse=False):
                parameter[before:] = 0


def _add_null(
    adapted: Adapted, adapters: Sequence[Adapter], base: Checkpoint, weights: Sequence[float], seed: int,
    rename: str | Sequence[str],
) -> str | None:  # fmt: skip
    """Attach the null adapter. Return None, or the reason why the null adapter could not be created."""
    try:
        plain = dequantized(base) if is_quantized(base) else base
        adapted.add_null(null_adapter(adapters, plain, weights=weights, seed=seed, rename=rename))
    except AdapterkitError as error:
        return error.why
    return None


class _Run:
    """Runs all models on the same inputs, and compares their outputs with those of the base with adapters."""

    def __init__(self, adapted: Adapted, inputs: ModelInputs, limits: Thresholds, coarse: float, new: int) -> None:
        from .models import is_causal

        self.adapted, self.inputs, self.limits, self.coarse = adapted, inputs, limits, coarse
        stage("running the base with the adapters")
        self.causal = is_causal(lambda feeds: self._base(feeds), inputs.feeds[0])
        self.new = new if self.causal else 0
        self.words = self._greedy(self._adapted)

    def _greedy(self, run: Run) -> list[list[int]]:
        from .models import greedy

        return greedy(run, self.inputs.feeds, self.new) if self.new else []

    def _base(self, feeds: Mapping[str, Tensor]) -> ModelOutput:
        return self.adapted.run(feeds, "base")

    def _adapted(self, feeds: Mapping[str, Tensor]) -> ModelOutput:
        return self.adapted.run(feeds, "adapted")

    def effect(self, why_no_null: str | None) -> AdapterEffect:
        """Measure the effect of the adapters on the base."""
        from .models import agreement, divergence, positions, unit_of

        moved, drawn, back = _Mean(), _Mean(), _Mean()
        before, after = _Perplexity(self.causal), _Perplexity(self.causal)
        finite, unit = True, ""
        for feeds in self.inputs.feeds:
            base, adapted = self._base(feeds), self._adapted(feeds)
            unit = unit_of(base)
            finite = finite and adapted.finite
            count = positions(base)
            moved.add(divergence(base, adapted), count)
            back.add(divergence(adapted, base), count)
            if self.adapted.null is not None:
                drawn.add(divergence(base, self.adapted.run(feeds, "null")), count)
            before.add(base, feeds)
            after.add(adapted, feeds)
        self.back = back.value
        common = agreement(self._greedy(self._base), self.words) if self.words else None
        null = drawn.value if self.adapted.null is not None else None
        return AdapterEffect(
            moved.value if finite else math.nan, unit, null, why_no_null, common, before.value, after.value, finite
        )

    def graph(self, path: Path, adapters: Sequence[Adapter], weights: Sequence[float]) -> KeptEffect:
        """Measure the share of the effect that a graph keeps."""
        from .models import Graph

        stage(f"running {path}")
        effect = KeptEffect("onnx", public(str(path)))
        try:
            graph: Graph = Graph(path, adapters, weights)
            effect = self._kept(effect, graph.run, self._adapted)
            if effect.kept is not None and effect.kept < self.limits.min_kept:
                effect = replace(effect, scale=self._scale(graph.run))
        except Unsupported:
            raise
        except AdapterkitError as error:
            return replace(effect, why=error.why)
        return effect

    def _scale(self, run: Run) -> float | None:
        """Return the factor by which a graph scales the adapters' change; None if no tried factor matches.

        For a merged model, the factor is computed from the outputs of the modules. A graph has no modules to compare.
        Its logits do not give the factor either: their change is proportional to the factor only for small changes. So
        this method tries each factor in `MULTIPLES`.
        """
        from .models import divergence

        feeds = self.inputs.feeds[0]
        there, base = run(feeds), self._base(feeds)
        if not there.finite:
            return None
        apart = {0.0: divergence(base, there)}
        try:
            for factor in MULTIPLES:
                with self.adapted.scaled(factor):
                    apart[factor] = divergence(self._adapted(feeds), there)
        except UsageError:  # Prompts and prefixes cannot be scaled.
            return None
        best = min(apart, key=lambda factor: apart[factor])
        return best if apart[best] <= EXACT * max(apart.values()) else None

    def merged(self, checkpoint: Checkpoint, dtype: str, device: str, base: Checkpoint) -> KeptEffect:
        """Measure the share of the effect that a merged model keeps, as a whole and module by module."""
        from ..torch.pretrained import check_transformers
        from .models import StateSums, is_gguf_model, load, run_torch, stored_dtype
        from .modules import Watched, judged, scale_of

        if not is_gguf_model(checkpoint):
            check_transformers(checkpoint.folder, "running models")
        lacking: list[str] = []
        effect = KeptEffect("merged", public(str(checkpoint.root)), dtype=stored_dtype(checkpoint))
        try:
            other = load(checkpoint, dtype, device, lacking, base)
        except Malformed as error:
            return replace(effect, why=error.why)
        model = self.adapted.model
        if type(other) is not type(model):
            return replace(effect, why=f"its class is {type(other).__name__}, the base's is {type(model).__name__}")
        effect = replace(effect, lacking=tuple(lacking))
        states, watched = StateSums(), Watched(model, other, self.adapted.handles)

        def looked_at(feeds: Mapping[str, Tensor]) -> ModelOutput:
            with watched.looking():
                return self._adapted(feeds)

        stage("comparing the merged model module by module")
        try:
            effect = self._kept(effect, lambda feeds: run_torch(other, feeds, device), looked_at, states)
        except (RuntimeError, IndexError, ValueError) as error:  # The merged model's sizes do not fit the inputs.
            effect = replace(effect, why=first_line(error))
        finally:
            comparison = watched.close()
        parts: tuple[ModulePart, ...] = judged(
            comparison, model, other, self.adapted.handles, dtype=effect.dtype or "", coarse=self.coarse,
            max_scale_error=self.limits.max_scale_error, max_part_error=self.limits.max_part_error,
        )  # fmt: skip
        scale = scale_of(comparison)
        return replace(effect, parts=parts, scale=scale if effect.why is None and scale is not None else effect.scale,
                       blocks=_blocks(states))  # fmt: skip

    def _kept(
        self, effect: KeptEffect, run: Run, with_adapters: Run, states: StateSums | None = None,
    ) -> KeptEffect:  # fmt: skip
        from .models import agreement, along, divergence, positions

        apart, perplexity, product, asked = _Mean(), _Perplexity(self.causal), 0.0, 0.0
        finite, why = True, None
        for feeds in self.inputs.feeds:
            base, adapted, other = self._base(feeds), with_adapters(feeds), run(feeds)
            finite = finite and other.finite
            apart.add(divergence(adapted, other), positions(adapted))
            if other.main.shape[:-1] != adapted.main.shape[:-1] or other.main.shape[-1] < adapted.main.shape[-1]:
                why = f"its output has the shape {list(other.main.shape)} instead of {list(adapted.main.shape)}"
            else:
                both = along(base, adapted, other)
                product, asked = product + both[0], asked + both[1]
            perplexity.add(other, feeds)
            if states is not None:
                states.add(base, adapted, other)
        common = agreement(self.words, self._greedy(run)) if self.words else None
        back = self.back
        return replace(
            effect, divergence=apart.value, kept=1 - apart.value / back if back else None,
            scale=product / asked if asked else None, agreement=common, perplexity=perplexity.value, finite=finite,
            why=why,
        )  # fmt: skip


def _blocks(states: StateSums) -> tuple[BlockDifference, ...]:
    return tuple(
        BlockDifference(at, math.sqrt(apart / size), math.sqrt(moved / size))
        for at, (size, apart, moved) in enumerate(zip(states.size, states.apart, states.moved, strict=True))
        if size
    )


class _Mean:
    """A mean over positions. Each call of `add` adds a sum over `count` positions."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        self.total, self.count = self.total + value, self.count + count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class _Perplexity:
    """The perplexity over all texts. Its `value` is None for models that do not predict the next token."""

    def __init__(self, causal: bool) -> None:
        self.causal, self.mean = causal, _Mean()

    def add(self, output: ModelOutput, feeds: Mapping[str, Tensor]) -> None:
        if self.causal:
            from .models import surprise

            self.mean.add(*surprise(output, feeds))

    @property
    def value(self) -> float | None:
        return math.exp(min(self.mean.value, 700.0)) if self.causal and self.mean.count else None

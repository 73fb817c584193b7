"""Run a gate: the base, the base with adapters, with random changes of the same size, and what was made of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter
from ..errors import AdapterkitError, Malformed, Unsupported, UsageError, first_line, places_errors, public
from ..formats import read
from ..io.checkpoint import Checkpoint, opened
from ..io.inputs import inputs_kept
from ..io.locations import exists, located, path_text
from ..io.stages import stage
from ..merging import plan
from ..merging.vocabulary import parse_vocab
from ..naming.binding.bases import check_base
from ..quant import dequantized, is_quantized
from .inputs import Inputs, inputs_for, texts_of
from .result import AdapterEffect, BlockDifference, Gate, KeptEffect, ModulePart, Thresholds
from .verdicts import checks_of, verdicts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..merging.planned import Plan
    from .measuring import ModelOutput, StateSums
    from .models import Adapted, Graph

    Base = Checkpoint | str | PathLike[str]
    Source = Adapter | str | PathLike[str]

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that models can be computed in."""

DEFAULTS = Thresholds()

MULTIPLES = (1.0, 2.0, 0.5, -1.0, 0.25, 4.0, 0.8, 3.0)
"""Multiples of the change that a graph is held against."""

EXACT = 1e-3
"""Divergence, relative to the largest among the multiples, below which a graph holds that multiple."""

STEP = {"float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Dtype -> relative step of what is computed in it, beyond float32."""


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
    """Run a base with its adapters, and tell whether they change it and whether a merged model or a graph keeps that.

    Args:
        base: a folder of transformers, an address on a hub, or an open checkpoint.
        adapters: one adapter or several: paths, addresses or `Adapter`s.
        merged: what they were merged into: a folder, or a GGUF model, which runs with the config of `base`. Quantized
            weights are read as the numbers that they stand for, and judged by the part of each change that they hold.
        onnx: a graph of base and adapters; slots are filled with the adapters.
        data: `builtin`, or a file with one text a line, or of JSON Lines with a field `text`.
        weights: with which weight each adapter is attached; 1 each if None.
        device: `auto`, `cpu` or `cuda:N`.
        dtype: the dtype to compute in: `float32`, or a smaller one where memory lacks.
        texts: how many texts.
        length: how many tokens of each, at most.
        new_tokens: by how many tokens the beginnings of four texts are continued, to compare greedy text; 0 for none.
        seed: the seed of the choice of texts, of the null adapter and of drawn inputs.
        null: run random changes of the same size, too.
        min_effect: see `gating.result.Thresholds`.
        min_kept: as `min_effect`.
        max_scale_error: as `min_effect`.
        max_part_error: as `min_effect`.
        min_agreement: as `min_effect`.
        max_perplexity: as `min_effect`.
        min_over_null: as `min_effect`.
        tied: which layers an update changes where embedding and head share a weight; as in `adapterkit.merge`.
        rename: rules for names that cannot be told, as in `adapterkit.merge`.
        strict_base: refuse a base whose name, config or fingerprint is not the one that an adapter names.
        vocab: `grow`: give the base the rows of the vocabulary that the adapters were trained with, as
            `adapterkit.merge` does.

    Returns:
        figures, checks and verdicts; `ok` says whether all checks hold.

    Raises:
        UsageError: no adapter, weights that do not match, no such device or dtype, or transformers is not installed.
        CheckFailed: the base is not the one that an adapter names, and `strict_base`.
        TargetNotFound, ShapeMismatch: an adapter does not fit the base.
        Unsupported: the model reads neither tokens nor pixels, or brings code of its own.
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
    lines = texts_of(data)
    with inputs_kept():
        checkpoint = opened(base)
        if is_gguf_model(checkpoint):
            load(checkpoint, dtype, "cpu")  # Says what to name instead.
        check_transformers(checkpoint.folder, "running models")
        held = [each if isinstance(each, Adapter) else read(each, base=checkpoint) for each in given]
        after = None if merged is None else opened(merged)
        graph = None if onnx is None else located(onnx)
    if graph is not None and not exists(graph):
        raise UsageError("no such graph", path=graph, cure="Check the spelling of --onnx (onnx=)")
    names = [public("an adapter in memory" if isinstance(each, Adapter) else path_text(each)) for each in given]
    warnings = check_base([*zip(names, held, strict=True)], checkpoint, strict=strict_base)
    place = device_of(device)
    model = load(checkpoint, dtype, place)
    if parse_vocab(vocab) is not None:
        _grow(model, plan(checkpoint, held, weights=factors, tied=tied, rename=rename, vocab=vocab))
    inputs = inputs_for(model, checkpoint.folder, lines, count=texts, length=length, seed=seed)
    adapted = Adapted(model, held, factors, tied=tied, rename=rename)
    why_no_null = _add_null(adapted, held, checkpoint, factors, seed, rename) if null else "it was not asked for"
    run = _Run(adapted, inputs, limits, STEP[dtype], new_tokens)
    effect = run.effect(why_no_null)
    adapted.drop_null()
    kept = []
    if graph is not None:
        kept.append(run.graph(graph, held, factors))
    if after is not None:  # Last: it folds the adapters into the base.
        kept.insert(0, run.merged(after, dtype, place, checkpoint))
    checks = checks_of(effect, kept, limits)
    return Gate(
        public(str(checkpoint.root)), tuple(names), inputs.source, place, dtype, seed, effect, tuple(kept),
        tuple(checks), verdicts_of(effect, kept, checks), time.perf_counter() - started,
        tuple(f"{why}; --strict-base (strict_base=True) refuses it" for why in warnings),
    )  # fmt: skip


def checked(
    given: Sequence[object], weights: Sequence[float] | None, dtype: str, counts: Mapping[str, tuple[int, int]]
) -> list[float]:
    """Return the weights of the adapters, once the arguments are checked; `counts`: name -> value and least value."""
    if not given:
        raise UsageError("no adapter was given", cure="Name at least one")
    factors = [1.0] * len(given) if weights is None else list(weights)
    if len(factors) != len(given):
        why = f"{len(factors)} weights for {len(given)} adapters"
        raise UsageError(why, where="weights", cure="Give one --weight (weights=) for each adapter")
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", where="dtype", cure=f"Known: {', '.join(DTYPES)}")
    for name, (value, least) in counts.items():
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}", where=name, cure="Give a larger number")
    return factors


def _grow(model: Any, planned: Plan) -> None:
    """Give a model the rows of its vocabulary that a merge gives it; those that no adapter fills are zero."""
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
    """Attach the null adapter; return why there is none."""
    from .null import null_adapter

    try:
        plain = dequantized(base) if is_quantized(base) else base
        adapted.add_null(null_adapter(adapters, plain, weights=weights, seed=seed, rename=rename))
    except AdapterkitError as error:
        return error.why
    return None


class _Run:
    """The outputs of the base with adapters, against which everything is held."""

    def __init__(self, adapted: Adapted, inputs: Inputs, limits: Thresholds, coarse: float, new: int) -> None:
        from .measuring import is_causal

        self.adapted, self.inputs, self.limits, self.coarse = adapted, inputs, limits, coarse
        stage("running the base with the adapters")
        self.causal = is_causal(lambda feeds: self._base(feeds), inputs.feeds[0])
        self.new = new if self.causal else 0
        self.words = self._greedy(self._adapted)

    def _greedy(self, run: Callable[[Mapping[str, Any]], ModelOutput]) -> list[list[int]]:
        from .measuring import greedy

        return greedy(run, self.inputs.feeds, self.new) if self.new else []

    def _base(self, feeds: Mapping[str, object]) -> ModelOutput:
        return self.adapted.run(feeds, "base")

    def _adapted(self, feeds: Mapping[str, object]) -> ModelOutput:
        return self.adapted.run(feeds, "adapted")

    def effect(self, why_no_null: str | None) -> AdapterEffect:
        """Measure what the adapters do to the base."""
        from .measuring import agreement, divergence, positions, unit_of

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

    def graph(self, path: Any, adapters: Sequence[Adapter], weights: Sequence[float]) -> KeptEffect:
        """Measure what a graph keeps."""
        from .models import Graph

        stage(f"running {path}")
        told = KeptEffect("onnx", public(str(path)))
        try:
            graph: Graph = Graph(path, adapters, weights)
            told = self._kept(told, graph.run, self._adapted)
            if told.kept is not None and told.kept < self.limits.min_kept:
                told = replace(told, scale=self._scale(graph.run))
        except Unsupported:
            raise
        except AdapterkitError as error:
            return replace(told, why=error.why)
        return told

    def _scale(self, run: Callable[[Mapping[str, Any]], ModelOutput]) -> float | None:
        """Return the multiple of the change with which the base with adapters gives what a graph gives, if one does.

        The slope of logits tells it for small changes only, and a graph has no modules to look at.
        """
        from .measuring import divergence

        feeds = self.inputs.feeds[0]
        there, base = run(feeds), self._base(feeds)
        if not there.finite:
            return None
        apart = {0.0: divergence(base, there)}
        try:
            for factor in MULTIPLES:
                with self.adapted.scaled(factor):
                    apart[factor] = divergence(self._adapted(feeds), there)
        except UsageError:  # Context has no half measures.
            return None
        best = min(apart, key=lambda factor: apart[factor])
        return best if apart[best] <= EXACT * max(apart.values()) else None

    def merged(self, checkpoint: Checkpoint, dtype: str, device: str, base: Checkpoint) -> KeptEffect:
        """Measure what a merged model keeps, as a whole and module by module."""
        from ..torch.pretrained import check_transformers
        from .measuring import StateSums, run_torch
        from .models import is_gguf_model, load, stored_dtype
        from .modules import Watched, judged, scale_of

        if not is_gguf_model(checkpoint):
            check_transformers(checkpoint.folder, "running models")
        lacking: list[str] = []
        told = KeptEffect("merged", public(str(checkpoint.root)), dtype=stored_dtype(checkpoint))
        try:
            other = load(checkpoint, dtype, device, lacking, base)
        except Malformed as error:
            return replace(told, why=error.why)
        model = self.adapted.model
        if type(other) is not type(model):
            return replace(told, why=f"it is a {type(other).__name__}, and the base a {type(model).__name__}")
        told = replace(told, lacking=tuple(lacking))
        states, watched = StateSums(), Watched(model, other, self.adapted.handles)

        def looked_at(feeds: Mapping[str, object]) -> ModelOutput:
            with watched.looking():
                return self._adapted(feeds)

        stage("comparing it module by module")
        try:
            told = self._kept(told, lambda feeds: run_torch(other, feeds, device), looked_at, states)
        except (RuntimeError, IndexError, ValueError) as error:  # Sizes that do not fit the inputs.
            told = replace(told, why=first_line(error))
        finally:
            comparison = watched.close()
        parts: tuple[ModulePart, ...] = judged(
            comparison, model, other, self.adapted.handles, dtype=told.dtype or "", coarse=self.coarse,
            max_scale_error=self.limits.max_scale_error, max_part_error=self.limits.max_part_error,
        )  # fmt: skip
        scale = scale_of(comparison)
        return replace(told, parts=parts, scale=scale if told.why is None and scale is not None else told.scale,
                       blocks=_blocks(states))  # fmt: skip

    def _kept(
        self, told: KeptEffect, run: Callable[[Mapping[str, Any]], ModelOutput],
        with_adapters: Callable[[Mapping[str, Any]], ModelOutput], states: StateSums | None = None,
    ) -> KeptEffect:  # fmt: skip
        from .measuring import agreement, along, divergence, positions

        apart, perplexity, product, asked = _Mean(), _Perplexity(self.causal), 0.0, 0.0
        finite, why = True, None
        for feeds in self.inputs.feeds:
            base, adapted, other = self._base(feeds), with_adapters(feeds), run(feeds)
            finite = finite and other.finite
            apart.add(divergence(adapted, other), positions(adapted))
            if other.main.shape[:-1] != adapted.main.shape[:-1] or other.main.shape[-1] < adapted.main.shape[-1]:
                why = f"it gives {list(other.main.shape)} where {list(adapted.main.shape)} belongs"
            else:
                both = along(base, adapted, other)
                product, asked = product + both[0], asked + both[1]
            perplexity.add(other, feeds)
            if states is not None:
                states.add(base, adapted, other)
        common = agreement(self.words, self._greedy(run)) if self.words else None
        back = self.back
        return replace(
            told, divergence=apart.value, kept=1 - apart.value / back if back else None,
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
    """A sum over positions."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float, count: int) -> None:
        self.total, self.count = self.total + value, self.count + count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


class _Perplexity:
    """Perplexity over all texts; None for models that foretell no token."""

    def __init__(self, causal: bool) -> None:
        self.causal, self.mean = causal, _Mean()

    def add(self, output: ModelOutput, feeds: Mapping[str, Any]) -> None:
        if self.causal:
            from .measuring import surprise

            self.mean.add(*surprise(output, feeds))

    @property
    def value(self) -> float | None:
        return math.exp(min(self.mean.value, 700.0)) if self.causal and self.mean.count else None

"""Decide which layers each update changes if a model ties its head to its embedding, and whether to untie the head.

PEFT (0.21.2) attaches an update only to the module that the update names, so an update of a tied embedding does not
change the head. Token rows are the exception: PEFT attaches them to both layers. The option `tied` overrides PEFT's
choice, for all updates or for some kinds of updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ..core.adapter import Target
from ..core.updates import Additive, Update
from ..errors import UsageError
from ..io.lazy import as_lazy
from ..naming.ties import Tie, is_embedding, is_head, kept_tied, ties_by_default, untied, untied_scale
from .planned_update import PlannedUpdate

if TYPE_CHECKING:
    from ..core.adapter import Adapter, Step
    from ..io.lazy import Array, Leaf
    from ..io.strict_json import JsonValue

Folds = dict[str, list[PlannedUpdate]]
"""A map from the name of a layer's weight to its planned updates."""

KINDS = ("rows", "embedding", "head", "replacement")
"""The kinds of updates. The option `tied` may contain a separate choice for each kind."""

MERGE, UNTIE = "merge", "untie"

GRAMMAR = "merge, untie, or pairs such as rows=untie,embedding=merge; kinds are rows, embedding, head, replacement"


def parse_tied(tied: str | Mapping[str, str] | None) -> str | None:
    """Parse the option `tied`; return it as normalised text, or None if the option is not set.

    Args:
        tied: `"merge"`, `"untie"`, a choice for each kind such as `"rows=untie,embedding=merge"`, or a mapping of kinds
            to choices. If None, each adapter's file determines the choice.

    Raises:
        UsageError: a kind or a choice is unknown.
    """
    if tied is None or tied in (MERGE, UNTIE):
        return tied
    if isinstance(tied, Mapping):
        pairs = [(str(kind), str(choice)) for kind, choice in tied.items()]
    else:
        pairs = [(kind.strip(), choice.strip()) for kind, _, choice in (p.partition("=") for p in str(tied).split(","))]
    if not pairs or any(kind not in KINDS or choice not in (MERGE, UNTIE) for kind, choice in pairs):
        raise UsageError(f"the choice {tied!r} for tied weights is unknown", cure=f"Pass --tied (tied=) {GRAMMAR}")
    return ",".join(f"{kind}={choice}" for kind, choice in sorted(dict(pairs).items()))


def settle_tie(
    tie: Tie, folds: Folds, names: dict[str, str], adapters: Sequence[Adapter], tied: str | None,
    config: Mapping[str, JsonValue] | None, warnings: list[str], rows: int,
) -> dict[str, JsonValue]:  # fmt: skip
    """Move the planned updates of tied layers to the output tensors that they change.

    Args:
        tie: the base's tie.
        folds: a map from layer names in the adapters to planned updates. The function replaces the names of tied layers
            with names of output tensors.
        names: a map from output tensors to stored tensors. If the output gets a separate head, the function adds the
            head, and all other tensors that must be stored separately without the tie.
        adapters: the adapters of the merge, in the order of `PlannedUpdate.source`.
        tied: the result of `parse_tied`.
        config: the base's config.
        warnings: a list of sentences. The function adds one for each omitted update, and one if PEFT ignores the head's
            bias.
        rows: the number of rows of the tied tensor in the output.

    Returns:
        The keys to set in the output's config, so that the head is tied or untied; empty if the config needs no change.

    Raises:
        UsageError: it is unknown which layers training changed; or two different changes would apply to one tensor.
    """
    adapter_folds = {name: folds.pop(name) for name in dict.fromkeys((tie.stored, *tie.layers)) if name in folds}
    if not adapter_folds:
        return {}
    changed: Folds = {layer: [] for layer in tie.layers}
    for position, adapter in enumerate(adapters):
        part = {name: [fold for fold in group if fold.source == position] for name, group in adapter_folds.items()}
        part = {name: group for name, group in part.items() if group}
        for layer, group in acting(tie, part, adapter, tied, warnings).items():
            changed[layer] += group
    inputs, head = changed[tie.inputs[0]], changed[tie.head]
    bias = f"{tie.head.removesuffix('.weight')}.bias"
    if loses_bias(head, adapters) and (bias in names or bias in dict(tie.beside)):
        warnings.append(
            f"{bias} is kept, as in PEFT's own merge. In training, PEFT omitted this bias, because token rows were "
            "trained at a tied head. So the merged model adds the bias to logits that had no bias in training"
        )
    if not all(_equal(changed[layer], inputs) for layer in tie.inputs):
        why = f"the adapter changes {' and '.join(tie.inputs)} differently, but the model stores one tensor for them"
        cure = (
            "Inject the adapter into a live model, in which these layers are separate; "
            f"{_MERGE} applies each change to all tied layers"
        )
        raise UsageError(why, where=tie.stored, cure=cure)
    if tied != UNTIE and _equal(inputs, head):
        folds |= dict.fromkeys((tie.stored, tie.head) if tie.apart else (tie.stored,), inputs)
        return kept_tied(config)
    names[tie.head] = tie.head if tie.apart else tie.stored
    written = {tie.stored: inputs, tie.head: _unscaled(head, adapter_folds, tie, untied_scale(config), rows)}
    # Write separate embeddings for encoder and decoder: when the tie is off, BART's classes do not load `shared`.
    for layer in tie.inputs:
        names.setdefault(layer, tie.stored)
        written[layer] = inputs
    # Write copies of the other tied tensors, because transformers unties all tied tensors of a model together. For
    # example, when the tie is off, BERT's head loads a bias of its own.
    for copy, source in tie.beside:
        names.setdefault(copy, source)
        written[copy] = folds.get(source, [])
    folds |= {name: group for name, group in written.items() if group}
    return untied(config)


def refuse_tied_part(folds: Folds, stored: Collection[str], config: Mapping[str, JsonValue] | None) -> None:
    """Refuse updates of a nested decoder's embedding, if the decoder ties its head to the embedding.

    Such a decoder is part of a larger model. In TrOCR's published models, for example, only the decoder's config states
    this tie. To leave the head unchanged, the merge would have to write a separate head. But the merge does not know
    the head's name, which depends on the decoder's class in transformers.

    Args:
        folds: a map from stored names to planned updates.
        stored: names of the base's tensors.
        config: the base's config, which contains the decoder's config.

    Raises:
        UsageError: an update of the embedding is not an update of token rows. The head uses the embedding's tensor, so
            the merge would change the head too.
    """
    part = (config or {}).get("decoder")
    inside = [name for name in stored if name.startswith("decoder.")]
    if not isinstance(part, Mapping) or not ties_by_default(part) or any(map(is_head, inside)):
        return
    for name in inside:
        updates = [update for fold in folds.get(name, ()) for update in fold.updates]
        if is_embedding(name) and any(update.shared_as != "rows" for update in updates):
            why = (
                "the decoder ties its head to this embedding, but the adapter was trained to change only the embedding"
            )
            cure = f"Inject the adapter into a live model; {_MERGE} changes the embedding and the head"
            raise UsageError(why, where=name, cure=cure)


def loses_bias(head: Sequence[PlannedUpdate], adapters: Sequence[Adapter]) -> bool:
    """Whether PEFT trained token rows at the head; if so, PEFT's forward pass (0.21.2) ignores the head's bias."""
    return any(
        update.shared_as == "rows" and _tools(adapters[fold.source].recipe) == {"peft"}
        for fold in head
        for update in fold.updates
    )


def acting(tie: Tie, adapter_folds: Folds, adapter: Adapter, tied: str | None, warnings: list[str]) -> Folds:
    """Decide, for merges and injections, which updates of an adapter change each layer that shares a tied tensor.

    Args:
        tie: the base's tie.
        adapter_folds: a map from layer names in the adapter to its planned updates.
        adapter: the adapter; its lineage records which tool trained it.
        tied: the result of `parse_tied`.
        warnings: a list of sentences; the function adds one for each omitted update.

    Returns:
        A map from each name in `tie.layers` to the planned updates of this layer. A planned update may be listed for
        several layers; its `target` is always the layer that the adapter names.

    Raises:
        UsageError: it is unknown which layers training changed; or the changes cannot be applied to one tensor.
    """
    if not adapter_folds:
        return {}
    first = next(iter(adapter_folds.values()))
    # If the adapter changes all layers in the same way, the training tool does not matter.
    if (
        tied is None
        and adapter_folds.keys() >= set(tie.layers)
        and all(_equal(group, first) for group in adapter_folds.values())
    ):
        return {layer: adapter_folds[layer] for layer in tie.layers}
    choice = _Choice(tie, adapter_folds, adapter, tied)
    by_layer: Folds = {layer: [] for layer in tie.layers}
    for name, folds in adapter_folds.items():
        if name not in tie.layers and all(_equal(adapter_folds.get(layer, []), folds) for layer in tie.inputs):
            continue
        if name not in tie.layers and choice.is_idle(folds):
            readers = " and ".join(layer.removesuffix(".weight") for layer in tie.inputs)
            module = name.removesuffix(".weight")
            warnings.append(
                f"the update at {module} is not used. It had no effect in PEFT's training, because the model calls "
                f"{readers} instead of {module}. {_flag('embedding=untie,replacement=untie')} applies the update to "
                f"{readers}"
            )
            continue
        for fold in folds:
            shared = tuple(update for update in fold.updates if choice.of(update, name) == MERGE)
            for layer in tie.layers:
                # In T5, the encoder's and the decoder's embeddings use the tensor `shared`, so an update of `shared`
                # changes both embeddings. In T5Gemma 2, the encoder uses the decoder's embedding, but PEFT adapts only
                # the layer that the update names.
                is_alias = name == tie.stored and tie.stored not in tie.inputs
                is_named = layer == name or (is_alias and layer in tie.inputs)
                updates = fold.updates if is_named else shared
                if updates:
                    by_layer[layer].append(replace(fold, updates=updates))
    return {layer: _together(folds, tie) for layer, folds in by_layer.items()}


@dataclass(frozen=True, slots=True)
class _Choice:
    """Chooses which layers an update changes: all layers of the tie (`merge`), or only the named layer (`untie`)."""

    tie: Tie
    folds: Folds
    adapter: Adapter
    tied: str | None

    def of(self, update: Update, name: str) -> str:
        """Return `merge` or `untie` for an update at the layer `name`.

        Raises:
            UsageError: neither `tied` nor the adapter's file determines the choice.
        """
        kind = update.shared_as if update.shared_as != "layer" else "head" if name == self.tie.head else "embedding"
        if self.tied == MERGE:
            return MERGE
        if self.tied is not None and self.tied != UNTIE:
            chosen = dict(pair.split("=") for pair in self.tied.split(","))
            if kind in chosen:
                return chosen[kind]
        extracted = _extracted(self.adapter)
        if extracted is not None and (self.tied is None or extracted == UNTIE):
            return extracted
        if kind == "rows" and name != self.tie.head and not self._has_rows(self.tie.head):
            return MERGE
        if self.tied == UNTIE:
            return UNTIE
        return self._by_file(kind, name)

    def is_idle(self, folds: list[PlannedUpdate]) -> bool:
        """Whether updates had no effect in training, because the model does not call the module that they change.

        T5's `shared` is such a module: PEFT replaces `shared` with a PEFT layer, but the encoder and the decoder call
        their own embedding modules. Token rows are the exception: PEFT attaches them to every tied layer.
        """
        if self.tied not in (None, UNTIE) or _tools(self.adapter.recipe) != {"peft"}:
            return False
        rows = any(update.shared_as == "rows" for fold in folds for update in fold.updates)
        return not rows or self._has_rows(self.tie.head)

    def _by_file(self, kind: str, name: str) -> str:
        """Return `merge` if the tool that made the adapter applies the update to all tied layers, else `untie`."""
        tools = _tools(self.adapter.recipe)
        if kind == "rows" or tools == {"create"}:
            return UNTIE
        if tools == {"mlx"} and kind == "embedding":
            # mlx-lm uses the tied embedding as the head: its LoRAEmbedding.as_linear adds the same factors to the head.
            return MERGE
        if tools != {"peft"}:
            raise self._unknown(name, "the adapter's file does not state which layers training changed")
        foreign = self.adapter.foreign.data if self.adapter.foreign else {}
        config = foreign.get("config")
        config = config if isinstance(config, dict) else {}
        alone = not any(layer in self.folds for layer in self.tie.layers if layer != name)
        if config.get("ensure_weight_tying") and alone:
            if name == self.tie.head:
                raise self._unknown(name, "its config has ensure_weight_tying, but it has no update for the embedding")
            # With ensure_weight_tying, PEFT ties only modules with the names `embed_tokens` and `lm_head`, not `wte`.
            return MERGE if name.endswith("embed_tokens.weight") else UNTIE
        return UNTIE

    def _has_rows(self, name: str) -> bool:
        return any(update.shared_as == "rows" for fold in self.folds.get(name, ()) for update in fold.updates)

    def _unknown(self, name: str, why: str) -> UsageError:
        touched = " and ".join(self.folds)
        one = f"the base ties {self.tie.head} to {self.tie.stored}: both are one tensor"
        return UsageError(f"{one}. The adapter changes {touched}, and {why}", where=name, cure=_ADVICE)


def _extracted(adapter: Adapter) -> str | None:
    """Return the choice that `extract` recorded: `untie` if the tuned model has a separate head, else `merge`.

    Return None if there is no such record.
    """
    settings = [step.args.get("tied") for step in adapter.recipe if step.op == "extract"]
    return str(settings[0]) if settings and settings[0] in (MERGE, UNTIE) else None


def _tools(recipe: Iterable[Step]) -> set[str]:
    """Return the tools that made an adapter, according to its lineage.

    The result can contain `create`, `extract`, and the names of the formats from which adapters were read.
    """
    formats: set[str] = set()
    for step in recipe:
        if step.op == "read":
            formats.add(str(step.args.get("format")))
        elif step.op in ("create", "extract"):
            formats.add(step.op)
        for source in step.sources():
            formats |= _tools(source)
    return formats


def _together(folds: list[PlannedUpdate], tie: Tie) -> list[PlannedUpdate]:
    """Return an adapter's planned updates of one layer, without duplicates.

    Raises:
        UsageError: several updates are left and some are not additive, so the result would depend on their order.
    """
    kept: list[PlannedUpdate] = []
    for fold in folds:
        if any(same(fold, other) for other in kept):
            continue
        if kept and _starts_alike(fold, kept[0]):
            # PEFT saves a copy of the base's weight together with the factors. If an adapter has factors for the
            # embedding and for the head, its file contains two copies. Drop the second copy.
            fold = replace(fold, updates=fold.updates[1:])
        kept.append(fold)
    if len(kept) > 1 and not all(_without_start(fold).additive for fold in kept):
        rows = any(update.shared_as == "rows" for fold in kept for update in fold.updates)
        flag = _flag("rows=untie,embedding=untie,head=untie,replacement=untie" if rows else UNTIE)
        why = f"the adapter changes {tie.head} and {tie.stored} in ways that cannot share one tensor"
        raise UsageError(why, where=tie.head, cure=f"{flag} lets each update change only the layer that it names")
    return kept


def _unscaled(
    head: list[PlannedUpdate], adapter_folds: Folds, tie: Tie, scale: float, rows: int
) -> list[PlannedUpdate]:
    """Return an untied head's updates, with a further update that multiplies the base's weight by `scale`.

    Models such as T5 multiply the head's input by a factor, but only if the head is tied. `scale` replaces this factor,
    so the updates in `head` are multiplied by `scale` too. If `scale` is 1, return `head` unchanged.
    """
    if scale == 1:
        return head
    import numpy as np

    from ..io.lazy import from_numpy
    from ..methods.ia3 import IA3

    shape = (rows, *next(fold.shape for folds in adapter_folds.values() for fold in folds)[1:])
    factor = IA3(l=from_numpy(np.full(shape[0], scale)), l_in=None)  # type: ignore[arg-type]
    scaled = PlannedUpdate(Target(tie.head.removesuffix(".weight")), (factor,), 1.0, -1, False, shape)
    return [*(replace(fold, weight=fold.weight * scale) for fold in head), scaled]


def _equal(one: Sequence[PlannedUpdate], other: Sequence[PlannedUpdate]) -> bool:
    return one is other or (len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True)))


def same(one: PlannedUpdate, other: PlannedUpdate) -> bool:
    """Whether two planned updates change a stored tensor in the same way."""
    if (one.source, one.weight, len(one.updates)) != (other.source, other.weight, len(other.updates)):
        return False
    pairs = zip(one.updates, other.updates, strict=True)
    return all((a is b and one.axis == other.axis) or _same_update(a, one, b, other) for a, b in pairs)


def _same_update(a: Update, one: PlannedUpdate, b: Update, other: PlannedUpdate) -> bool:
    """Whether two updates, which may have different layouts, change a stored tensor in the same way."""
    import numpy as np

    if a.method != b.method or a.attributes != b.attributes or a.tensors.keys() != b.tensors.keys():
        return False
    if one.axis == other.axis:
        return all(_same_leaf(a.tensors[name], b.tensors[name]) for name in a.tensors)
    if set(a.tensors) == {"weight"} and a.shared_as == "replacement":
        return bool(np.array_equal(_bits(a.tensors["weight"]), _bits(b.tensors["weight"]).T))
    factors = [_factors(update, fold) for update, fold in ((a, one), (b, other))]
    if factors[0] is None or factors[1] is None:
        return False
    return all(np.array_equal(x, y) for x, y in zip(*factors, strict=True))


def _factors(update: Update, fold: PlannedUpdate) -> tuple[Array, Array] | None:
    """Return the factors (left, right) of an update that adds `left @ right` to the weight in the stored layout.

    The update's scaling is not included. Return None if the update has no factors.
    """
    from .arrays import NumpyArrays

    if not isinstance(update, Additive) or update.changes_bias or len(fold.shape) != 2:
        return None
    plain = update.replace(scaling=1.0) if "scaling" in update.attributes else update
    pair: Any = plain.map(cast("Callable[[Leaf], Leaf]", NumpyArrays().load)).pair(fold.logical)
    if pair is None:
        return None
    B, A = pair
    return (B, A) if fold.axis == "out" else (A.T, B.T)


def _same_leaf(one: Leaf, other: Leaf) -> bool:
    a, b = as_lazy(one), as_lazy(other)
    return (a.shape, a.dtype) == (b.shape, b.dtype) and (one is other or bytes(a.fetch()) == bytes(b.fetch()))


def _bits(leaf: Leaf) -> Array:
    import numpy as np

    lazy = as_lazy(leaf)
    return np.frombuffer(lazy.fetch(), f"<u{lazy.dtype.itemsize}").reshape(lazy.shape)


def _starts_alike(fold: PlannedUpdate, first: PlannedUpdate) -> bool:
    """Whether `fold` and `first` begin with the same replacement of the weight, and `fold` has further updates."""
    if len(fold.updates) < 2:
        return False
    one, other = fold.updates[0], first.updates[0]
    return one.shared_as == other.shared_as == "replacement" and _same_update(one, fold, other, first)


def _without_start(fold: PlannedUpdate) -> PlannedUpdate:
    is_replaced = len(fold.updates) > 1 and fold.updates[0].shared_as == "replacement"
    return replace(fold, updates=fold.updates[1:]) if is_replaced else fold


def _flag(choice: str) -> str:
    return f'--tied {choice} (tied="{choice}")'


_MERGE = _flag(MERGE)
_ADVICE = (
    f"{_flag(UNTIE)} lets each update change only the layer that it names, and writes the head as a separate tensor; "
    f"{_MERGE} applies every change to the shared tensor, which changes all layers that use it"
)

"""Rewrite an update for a given layer, so that it computes the same function as the forward of the training tool.

The forward may depend on the layer's kernel or padding. A file with OFT or LoRA does not show whether a layer is a
convolution, or how the layer pads its input. Merges and injections know the layer, so they rewrite the updates first.
Updates stay unchanged if the adapter was not read from a tool's file, or was read with `compat="formula"`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..errors import AdapterkitError, Unsupported
from ..methods._low_rank import AcrossGroups
from ..methods.lora import LoRA
from ..naming.binding.fitting import viewed
from . import FORMATS
from ._format import FORMULA, LayerFacts

if TYPE_CHECKING:
    from ..core.adapter import Step, Target
    from ..core.updates import Update
    from ..naming.binding import Site


def as_trained(
    updates: Sequence[Update], recipe: Sequence[Step], shape: tuple[int, ...], target: Target, padding: str = ""
) -> tuple[Update, ...]:
    """Rewrite the updates of one layer, so that they compute the same function as in the tool that trained them.

    Args:
        updates: the updates of one target.
        recipe: the adapter's lineage. Its `read` steps name the formats of the source files.
        shape: the shape of the layer's weight, `[out, in, *k]`.
        target: the updates' target, for errors.
        padding: a phrase that says how the layer pads its input. The phrase is empty if the padding is unknown, or if
            the layer pads with zeros and has no dilation.

    Raises:
        Unsupported: no method can compute the same function as the tool at this layer.
    """
    return _by_rules(_rules(recipe, {update.method for update in updates}), updates, LayerFacts(shape, padding), target)


Rule = Callable[["Update", LayerFacts], "Update"]


def _rules(recipe: Sequence[Step], methods: Collection[str]) -> list[Rule]:
    """Return the `at_layer` functions that the source formats define for these methods.

    Skip source files that were read with `compat="formula"`. If an adapter was combined from several sources that
    define different functions, the result is one rule that refuses updates for which the functions differ.
    """
    sources = list(dict.fromkeys(_rules_of(names, methods) for names in _sources(recipe)))
    if len(sources) < 2:
        return list(sources[0]) if sources else []
    return [partial(_if_agreed, sources)]


def _sources(steps: Iterable[Step]) -> Iterator[frozenset[str]]:
    """Yield the formats of the read files, for each adapter from which an adapter was combined."""
    names: set[str] = set()
    combined = False
    for step in steps:
        name = step.args.get("format")
        if step.op == "read" and step.args.get("compat") != FORMULA and isinstance(name, str) and name in FORMATS:
            names.add(name)
        for source in step.sources():
            combined = True
            yield from _sources(source)
    if names or not combined:
        yield frozenset(names)


def _rules_of(names: Collection[str], methods: Collection[str]) -> tuple[Rule, ...]:
    departures = [each for name in sorted(names) for each in FORMATS[name].departures_of(methods).values()]
    return tuple(dict.fromkeys(each.at_layer for each in departures if each.at_layer))


def _if_agreed(sources: Sequence[Sequence[Rule]], update: Update, layer: LayerFacts) -> Update:
    """Rewrite an update by the rules of the source formats, if all formats rewrite it to the same update.

    Raises:
        Unsupported: the formats rewrite the update to different updates.
    """
    results = []
    for rules in sources:
        result = update
        for rule in rules:
            result = rule(result, layer)
        results.append(result)
    first = results[0]
    if any((type(each), each.attributes) != (type(first), first.attributes) for each in results):
        padding = f" with {layer.padding}" if layer.padding else ""
        why = (
            f"{update.method} on a convolution{padding}: the adapter was combined "
            "from adapters of several sources, whose tools compute different functions at this layer"
        )
        cure = 'Inject the adapters one by one, or read them with --compat formula (compat="formula") and combine again'
        raise Unsupported(why, cure=cure)
    return first


def _by_rules(
    rules: Sequence[Rule], updates: Sequence[Update], facts: LayerFacts, target: Target
) -> tuple[Update, ...]:
    try:
        for rule in rules:
            updates = [rule(update, facts) for update in updates]
    except AdapterkitError as error:
        raise error.at(where=str(target)) from None
    return tuple(updates)


def sites_as_trained(
    sites: Iterable[Site], recipe: Sequence[Step], shapes: Mapping[str, tuple[int, ...]]
) -> list[Site]:
    """Rewrite the updates of each site, as `as_trained` does without `padding`. Return all sites.

    Args:
        sites: for each target, its updates and the names of its weight and bias in the base. Sites of stacked weights,
            and sites of only some rows of a weight, stay unchanged.
        recipe: the adapter's lineage.
        shapes: the stored shape of each tensor of the base, by name.

    Raises:
        Unsupported: see `as_trained`.
    """
    result, sites = [], list(sites)
    rules = _rules(recipe, {update.method for site in sites for update in site.updates})
    for site in sites if rules else ():
        plain = not site.target.stacked and site.target.rows is None
        stored = shapes.get(site.weight) if plain and site.weight is not None else None
        shape = None if stored is None else viewed(stored, site.target)
        updates = site.updates if shape is None else _by_rules(rules, site.updates, LayerFacts(shape), site.target)
        same = all(one is other for one, other in zip(updates, site.updates, strict=True))
        result.append(site if same else replace(site, updates=updates))
    return result if rules else sites


# Compute updates of convolutions with zero padding, as in training, even if the layer pads with other values.
#
# PEFT, sd-scripts and LyCORIS build their own convolution, or call `torch.nn.functional.conv2d`. They copy the width of
# the layer's padding, but not its values. So an update that these tools train always gets an input padded with zeros.


def lora_among_zeros(update: Update) -> Update | None:
    """Rewrite a LoRA, GroupedLoRA or GroupedDoRA to pad its input with zeros. Return None for other methods."""
    if isinstance(update, LoRA):
        from ..methods.grouped_lora import GroupedLoRA

        return GroupedLoRA(A=update.A, B=update.B, bias=update.bias, scaling=update.scaling, zero_padded=True)
    return update.replace(zero_padded=True) if isinstance(update, AcrossGroups) else None


def refused(update: Update, layer: LayerFacts, trainer: str) -> Unsupported:
    """Return the error for an update whose training tool computes a function that no method of adapterkit can compute.

    Args:
        update: the update.
        layer: properties of the layer, including its padding.
        trainer: the name of the training tool, for the message.
    """
    why = (
        f"{update.method} on a convolution with {layer.padding}: {trainer} pads the input with zeros in training, "
        "and no change of the weight computes the same function; the paper's formula uses the layer's padding"
    )
    return Unsupported(
        why, cure='To use the paper\'s formula, as merges do, read with --compat formula (compat="formula")'
    )

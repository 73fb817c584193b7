"""Apply departures that depend on the adapted layer: the function that a tool trained at its kernel and padding.

A file of OFT or LoRA does not say whether its layer is a convolution, or how the layer pads its input. The engines know
it, so they call this before they compute. An adapter that was not read from a tool's file, or was read with
`compat="formula"`, means its formula everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import AdapterkitError
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
    """Return the updates as the tools that trained them computed them at one layer.

    Args:
        updates: the updates of one target.
        recipe: the adapter's lineage; it names the formats that the adapter was read from.
        shape: the shape of the layer's weight, `[out, in, *k]`.
        target: the target, for errors.
        padding: how the layer pads its input, if that is known and is not zeros around an undilated kernel.

    Raises:
        Unsupported: no method here computes what the tool computed at this layer.
    """
    return _by_rules(_rules(recipe, {update.method for update in updates}), updates, LayerFacts(shape, padding), target)


Rule = Callable[["Update", LayerFacts], "Update"]


def _rules(recipe: Sequence[Step], methods: Collection[str]) -> list[Rule]:
    """Return the facts about single layers that the source formats of an adapter recorded for these methods."""
    names = {
        str(step.args.get("format"))
        for step in recipe
        if step.op == "read" and step.args.get("compat") != FORMULA and step.args.get("format") in FORMATS
    }
    departures = [each for name in sorted(names) for each in FORMATS[name].departures_of(methods).values()]
    return [each.at_layer for each in departures if each.at_layer]


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
    """Return the sites with their updates as trained, by the shapes of the base's tensors alone.

    Args:
        sites: sites bound to a base; stacked ones and rows of a weight stay as they are.
        recipe: the adapter's lineage.
        shapes: name of a tensor of the base -> its stored shape.

    Raises:
        Unsupported: see `as_trained`.
    """
    found, sites = [], list(sites)
    rules = _rules(recipe, {update.method for site in sites for update in site.updates})
    for site in sites if rules else ():
        plain = not site.target.stacked and site.target.rows is None
        stored = shapes.get(site.weight) if plain and site.weight is not None else None
        shape = None if stored is None else viewed(stored, site.target)
        updates = site.updates if shape is None else _by_rules(rules, site.updates, LayerFacts(shape), site.target)
        same = all(one is other for one, other in zip(updates, site.updates, strict=True))
        found.append(site if same else replace(site, updates=updates))
    return found if rules else sites

"""Tables of many targets: one row a module over its layers, unless --all asks for every target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import click

FEW = 24
"""Targets or tensors that are listed one by one without --all."""

every = click.option("--all", "every", is_flag=True, help="List every target; a row a module above 24 targets.")

HINT = "--all lists every target"


def in_order(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort records by their targets' names, 2 before 10."""
    from ..reporting.grid import natural

    return sorted(records, key=lambda record: natural(record["target"] or ""))


def by_module(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]], dict[str, str]]]:
    """Return modules in the order in which a block computes them: name, records, and the layer of each target."""
    from ..reporting.grid import cells, reading_order

    where = cells(record["target"] or "" for record in records)
    layers = {target: cell.layer for target, cell in where.items()}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(where[record["target"] or ""].module, []).append(record)
    return [(module or "(model)", groups[module], layers) for module in sorted(groups, key=reading_order)]


def ranges(layers: Sequence[str]) -> str:
    """Layers as people write them: `0-21`, `0-3, 8`; those with different parents are counted."""
    if not all(layer.isdecimal() for layer in layers):
        return f"{len(layers):,}"
    runs: list[list[int]] = []
    for number in sorted(map(int, layers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{len(layers):,}: {', '.join(texts[:3])}, ... {texts[-1]}"


def layers_of(group: Sequence[Mapping[str, Any]], layers: Mapping[str, str]) -> str:
    """The layers of a module's records, as `ranges` writes them."""
    named = dict.fromkeys(layers[each["target"] or ""] for each in group)
    return ranges([layer for layer in named if layer])


def largest(group: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    """The record with the largest value of a field, if one is above zero."""
    return max((each for each in group if each[name]), key=lambda each: each[name], default=None)


def together(group: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The norm of several changes together; None if one of them is not known."""
    values = [each[name] for each in group]
    return None if None in values else short(math.hypot(*values))


def short(value: Any) -> Any:
    """A number with four digits that count: more of them only make the table wide."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def span(values: Sequence[Any]) -> Any:
    """One value, or the least and the largest of several: `2-8`."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return min(known) if min(known) == max(known) else f"{min(known)}-{max(known)}"

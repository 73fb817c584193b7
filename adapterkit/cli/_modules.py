"""Tables of many targets: by default one row for each module across all layers, with --all one row for each target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import click

from ._render import number

FEW = 24
"""With more targets or tensors than this, each row is a module, unless --all is typed."""

every = click.option(
    "--all", "every", is_flag=True,
    help="List every target. Without it, more than 24 targets are summarized, one row for each module.",
)  # fmt: skip

HINT = "--all lists every target"


Record = Mapping[str, object]


def in_order(records: Sequence[Record]) -> list[Record]:
    """Sort records by the names of their targets, with numbers in numeric order: 2 before 10."""
    from ..reporting.grid import natural

    return sorted(records, key=lambda record: natural(_target(record)))


def _target(record: Record) -> str:
    return str(record["target"] or "")


def by_module(records: Sequence[Record]) -> list[tuple[str, list[Record], dict[str, str]]]:
    """Group the records of targets by module, in the order in which a transformer block computes its modules.

    Returns:
        (module, its records, target -> layer) for each module.
    """
    from ..reporting.grid import cells, reading_order

    where = cells(_target(record) for record in records)
    layers = {target: cell.layer for target, cell in where.items()}
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(where[_target(record)].module, []).append(record)
    return [(module or "(model)", groups[module], layers) for module in sorted(groups, key=reading_order)]


def ranges(layers: Sequence[str]) -> str:
    """Return layers as ranges, such as `0-21` or `0-3, 8`; only their number if a layer is not a plain number."""
    if not all(layer.isdecimal() for layer in layers):
        return f"{len(layers):,}"
    runs: list[list[int]] = []
    for layer in sorted(map(int, layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    return ", ".join(texts) if len(texts) <= 4 else f"{len(layers):,}: {', '.join(texts[:3])}, ... {texts[-1]}"


def layers_of(group: Sequence[Record], layers: Mapping[str, str]) -> str:
    """Return the layers of a module's records in the form of `ranges`."""
    named = dict.fromkeys(layers[_target(each)] for each in group)
    return ranges([layer for layer in named if layer])


def largest(group: Sequence[Record], name: str) -> Record | None:
    """Return the record with the largest value of a field, or None if no value is above zero."""
    return max((each for each in group if each[name]), key=lambda each: number(each, name), default=None)


def together(group: Sequence[Record], name: str) -> object:
    """Return the root of the sum of the squared norms, which is the total norm; None if one of the norms is unknown."""
    if any(each[name] is None for each in group):
        return None
    return short(math.hypot(*(number(each, name) for each in group)))


def short(value: object) -> object:
    """Round a float to four significant digits, which keeps tables narrow; return other values unchanged."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def span(values: Sequence[object]) -> object:
    """Return the smallest and the largest value as `2-8`, or one value if all are equal; None if all are unknown.

    Args:
        values: numbers, or texts of numbers, or None.
    """
    numbers = [value for value in values if isinstance(value, (int, float))]
    if numbers:
        return min(numbers) if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"
    names = [value for value in values if isinstance(value, str)]
    if not names:
        return None
    return min(names) if min(names) == max(names) else f"{min(names)}-{max(names)}"

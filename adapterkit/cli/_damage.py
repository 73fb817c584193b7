"""What quantizing again did to the changes of a merge, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ._render import counted

MOST_SHOWN = 8
"""Targets whose damage is printed; all are in the record."""


def damage_lines(damage: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """What quantizing again did, target by target, the worst first."""
    worst = sorted(damage, key=lambda name: damage[name]["kept"])
    for name in worst[:MOST_SHOWN]:
        yield f"{name}: error {damage[name]['error']:.3%}, {damage[name]['kept']:.1%} of the change left"
    if worst[MOST_SHOWN:]:
        kept = damage[worst[len(worst) // 2]]["kept"]
        yield f"and {counted(len(worst) - MOST_SHOWN, 'target')} more; in the middle {kept:.1%} of the change is left"

"""The switch of an attached adapter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(eq=False)
class Switch:
    """What all attached parts of one adapter share."""

    name: str
    weight: float
    active: bool = True

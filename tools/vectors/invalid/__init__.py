"""The invalid corpus: inputs that a reader must refuse, each with the class of the error and the place it must name."""

from __future__ import annotations

from collections.abc import Iterator

from invalid.bases import bases
from invalid.case import Invalid
from invalid.containers import containers
from invalid.precedence import precedence
from invalid.records import records


def cases() -> Iterator[Invalid]:
    """All of them."""
    yield from containers()
    yield from records()
    yield from bases()
    yield from precedence()

"""The invalid corpus: inputs that a reader must refuse, each with the class of the error and the place it must name."""

from __future__ import annotations

from collections.abc import Iterator

from vector_invalid_bases import bases
from vector_invalid_case import Invalid
from vector_invalid_containers import containers
from vector_invalid_records import records


def invalid() -> Iterator[Invalid]:
    """All cases."""
    yield from containers()
    yield from records()
    yield from bases()

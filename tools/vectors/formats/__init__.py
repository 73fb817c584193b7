"""Formats whose tools cannot be run here: one module each, whose `samples()` are files from the published layout.

They share nothing with adapterkit: containers are written byte by byte, and what the files say is stated beside them.
Samples of language models' formats are of the base `llama`: 4 heads of 4, 2 of them keys', hidden 16, inner 24.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module

from sample import Sample


def names() -> list[str]:
    """The formats, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def samples() -> Iterator[tuple[str, Sample]]:
    """Every sample, by format and name."""
    for name in names():
        found: dict[str, Sample] = import_module(f"{__name__}.{name}").samples()
        yield from ((f"{name}/{case}", sample) for case, sample in found.items())

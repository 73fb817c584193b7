"""Garbage collection, switched off while many objects are made that live on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_off() -> Iterator[None]:
    """Switch garbage collection off inside the block, if it is on.

    Collecting goes through all objects again and again while they become more. With tens of thousands of targets that
    took a third of the time, and finds nothing: what is made is kept.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

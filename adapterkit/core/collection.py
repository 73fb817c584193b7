"""Switch garbage collection off while many long-lived objects are created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_off() -> Iterator[None]:
    """Switch garbage collection off inside the block, if it is on.

    While the number of objects grows, the collector scans all objects again and again. With tens of thousands of
    targets, the scans took a third of the time and freed no memory, because all new objects stay in use.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

"""Switch garbage collection off while many long-lived objects are created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_off() -> Iterator[None]:
    """Switch garbage collection off inside the block, if it is on.

    The collector scans all objects again and again while their number grows. With tens of thousands of targets, the
    scans took a third of the time. They freed nothing, because all new objects are kept.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

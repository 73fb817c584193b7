"""Report progress: `stage` reports that a step begins, and `detail` explains a result.

Both functions log to `logging.getLogger("adapterkit")`: `stage` at the level INFO, `detail` at DEBUG. adapterkit itself
installs no handler. The command line shows steps that take over two seconds; with -v, it shows all steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOGGER = "adapterkit"


class _Steps:
    """The progress of some work: the total number of steps, the number that have begun, and the latest step's text."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.last = total, 0, ""

    def numbered(self, text: str) -> str:
        """Return a step's text with the step's number in front.

        If the previous step had the same text, the step gets the number of the previous step.
        """
        if text != self.last:
            self.begun, self.last = min(self.begun + 1, self.total), text
        return f"step {self.begun} of {self.total}, {text}"


_steps: ContextVar[_Steps | None] = ContextVar("steps", default=None)


@contextmanager
def steps(total: int) -> Iterator[None]:
    """Add a number such as `step 2 of 5` to each step that is reported in the block.

    If blocks are nested, the steps of the inner block count as steps of the outer block, and the inner block's total is
    ignored.

    Args:
        total: the number of steps that the block reports, which is the 5 in `step 2 of 5`.
    """
    if _steps.get() is not None:
        yield
        return
    token = _steps.set(_Steps(total))
    try:
        yield
    finally:
        _steps.reset(token)


def stage(text: str) -> None:
    """Report that a step begins, such as `tracing the model`."""
    among = _steps.get()
    _log(20, text if among is None else among.numbered(text))


def detail(text: str) -> None:
    """Report a detail that explains a result, such as the files that were opened."""
    _log(10, text)


def _log(level: int, text: str) -> None:
    logging = sys.modules.get("logging")
    # Do not import logging here, because the import takes 5 ms. If no other code imported logging, no handler exists.
    if logging is not None:
        logging.getLogger(LOGGER).log(level, "%s", text)

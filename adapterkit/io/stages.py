"""Report progress: `stage` for a step that may take long, `detail` for a fact that explains a result.

Both write records to the standard logger `adapterkit`, at the levels INFO and DEBUG. The library installs no handler.
The command line shows a stage that takes over two seconds, and shows all stages with -v.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

LOGGER = "adapterkit"


class _Steps:
    """The progress of some work: the number of its steps, the number that began, and the text of the last step."""

    def __init__(self, total: int) -> None:
        self.total, self.begun, self.last = total, 0, ""

    def numbered(self, text: str) -> str:
        """Return a step's text with its number; the same step again keeps its number."""
        if text != self.last:
            self.begun, self.last = min(self.begun + 1, self.total), text
        return f"step {self.begun} of {self.total}, {text}"


_steps: ContextVar[_Steps | None] = ContextVar("steps", default=None)


@contextmanager
def steps(total: int) -> Iterator[None]:
    """Number the steps that begin in the block.

    Steps of a nested block count as steps of the outer block, and the nested block's own total is ignored.

    Args:
        total: the number of steps.
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
    """Report a fact that explains a result, such as which files were opened."""
    _log(10, text)


def _log(level: int, text: str) -> None:
    logging = sys.modules.get("logging")
    if logging is not None:  # Skip if logging was never imported: then there is no handler, and the import takes 5 ms.
        logging.getLogger(LOGGER).log(level, "%s", text)

"""Say what is done now, to whoever listens: `stage` for a step that may take long, `detail` for what explains it.

Both are records of the standard logger `adapterkit`: INFO and DEBUG. The library installs no handler; the command line
shows a stage that takes over two seconds, and all of them with -v.
"""

from __future__ import annotations

import sys

LOGGER = "adapterkit"


def stage(text: str) -> None:
    """Tell that a step begins, such as `tracing the model`."""
    _log(20, text)


def detail(text: str) -> None:
    """Tell a fact that explains a result, such as which files were opened."""
    _log(10, text)


def _log(level: int, text: str) -> None:
    logging = sys.modules.get("logging")
    if logging is not None:  # Nobody listens who has not imported it, and importing takes 5 ms.
        logging.getLogger(LOGGER).log(level, "%s", text)

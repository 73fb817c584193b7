"""Report progress: `stage` for a step that may take long, `detail` for a fact that explains a result.

Both write records to the standard logger `adapterkit`, at the levels INFO and DEBUG. The library installs no handler.
The command line shows a stage that takes over two seconds, and shows all stages with -v.
"""

from __future__ import annotations

import sys

LOGGER = "adapterkit"


def stage(text: str) -> None:
    """Report that a step begins, such as `tracing the model`."""
    _log(20, text)


def detail(text: str) -> None:
    """Report a fact that explains a result, such as which files were opened."""
    _log(10, text)


def _log(level: int, text: str) -> None:
    logging = sys.modules.get("logging")
    if logging is not None:  # Skip if logging was never imported: nobody listens, and importing it takes 5 ms.
        logging.getLogger(LOGGER).log(level, "%s", text)

"""Where what comes from hubs, or is on its way to one, lies in the meantime."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ADAPTERKIT_CACHE`, or `adapterkit` in the user's cache folder."""
    root = os.environ.get("ADAPTERKIT_CACHE")
    if root is None:
        root = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "adapterkit")
    return Path(root)

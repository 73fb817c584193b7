"""Adapters in live torch models: `inject` attaches one, `create` makes one to train, `route` picks one a row.

`compose` makes one adapter of several.

This package is `adapterkit.torch`; `import torch` inside it is torch itself.
"""

from __future__ import annotations

from . import compose
from .create import create
from .handle import Handle, handles
from .inject import inject
from .routing import route

__all__ = ["Handle", "compose", "create", "handles", "inject", "route"]

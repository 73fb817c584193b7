"""Methods that combine adapters: one module each, found by its file name. `COMBINERS["ties"]` is the class `TIES`."""

from __future__ import annotations

from ...core.registry import Registry
from ._method import Method

COMBINERS: Registry[type[Method]] = Registry("way to combine", __name__, "adapterkit.combiners", Method)

"""Methods that combine adapters, one per module: `COMBINERS["ties"]` is the class `TIES` in `ties.py`."""

from __future__ import annotations

from ...core.registry import Registry
from ._combiner import Combiner

COMBINERS: Registry[type[Combiner]] = Registry("way to combine", __name__, "adapterkit.combiners", Combiner)

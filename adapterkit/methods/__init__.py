"""Adapter methods, one per module: `METHODS["lora"]` is the class `LoRA` in `lora.py`."""

from __future__ import annotations

from ..core.registry import Registry
from ..core.updates import Update

METHODS: Registry[type[Update]] = Registry("method", __name__, "adapterkit.methods", Update)

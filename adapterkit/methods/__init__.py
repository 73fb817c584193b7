"""The methods: one module each, found by its file name. `METHODS["lora"]` is the class `LoRA`."""

from __future__ import annotations

from ..registry import Registry
from ..updates import Update

METHODS: Registry[type[Update]] = Registry("method", __name__, "adapterkit.methods", Update)

"""The methods, one module each. The file name is the key: `METHODS["lora"]` is the class `LoRA`."""

from __future__ import annotations

from ..core.registry import Registry
from ..core.updates import Update

METHODS: Registry[type[Update]] = Registry("method", __name__, "adapterkit.methods", Update)

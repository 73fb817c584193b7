"""Adapters in live torch models: `inject` attaches one, `create` makes one to train, `route` picks one a row.

`compose` makes one adapter of several. `LoRAFA` trains the B of a LoRA alone. `TrainerCallback` makes transformers'
Trainer save and resume an adapter.

This package is `adapterkit.torch`; `import torch` inside it is torch itself.
"""

from __future__ import annotations

from . import compose
from .create import create
from .handle import Handle, handles
from .inject import inject
from .lora_fa import LoRAFA
from .routing import route
from .trainers import TrainerCallback

__all__ = ["Handle", "LoRAFA", "TrainerCallback", "compose", "create", "handles", "inject", "route"]

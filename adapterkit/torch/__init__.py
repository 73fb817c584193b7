"""Adapters in live torch models: `inject` attaches an adapter, `create` makes a new one, `route` picks one per row.

`compose` combines several adapters into one. `LoRAFA` is an optimizer that trains only the matrix `B` of a LoRA.
`TrainerCallback` makes transformers' Trainer save and resume an adapter.

This package is `adapterkit.torch`; `import torch` inside it imports PyTorch.
"""

from __future__ import annotations

from . import compose
from .create import create
from .handle import Handle, handles
from .inject import inject
from .routing import route
from .training import LoRAFA, TrainerCallback

__all__ = ["Handle", "LoRAFA", "TrainerCallback", "compose", "create", "handles", "inject", "route"]

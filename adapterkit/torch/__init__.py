"""Attach adapters to live torch models, train them, and switch between them.

`inject` attaches an adapter, `create` makes a new one, and `route` chooses an adapter for each row of a batch.
`compose` combines several adapters into one. `LoRAFA` is an optimizer that trains only the matrix `B` of a LoRA.
`TrainerCallback` makes transformers' Trainer save and resume an adapter.

Inside this package, `import torch` imports PyTorch, not `adapterkit.torch`.
"""

from __future__ import annotations

from . import compose
from .create import create
from .handle import Handle, handles
from .inject import inject
from .routing import route
from .training import LoRAFA, TrainerCallback

__all__ = ["Handle", "LoRAFA", "TrainerCallback", "compose", "create", "handles", "inject", "route"]

"""Attach adapters to live torch models, train them, and switch between them.

`create` returns a new adapter, `inject` attaches an adapter, and `route` chooses an adapter for each row of a batch.
The functions of `compose` combine several adapters. `LoRAFA` is an optimizer that trains only the matrix `B` of a LoRA.
With `TrainerCallback`, transformers' Trainer saves the adapter instead of the base, and loads it when training resumes.

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

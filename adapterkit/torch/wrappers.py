"""Convert between a module's name in the base and its name under wrappers.

torch.compile, DDP, FSDP1, checkpoint wrappers, PEFT and sentence-transformers add their own modules to the path of a
module. Adapters are written with the base's own names, and are matched to the names with wrappers.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..core.adapter import Adapter

_ALWAYS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""The attributes that only wrappers of torch have."""

_PARALLEL = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "AveragedModel")
"""The classes whose `module` is the model."""

_LIBRARIES = {
    "composer": ("model",),
    "ema_pytorch": ("ema_model", "online_model"),
    "lightning": ("_forward_module", "_original_module"),  # Fabric's.
    "lightning_fabric": ("_forward_module", "_original_module"),
    "peft": ("base_model", "model", "base_layer"),
    "sentence_transformers": ("auto_model", "model", "0"),  # `model` since its version 5.
    "trl": ("pretrained_model",),  # Models with a value head.
}
"""A map from each library to the attributes of its modules that hold the wrapped module."""


def unwrapped(model: nn.Module, path: str) -> str:
    """Return the dotted path of a module or parameter without wrappers.

    Args:
        model: the model that the path starts at.
        path: the path, as in `named_modules()` or `named_parameters()`.
    """
    kept: list[str] = []
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        if module is None or not _wraps(module, name):
            kept.append(name)
        module = module._modules.get(name) if module is not None else None  # None if the name is a parameter's.
    return ".".join(kept)


def wrapped(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return the adapter with its targets under the model's current names, including wrappers."""
    renamed = {}
    for path, module in model.named_modules(remove_duplicate=False):
        plain = unwrapped(model, path)
        if plain != path:
            renamed[plain] = path  # The innermost of several modules with this name comes last, and counts.
            renamed |= {f"{plain}.{name}".lstrip("."): f"{path}.{name}" for name in module._parameters}
    renamed.pop("", None)
    if not any(target.path in renamed for target in adapter.updates):
        return adapter
    updates = {replace(t, path=renamed.get(t.path, t.path)): found for t, found in adapter.updates.items()}
    return adapter.replace(updates=updates)


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether a child is the module that its parent wraps."""
    if name in _ALWAYS:
        return True
    kinds = type(module).__mro__
    if name == "module" and any(kind.__name__ in _PARALLEL for kind in kinds):
        return True
    libraries = {kind.__module__.partition(".")[0] for kind in kinds}
    return any(library in libraries and name in names for library, names in _LIBRARIES.items())

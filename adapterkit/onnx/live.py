"""Put adapters on live torch models while they are traced or run; the models are unchanged afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter

if TYPE_CHECKING:
    from torch import nn


def attached(model: nn.Module, adapters: Mapping[str, Adapter], mode: str) -> AbstractContextManager[Any]:
    """Return a context in which the live model is in the form to trace."""
    if mode == "merged":
        return _merged(model, adapters)
    return injected(model, adapters if mode == "attached" else {})


@contextmanager
def injected(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[list[Any]]:
    """Inject adapters into the live model for the block."""
    from ..torch import inject

    handles: list[Any] = []
    try:
        for name, adapter in adapters.items():
            handles.append(inject(model, adapter, name=f"export {name}"))
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _merged(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Merge adapters into the live model's parameters for the block; the original tensors are put back unchanged."""
    from ..torch.handle import changes

    with injected(model, adapters) as handles:
        changed = changes(handles) if handles else []
    # Swap `data` and keep the parameters themselves, so that ties between them survive.
    before = [parameter.data for parameter, _ in changed]
    try:
        for parameter, value in changed:
            parameter.data = value.to(parameter.dtype)
        yield
    finally:
        for (parameter, _), own in zip(changed, before, strict=True):
            parameter.data = own

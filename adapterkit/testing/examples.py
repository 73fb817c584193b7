"""Create updates with random numbers; the shapes come from the shape strings of the method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..core.adapter import Adapter, Target
from ..errors import Unsupported
from ..methods import METHODS

if TYPE_CHECKING:
    from ..core.updates import Update


def example(method: str, *, out: int = 8, inputs: int = 16, rank: int = 2, seed: int = 0, **attributes: Any) -> Update:
    """Return an update of a linear layer with random numbers in all trained tensors.

    The method's `initial` creates the update. Then random numbers are added to its trained tensors, because a new
    update changes nothing.

    Args:
        method: the name of the method.
        out: the number of the layer's outputs.
        inputs: the number of the layer's inputs.
        rank: the rank of factors.
        seed: the seed of the random numbers.
        attributes: values of the method's attributes.

    Returns:
        The update, with tensors in float32 on the CPU.

    Raises:
        Unsupported: the method has no `initial`; tests of such a method must provide an update.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cls: Any = METHODS[method]
    if not hasattr(cls, "initial"):
        raise Unsupported(f"{method} has no `initial`", cure="Define `update` in the test class")
    W, b = random((out, inputs)), random((out,))
    update: Update = cls.initial(W, b, rank, random, **attributes)
    moved = {
        name: leaf.float() + 0.2 * random(tuple(leaf.shape))
        for name, leaf in update.tensors.items()
        if name not in update.frozen and torch.is_tensor(leaf) and leaf.is_floating_point()
    }
    return update.replace(**moved)


def adapter_of(update: Update, *paths: str) -> Adapter:
    """Return an adapter with the same update at each of the targets."""
    return Adapter({Target(path): (update,) for path in paths})

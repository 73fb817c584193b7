"""Dropout in training: an update's change sees an input of which some numbers are 0, as in PEFT's layers.

y = layer(x) + change(dropout(x)): the base sees the whole input. PEFT calls it `lora_dropout`, `vera_dropout` and so
on. Each update draws once a forward, from torch's global generator, after the base has run: with one seed the losses
are PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..adapter import Adapter
from ..chain import Composed
from ..errors import Unsupported, UsageError
from ..updates import Additive, Update
from .layers import Difference, Layer


def check_dropout(dropout: float, cls: type[Update], method: str) -> None:
    """Check a probability, and that a method's change has an input that can be dropped.

    Raises:
        UsageError: it is not between 0 and 1.
        Unsupported: the method changes outputs or context.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be at least 0 and below 1, got {dropout}", cure="Pass a probability")
    if dropout and cls.kind not in ("additive", "weight"):
        raise Unsupported(f"{method} has no dropout", where="dropout", cure="Leave dropout out")


def dropout_of(adapter: Adapter) -> float:
    """The dropout that an adapter was created with, 0 without one."""
    told = [step.args.get("dropout", 0.0) for step in adapter.recipe if step.op == "create"]
    return float(told[-1]) if told else 0.0


def dropped_change(
    layer: Layer, updates: Sequence[Update], x: Tensor, p: float, live: Callable[[Update], Update]
) -> Any:
    """The changes of updates in order, each over an input of its own with some numbers dropped; without the base.

    Args:
        layer: the layer without them.
        updates: in order of application. One that is not trained at all sees the whole input.
        x: the layer's input; token numbers are not dropped.
        p: the probability that a number is 0; the others are divided by 1 - p.
        live: puts an update on the layer's device and into its dtype.
    """
    change: Any = 0.0
    seen: Any = layer
    for update in map(live, updates):
        whole = p == 0 or set(update.tensors) <= update.frozen or not x.is_floating_point()
        some = x if whole else functional.dropout(x, p)
        if isinstance(update, Additive):
            change = change + update.forward(some, Difference(layer))
        else:
            W, b = seen.weight, seen.bias
            change = change + layer.op(some, update.new_weight(W) - W)
            if b is not None:
                settled = update.settled(W) if update.bias_sees_weight else update
                change = change + layer.per_channel(settled.new_bias(b) - b)
        seen = Composed(seen, update)
    return change

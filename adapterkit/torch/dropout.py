"""Apply dropout in training as PEFT does; each method's class names its kind of dropout (`Update.dropout`).

* `input`: y = layer(x) + change(dropout(x)); the base gets the input without dropout. PEFT: `lora_dropout`,
`vera_dropout` ...
* `rows`, `scaled rows`: whole rows of the change are 0. PEFT: `rank_dropout` of LoHa and LoKr.
* `blocks`: some rotations are the identity. PEFT: `module_dropout` of OFT and `boft_dropout`.

Each update draws from torch's global generator after the base has run, and draws the numbers that PEFT draws there. So
with the same seed the losses equal PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..core.adapter import Adapter
from ..core.composed_layer import Composed
from ..core.updates import Additive, Update
from ..errors import Unsupported, UsageError
from ..formats.peft.spelling import DROPOUTS
from .layers import Layer, WeightDifference

if TYPE_CHECKING:
    from ..core.updates.layer import Layer as FormulaLayer


def check_dropout(dropout: float, cls: type[Update], method: str) -> None:
    """Check that the dropout is a probability and that the method supports dropout.

    Raises:
        UsageError: the dropout is below 0, or not below 1.
        Unsupported: the method changes outputs or context, which have no dropout.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be at least 0 and below 1, got {dropout}", cure="Pass a probability")
    if dropout and cls.kind not in ("additive", "weight"):
        raise Unsupported(f"{method} has no dropout", where="dropout", cure="Leave dropout= out")


def dropout_of(adapter: Adapter) -> float:
    """Return the dropout that an adapter was created with, or trained with in PEFT; 0 if neither is recorded."""
    told = [step.args.get("dropout", 0.0) for step in adapter.recipe if step.op == "create"]
    held = adapter.foreign.data.get("config") if adapter.foreign is not None else None
    config = held if isinstance(held, dict) else {}
    told += [config[name] for name in DROPOUTS if isinstance(config.get(name), float | int)]
    return float(told[-1]) if told else 0.0


def dropped_change(
    layer: Layer, updates: Sequence[Update], x: Tensor, p: float, live: Callable[[Update], Update]
) -> Tensor | float:
    """Return the sum of the changes of updates, without the base; each change has its own dropout of the input.

    Args:
        layer: the layer without the updates.
        updates: the updates, in order of application. An update without trained tensors gets the input without dropout.
        x: the layer's input; token ids are not dropped.
        p: the probability that an input element is set to 0; the other elements are divided by 1 - p.
        live: a function that moves an update to the layer's device and dtype.
    """
    change: Tensor | float = 0.0
    seen: Any = layer
    for update in map(live, updates):
        whole = p == 0 or set(update.tensors) <= update.frozen or not x.is_floating_point()
        some = functional.dropout(x, p) if not whole and update.dropout == "input" else x
        kept = _without_blocks(update, p) if not whole and update.dropout == "blocks" else update
        if isinstance(update, Additive):
            added = kept.forward(some, cast("FormulaLayer", WeightDifference(layer)))
        else:
            W, b = seen.weight, seen.bias
            added = layer.op(some, kept.new_weight(W) - W)
            if b is not None:
                settled = kept.settled(W) if kept.bias_sees_weight else kept
                added = added + layer.per_channel(settled.new_bias(b) - b)
        if not whole and update.dropout.endswith("rows"):
            added = added * layer.per_channel(_rows(len(layer.weight), p, update.dropout == "scaled rows").to(x))
        change = change + added
        seen = Composed(seen, update)
    return change


def _rows(count: int, p: float, scaled: bool) -> Tensor:
    """Return 1 for each row that is kept, as PEFT's LoHa and LoKr draw them.

    Draw and discard one number first, as each of PEFT's layers does.
    """
    torch.rand(1)
    kept = (torch.rand(count) > p).float()
    return kept / kept.mean() if scaled else kept


def _without_blocks(update: Update, p: float) -> Update:
    """Return the update with a share p of its rotations replaced by the identity, drawn as in PEFT's OFT and BOFT.

    A block of zeros has the identity as its rotation.
    """
    changed = {}
    held: Any = update.tensors
    for name, leaf in held.items():
        axes = update.tensor_fields()[name].metadata["axes"]
        blocks, factors = axes.index("n"), axes.index("m")
        if blocks is None or (factors is None and leaf.shape[blocks] == 1):
            continue  # A single block that all rotations share is always kept.
        factor = None if factors is None else int(torch.randint(0, leaf.shape[factors], (1,)))
        count = leaf.shape[blocks]
        dropped = torch.arange(count) < int(p * count)
        mask = (~dropped[torch.randperm(count)]).to(leaf)
        mask = mask.reshape(-1, *[1] * (len(leaf.shape) - blocks - 1))
        if factor is not None:
            mask = torch.where(torch.arange(leaf.shape[0]).reshape(-1, *[1] * mask.ndim) == factor, mask, 1.0).to(leaf)
        changed[name] = leaf * mask
    return update.replace(**changed)

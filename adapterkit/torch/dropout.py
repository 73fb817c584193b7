"""Dropout in training, as PEFT has it for each method; the method's class says which kind (`Update.dropout`).

* `input`: y = layer(x) + change(dropout(x)); the base sees the whole input. PEFT: `lora_dropout`, `vera_dropout` ...
* `rows`, `scaled rows`: whole rows of the change are 0. PEFT: `rank_dropout` of LoHa and LoKr.
* `blocks`: some rotations are the identity. PEFT: `module_dropout` of OFT and `boft_dropout`.

Each update draws from torch's global generator after the base has run, what PEFT draws in its place: with one seed the
losses are PEFT's.
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
from ..formats.peft.compose import DROPOUTS
from .layers import Layer, WeightDifference

if TYPE_CHECKING:
    from ..core.updates.layer import Layer as FormulaLayer


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
    """The dropout that an adapter was created with, or trained with in PEFT; 0 without either."""
    told = [step.args.get("dropout", 0.0) for step in adapter.recipe if step.op == "create"]
    held = adapter.foreign.data.get("config") if adapter.foreign is not None else None
    config = held if isinstance(held, dict) else {}
    told += [config[name] for name in DROPOUTS if isinstance(config.get(name), float | int)]
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
    """1 for rows that are kept, as PEFT's LoHa and LoKr draw them; each of their layers draws one number before."""
    torch.rand(1)
    kept = (torch.rand(count) > p).float()
    return kept / kept.mean() if scaled else kept


def _without_blocks(update: Update, p: float) -> Update:
    """The update with a share p of its rotations being none, as PEFT's OFT and BOFT draw them.

    Blocks that are 0 have the identity as their rotation.
    """
    changed = {}
    held: Any = update.tensors
    for name, leaf in held.items():
        axes = update.tensor_fields()[name].metadata["axes"]
        blocks, factors = axes.index("n"), axes.index("m")
        if blocks is None or (factors is None and leaf.shape[blocks] == 1):
            continue  # One block that all share is kept.
        factor = None if factors is None else int(torch.randint(0, leaf.shape[factors], (1,)))
        count = leaf.shape[blocks]
        dropped = torch.arange(count) < int(p * count)
        mask = (~dropped[torch.randperm(count)]).to(leaf)
        mask = mask.reshape(-1, *[1] * (len(leaf.shape) - blocks - 1))
        if factor is not None:
            mask = torch.where(torch.arange(leaf.shape[0]).reshape(-1, *[1] * mask.ndim) == factor, mask, 1.0).to(leaf)
        changed[name] = leaf * mask
    return update.replace(**changed)

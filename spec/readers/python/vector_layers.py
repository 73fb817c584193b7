"""The layers that vectors describe by shapes (README, section 16), as torch modules that an adapter is attached to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Arrays = Mapping[str, Tensor]


class Stored(nn.Module):
    """A layer of any layout, with the weight as the base stores it."""

    def __init__(self, layout: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.layout, self.weight = layout, nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        W, b = self.weight, self.bias
        if not x.is_floating_point():
            y = functional.embedding(x, W if self.layout == "in out *k" else W.mT)
            return y if b is None else y + b
        if self.layout.startswith("e "):
            y = x * W[:, None] if W.ndim == 2 else x @ (W.mT if self.layout == "e out *in" else W)
            return y if b is None else y + b[:, None]
        if W.ndim == 1:
            return x * W if b is None else x * W + b
        if self.layout == "in out *k":
            turned = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
            return functional.linear(x, W.T, b) if W.ndim == 2 else turned[W.ndim - 3](x, W, b)
        if W.ndim == 2:
            return functional.linear(x, W, b)
        groups = x.shape[1] // W.shape[1]
        return (functional.conv1d, functional.conv2d, functional.conv3d)[W.ndim - 3](x, W, b, groups=groups)


class ChannelNorm(nn.LayerNorm):
    """A layer norm over axis 1, the channels of a convolution."""

    def forward(self, y: Tensor) -> Tensor:
        turned: Tensor = super().forward(y.movedim(1, -1))
        return turned.movedim(-1, 1)


class Closing(nn.Module):
    """A layer that adds its second input, and normalises the sum itself."""

    def __init__(self, dense: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.dense, self.end_norm = dense, norm

    # The residual is found by this name, as in transformers' modules.
    def forward(self, hidden: Tensor, input_tensor: Tensor) -> Tensor:
        total = self.dense(hidden) + input_tensor
        return total if self.end_norm is None else self.end_norm(total)


class Block(nn.Module):
    """A block that adds what its first module reads to what its second gives, and normalises the sum."""

    def __init__(self, dense: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.first, self.dense, self.last = nn.Identity(), dense, norm

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        self.first(residual)
        total = self.dense(x) + residual
        return total if self.last is None else self.last(total)


class Model(nn.Module):
    """A model whose call brings more than its one layer reads."""

    def __init__(self, layer: nn.Module, states: Tensor | None) -> None:
        super().__init__()
        self.m, self.states = layer, states

    def forward(
        self, *inputs: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False, **_: Any
    ) -> Any:
        y = self.m(*inputs)
        return SimpleNamespace(hidden_states=(self.states,)) if output_hidden_states else y


def suits(x: Tensor, W: Tensor, b: Tensor | None, layout: str) -> bool:
    """Whether an input suits a layer: the table of section 16, row by row."""
    stacked = layout.startswith("e ")
    sizes = [int(size) for size in W.shape]
    if "in out" in layout and len(sizes) > 1 + stacked:
        sizes[stacked], sizes[1 + stacked] = sizes[1 + stacked], sizes[stacked]
    if len(sizes) <= stacked:
        return False
    lead, (out, *inner) = sizes[:stacked], sizes[stacked:]
    if b is not None and list(b.shape) != [*lead, out]:
        return False
    if stacked:
        wanted = [*lead, (inner or [out])[0]]
        return x.is_floating_point() and len(inner) < 2 and x.ndim == 3 and [x.shape[0], x.shape[2]] == wanted
    if not x.is_floating_point():
        return whole(x) and len(inner) == 1 and bool(((x >= 0) & (x.long() < inner[0])).all())
    if len(inner) < 2:
        return x.ndim > 0 and x.shape[-1] == (inner or [out])[0]
    ins, *kernel = inner
    if x.ndim != len(sizes) or 0 in (*sizes, *x.shape):
        return False
    if layout == "in out *k":
        return x.shape[1] == ins
    groups, left = divmod(x.shape[1], ins)
    return not left and out % groups == 0 and all(n >= k for n, k in zip(x.shape[2:], kernel, strict=True))


def layer_shape(layout: str, held: Arrays) -> torch.Size:
    """The shape of a layer's output, for an input that suits it."""
    held = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    with torch.no_grad():
        x = held["x"].long() if whole(held["x"]) else held["x"]
        shape: torch.Size = plain_layer(layout, held)(x).shape
    return shape


def convolves(layout: str, W: Tensor) -> bool:
    """Whether a layer is a convolution, whose channels are axis 1."""
    return W.ndim - layout.startswith("e ") > 2


def whole(x: Tensor) -> bool:
    """Whether a tensor is of a whole type."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def suited(held: Arrays, layout: str, hidden: int | None) -> dict[str, Tensor]:
    """The tensors of a path without the inputs that do not suit, which count as absent.

    Args:
        held: the tensors, by name.
        layout: of the path's first target.
        hidden: the channels of `hidden_states` that the updates read, if they do.
    """
    kept = dict(held)
    x, W = held.get("x"), held.get("weight")
    if x is None or W is None or not suits(x, W, held.get("bias"), layout):
        return {name: value for name, value in held.items() if name in ("weight", "bias")}
    shape = layer_shape(layout, held)
    channels = shape[1:2] if convolves(layout, W) else shape[-1:]
    tokens = x.shape[:2] if x.ndim == 3 else None
    fits: dict[str, Callable[[Tensor], bool]] = {
        "added": lambda t: t.is_floating_point() and t.shape == shape,
        "norm_weight": lambda t: t.is_floating_point() and t.shape == channels,
        "norm_bias": lambda t: t.is_floating_point() and t.shape == channels,
        "call.input_ids": lambda t: whole(t) and t.ndim == 2 and x.ndim == 3 and len(t) == len(x),
        "call.task_ids": lambda t: whole(t) and t.shape == x.shape[:1],
        "call.hidden_states": lambda t: t.is_floating_point() and tokens is not None and t.shape == (*tokens, hidden),
        "call.shadow": lambda t: t.is_floating_point() and t.shape == x.shape,
        "call.mask": lambda t: not t.is_complex() and t.shape == shape[:-1],
    }
    for name in held.keys() & fits.keys():
        if not fits[name](held[name]):
            del kept[name]
    if not kept.keys() >= {"added", "norm_weight", "norm_bias"}:
        kept = {name: value for name, value in kept.items() if not name.startswith("norm_")}
    return kept


def plain_layer(layout: str, held: Arrays) -> nn.Module:
    """The layer of a vector's weight and input: one of torch's own where it has one, as methods of outputs expect."""
    W, b, x = held["weight"], held.get("bias"), held["x"]
    made: nn.Module
    if whole(x):
        plain = b is None and layout == "in out *k"
        return nn.Embedding(W.shape[0], W.shape[1], _weight=W) if plain else Stored(layout, W, b)
    if layout == "in out *k" and W.ndim == 2:
        from transformers import pytorch_utils

        turned: Any = pytorch_utils.Conv1D
        made = turned(W.shape[1], W.shape[0]).double()
        made.load_state_dict({"weight": W, "bias": W.new_zeros(W.shape[1]) if b is None else b})
        return made
    if layout != "out *in" or W.ndim < 2:
        return Stored(layout, W, b)
    if W.ndim == 2:
        made = nn.Linear(W.shape[1], W.shape[0], bias=b is not None)
    else:
        kinds: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        groups = x.shape[1] // W.shape[1]
        made = kinds[W.ndim - 3](x.shape[1], W.shape[0], W.shape[2:], groups=groups, bias=b is not None)
    made.double().load_state_dict({"weight": W} if b is None else {"weight": W, "bias": b})
    return made


def layer_and_path(layout: str, held: Arrays, residual: str) -> tuple[Model, str]:
    """A model around a vector's layer, and the path of the target in it.

    Args:
        layout: the target's.
        held: the arrays of the vector at the target, by name.
        residual: what the update says of its residual: empty where the target itself adds it.
    """
    layer, path = plain_layer(layout, held), "m"
    if "added" in held:
        norm = None
        if "norm_weight" in held:
            norm = (ChannelNorm if convolves(layout, held["weight"]) else nn.LayerNorm)(
                len(held["norm_weight"]), dtype=torch.float64
            )
            norm.load_state_dict({"weight": held["norm_weight"], "bias": held["norm_bias"]})
        layer, path = (Block(layer, norm), "m.dense") if residual else (Closing(layer, norm), "m")
    return Model(layer, held.get("call.hidden_states")), path

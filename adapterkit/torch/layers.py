"""Layers: objects that give a method's forward formula access to one module.

`layer(x)` runs the module. `layer.op(x, w)` runs the module's operation with the weight `w` and no bias; stride,
padding and other settings stay the same. `layer.mix(h, w)` is a 1x1 convolution over the output's channels.
`layer.per_channel(v)` reshapes a vector so that it can be added to the output. Formulas always get weights as
`[out, in, *k]`, even if the module stores its weight in another axis order. Formulas of output updates use further
methods of a layer: `OutputUpdate` documents these methods, and parts.py implements them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.adapter import Adapter
from ..core.metadata import dropouts_of
from ..core.updates import Additive, Composed, Update
from ..errors import USE_ITS_BASE, ShapeMismatch, Unsupported, UsageError
from .leaves import casts_layerwise

if TYPE_CHECKING:
    from ..core.updates.update import Layer as FormulaLayer
    from ..io.lazy import Leaf

Forward = Callable[..., Tensor]


class TorchLayer:
    """A wrapper of a module. Its method `op` runs the module's operation with another weight.

    Each subclass wraps one kind of module.

    Attributes:
        layout: the axis order in which the module stores its weight, as in `Target`.
        channel: the axis of the output's channels.
        direct: whether methods' formulas can run on the layer. If not, the module's own forward runs with a changed
            weight.
        flat: whether `op` and `mix` are matrix products over the last axis.
        fresh: whether a call returns a new tensor, which no other code refers to.
        narrowed: whether torch's autocast runs this kind of layer in 16 bits.
    """

    direct: ClassVar[bool] = True
    flat: ClassVar[bool] = False
    fresh: ClassVar[bool] = False
    narrowed: ClassVar[bool] = True
    layout: ClassVar[str] = "out *in"
    channel: ClassVar[int] = -1

    def __init__(self, module: nn.Module, forward: Forward) -> None:
        self.module, self.forward = module, forward

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def like(self, x: Tensor) -> TorchLayer:
        """Return the layer itself or, for a packed weight, a layer that dequantizes the weight to x's dtype."""
        return self

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        """Whether this subclass can be used for a module.

        Subclasses for torch's layers also require that the module's class does not override torch's forward.
        """
        raise AssertionError("each kind of layer defines `takes`")

    @property
    def weight(self) -> Tensor:
        W: Any = self.module.weight
        return self.viewed(lasting(self.module, W))

    def viewed(self, stored: Tensor) -> Tensor:
        """Return a stored weight as a view `[out, in, *k]`."""
        return stored.mT if self.layout == "in out *k" else stored

    @property
    def sample(self) -> Tensor:
        """A tensor with the dtype and device to compute with."""
        return self.weight

    @property
    def bias(self) -> Tensor | None:
        b: Tensor | None = getattr(self.module, "bias", None)
        return None if b is None else lasting(self.module, b)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        return functional.linear(x, w)

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        """Apply the operation with the weight `w`, like `op`, but with zero padding, no dilation and no groups."""
        return self.op(x, w)

    @property
    def padding(self) -> str:
        """The padding and dilation that make the outputs of `op` and `zero_padded` differ, as text.

        The text is empty if the outputs are equal. It is also empty for a zero-padded, dilated layer that PEFT cannot
        train; `ConvLayer.padding` gives the reason.
        """
        return ""

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        return functional.linear(h, w)

    def per_channel(self, v: Tensor) -> Tensor:
        return v


def lasting(module: nn.Module, W: Tensor) -> Tensor:
    """Return a module's parameter as a tensor that keeps its values until the backward pass.

    diffusers' layerwise casting replaces the parameter's data by 8-bit values after the forward. A view of the
    parameter keeps the values of the forward.
    """
    return W.view_as(W) if "_diffusers_hook" in module.__dict__ and casts_layerwise(module) else W


class Linear(TorchLayer):
    """`nn.Linear`."""

    flat = True
    fresh = True

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and _defines_forward(module, nn.Linear)


class Conv1D(TorchLayer):
    """transformers' `Conv1D`: a linear layer that stores its weight as `[in, out]`."""

    layout = "in out *k"
    flat = True

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        kind = type(module)
        return (kind.__name__, kind.__module__) == ("Conv1D", "transformers.pytorch_utils")


class EmbeddingLayer(TorchLayer):
    """`nn.Embedding`, which stores its weight as `[in, out]`. A token id is an index on the axis `in`."""

    layout = "in out *k"
    narrowed = False

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        plain = isinstance(module, nn.Embedding) and _defines_forward(module, nn.Embedding)
        return bool(plain and module.max_norm is None)

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        if w.shape[1] != self.shape[1]:  # transformers' resize_token_embeddings grows the module in place.
            why = f"the update was made for {w.shape[1]} tokens, but the embedding has {self.shape[1]}"
            cure = "Call handle.remove() before you resize the embedding, then inject an adapter of the new size"
            raise ShapeMismatch(why, cure=cure)
        padding: Any = self.module.padding_idx
        return functional.embedding(x, w.mT, padding)


class ConvLayer(TorchLayer):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d` without groups, with any stride, dilation and padding mode."""

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @property
    def channel(self) -> int:  # type: ignore[override]
        return 1 - len(self.shape)

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        plain = any(isinstance(module, kind) and _defines_forward(module, kind) for kind in cls.kinds)
        return bool(plain and module.groups == 1)

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        if w.ndim > 2 and w.shape[1] != self.shape[1]:
            raise _channels(w, self.shape[1])
        exchanged: Any = self.module._conv_forward
        out: Tensor = exchanged(x, w.reshape(len(w), *self.shape[1:]), None)
        return out

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        module: Any = self.module
        out: Tensor = self._convolve(x, w, None, module.stride, module.padding)
        return out

    @property
    def padding(self) -> str:
        module: Any = self.module
        dilated = any(d > 1 and k > 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        if module.padding_mode != "zeros" and any(module._reversed_padding_repeated_twice):
            return f"padding_mode={module.padding_mode!r}" + (f" and dilation={module.dilation}" if dilated else "")
        # PEFT adds the output of its own convolution, which is not dilated, to the layer's output. For a dilated layer
        # without padding="same", these two outputs have different sizes, so PEFT cannot train the layer.
        return f"dilation={module.dilation} and padding='same'" if dilated and module.padding == "same" else ""

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        out: Tensor = self._convolve(h, w.reshape(*w.shape[:2], *[1] * (len(self.shape) - 2)))
        return out

    @property
    def _convolve(self) -> Callable[..., Tensor]:
        convolutions: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)
        return convolutions[len(self.shape) - 3]

    def per_channel(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * (len(self.shape) - 2))


class GroupedConv(ConvLayer):
    """A convolution with groups. If `op` gets a weight that covers all input channels, it convolves without groups."""

    direct = False

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        plain = any(isinstance(module, kind) and _defines_forward(module, kind) for kind in cls.kinds)
        return bool(plain and module.groups != 1)

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        if w.shape[1:] == self.shape[1:]:
            return super().op(x, w)
        module: Any = self.module
        if w.shape[1] != module.in_channels:
            raise _channels(w, module.in_channels)
        padding = module.padding
        if module.padding_mode != "zeros":
            x, padding = functional.pad(x, module._reversed_padding_repeated_twice, module.padding_mode), 0
        out: Tensor = self._convolve(x, w, None, module.stride, padding, module.dilation)
        return out


class Quantized(Linear):
    """A linear layer with a packed weight (see `is_packed`).

    The layer runs unchanged, and additive updates add their change to its output. Formulas that need W get the
    dequantized weight.
    """

    fresh = False
    # Each quantization library treats autocast in its own way. So the dtype of the formulas comes from the input (see
    # `like`), not from autocast.
    narrowed = False

    def __init__(self, module: nn.Module, forward: Forward, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(module, forward)
        self.dtype = dtype

    @classmethod
    def takes(cls, module: nn.Module) -> bool:
        return is_packed(module)

    def like(self, x: Tensor) -> TorchLayer:
        return Quantized(self.module, self.forward, x.dtype)

    @property
    def weight(self) -> Tensor:
        return dequantized(self.module).to(self.dtype)

    @property
    def bias(self) -> Tensor | None:
        b = super().bias
        return b.to(self.dtype) if _is_narrow(b) and b is not None else b

    @property
    def sample(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=device_of(self.module))

    @property
    def shape(self) -> tuple[int, ...]:
        return stored_shape(self.module)


class WeightDifference:
    """A layer that returns 0, so that an additive update's formula returns only the change."""

    def __init__(self, layer: TorchLayer) -> None:
        self.layer = layer
        self.op, self.mix, self.per_channel = layer.op, layer.mix, layer.per_channel
        self.shape = layer.shape

    def __call__(self, x: Tensor) -> float:
        return 0.0


KINDS: tuple[type[TorchLayer], ...] = (Quantized, Linear, Conv1D, EmbeddingLayer, ConvLayer, GroupedConv)


def layer_of(module: nn.Module, forward: Forward) -> TorchLayer | None:
    """Return a `TorchLayer` that wraps the module.

    If no subclass fits, return None. Formulas cannot run on such a module; only its own forward can run.
    """
    kind = next((kind for kind in KINDS if kind.takes(module)), None)
    return kind(module, forward) if kind else None


def moved(update: Update, device: torch.device, dtype: torch.dtype) -> Update:
    """Return the update with its tensors moved to a device and cast to a dtype. Integer tensors are cast to int64.

    If no tensor has to be moved or cast, return the same object.
    """

    def wanted(leaf: Tensor) -> torch.dtype:
        return dtype if leaf.is_floating_point() else torch.int64

    def there(leaf: Leaf) -> Tensor:
        tensor = live_tensor(leaf)
        return tensor.to(device, wanted(tensor))

    # Compare devices and dtypes. Do not call `there` to see whether it returns the same tensor: torch.jit.trace records
    # every conversion, even one that changes nothing. The function traces the model twice and raises an error if the
    # two graphs differ. The first run can make more conversions than the second.
    leaves = [live_tensor(leaf) for leaf in update.tensors.values()]
    stands = all(leaf.device == device and leaf.dtype == wanted(leaf) for leaf in leaves)
    return update if stands else update.map(there)


def live_tensor(leaf: Leaf) -> Tensor:
    """Return a tensor field of an attached update, typed as `Tensor`. Such a field is never a lazy tensor."""
    assert isinstance(leaf, Tensor)
    return leaf


def stored_layout(module: nn.Module) -> str | None:
    """Return the axis order in which a module's class stores its weight; None if the class is unknown."""
    if isinstance(module, nn.Embedding) or Conv1D.takes(module):
        return "in out *k"
    plain = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_packed(module)
    return "out *in" if plain else None


def stored_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight; for a packed weight, the shape before packing."""
    if Quantized.takes(module):
        sizes: Any = module.out_features, module.in_features
        return (int(sizes[0]), int(sizes[1]))
    W: Any = module.weight
    return tuple(W.shape)


def _channels(w: Tensor, channels: int) -> ShapeMismatch:
    why = f"the update was made for {w.shape[1]} channels, but the layer reads {channels}"
    return ShapeMismatch(why, cure=USE_ITS_BASE)


def _defines_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    return type(module).forward is kind.forward and not torch.nn.utils.parametrize.is_parametrized(module)


# Packed weights: weights that a quantization library stores in its own format. In a live model, the library dequantizes
# these weights.
#
# bitsandbytes, torchao, optimum-quanto, HQQ, GPTQ and AWQ all have linear layers with `in_features` and `out_features`.
# Such a layer runs unchanged, and updates are added to its output. So the code needs no table of libraries. A linear
# layer counts as packed if at least one of these statements is true:
#
# * its weight is a tensor of a class with its own `dequantize` (torchao; quanto after `freeze`);
# * it has a `qweight`. In GPTQ and AWQ, `qweight` is a buffer. In quanto, `qweight` is a property: a layer that is not
#   frozen keeps a float weight and quantizes it in each forward. If an update changed this float weight, the
#   quantization would remove most of a small change;
# * its class has a method `dequantize` (HQQ);
# * it is a layer of bitsandbytes whose weight is not floating point;
# * its weight is stored in 8-bit floating point, and another tool's forward casts the weight (and may scale it), as in
#   trainers with an fp8 base. torch itself cannot compute with such a weight. diffusers' layerwise casting does not
#   count: it casts the weight before the forward, and adapters run after this cast; see bypass.py.
#
# If an update needs the weight, the weight is dequantized by a function of the library, or by the method `dequantize`
# of the weight or of the module. GPTQ's and AWQ's modules have no common method that dequantizes. So an identity matrix
# is sent through the layer. The output minus the bias is the transpose of the dequantized weight.


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer with a packed weight."""
    kind: Any = type(module)
    if not all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features")):
        return False
    if _of_bitsandbytes(module):
        W: Any = module.weight
        return not isinstance(W, Tensor) or not W.is_floating_point()
    if "qweight" in module._buffers or "qweight" in module._parameters or hasattr(kind, "qweight"):
        return True
    # In a torch.jit module, `_parameters` is a mapping without `get`.
    weight = module._parameters["weight"] if "weight" in module._parameters else None  # noqa: SIM401
    scaled = _is_narrow(weight) and _casts(module) and not casts_layerwise(module)
    return callable(getattr(kind, "dequantize", None)) or _unpacks(weight) or scaled


def dequantized(module: nn.Module) -> Tensor:
    """Return the dequantized weight `[out, in]` of a packed module."""
    if _of_bitsandbytes(module):
        return _by_bitsandbytes(module)
    for name in ("weight", "qweight"):
        W: Any = getattr(module, name, None)
        if _unpacks(W):
            out: Tensor = W.dequantize()
            return out
    plain: Any = getattr(module, "weight", None)
    if isinstance(plain, nn.Parameter) and plain.is_floating_point() and not _is_narrow(plain):
        whole: Tensor = plain.detach()
        return whole
    return _by_identity(module)


def device_of(module: nn.Module) -> torch.device:
    """Return the device on which a packed module computes."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    device = next((tensor.device for tensor in tensors if isinstance(tensor, Tensor)), None)
    W: Any = getattr(module, "W_q", None) if device is None else None
    return W.device if device is None and W is not None else device or torch.device("cpu")


def _unpacks(W: object) -> bool:
    """Whether a tensor's class has its own `dequantize`."""
    return isinstance(W, Tensor) and type(W).dequantize is not Tensor.dequantize


def _is_narrow(W: object) -> bool:
    """Whether a weight is stored in 8-bit floating point."""
    return isinstance(W, Tensor) and W.is_floating_point() and W.dtype.itemsize < 2


def _casts(module: nn.Module) -> bool:
    """Whether a module's forward differs from `nn.Linear.forward`, which cannot compute with 8-bit weights."""
    return "forward" in module.__dict__ or type(module).forward is not nn.Linear.forward


def _of_bitsandbytes(module: nn.Module) -> bool:
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == "bitsandbytes"]
    return bool(kinds) and kinds[-1].__name__ in ("Linear4bit", "Linear8bitLt")


def _by_bitsandbytes(packed: nn.Module) -> Tensor:
    library: Any = importlib.import_module("bitsandbytes.functional")
    module: Any = packed
    W = module.weight
    state: Any = getattr(W, "quant_state", None)
    if state is not None:
        out: Tensor = library.dequantize_4bit(W.data, state)
        return out
    int8_state: Any = module.state if getattr(module.state, "CB", None) is not None else W
    dense: Tensor = library.int8_vectorwise_dequant(int8_state.CB, int8_state.SCB)
    return dense


@torch.no_grad()
def _by_identity(packed: nn.Module) -> Tensor:
    module: Any = packed
    if callable(getattr(type(module), "dequantize", None)):
        out: Tensor = module.dequantize()
        return out.reshape(module.out_features, module.in_features)
    hook = module.__dict__.get("_adapterkit_hook")  # Call the original forward, which does not apply the adapters.
    forward = module.forward if hook is None else hook.original
    scales = [t for t in (*module._parameters.values(), *module._buffers.values()) if isinstance(t, Tensor)]
    dtype = next((t.dtype for t in scales if t.is_floating_point() and t.dtype.itemsize > 1), torch.float32)
    rows = torch.eye(module.in_features, dtype=dtype, device=device_of(module))
    seen: Tensor = forward(rows) - forward(torch.zeros_like(rows[:1]))
    return seen.mT


# Apply dropout in training as PEFT does. Each method's class names its kind of dropout in `Update.dropout`:
#
# * `input`: `y = layer(x) + change(dropout(x))`. The base gets the input without dropout. PEFT: `lora_dropout`,
#   `vera_dropout` and others.
# * `rows`, `scaled rows`: some rows of the change are set to 0. PEFT: `rank_dropout` of LoHa and LoKr.
# * `blocks`: some rotations are replaced by the identity. PEFT: `module_dropout` of OFT, and `boft_dropout`.
#
# Each update draws its random numbers from torch's global generator after the base has run, in the same way as PEFT. So
# with the same seed, the losses in training equal PEFT's.


def check_dropout(dropout: float, cls: type[Update], method: str) -> None:
    """Check that the dropout is a probability and that the method supports dropout.

    Raises:
        UsageError: the dropout is below 0, or at least 1.
        Unsupported: the dropout is not 0, and the method changes outputs or adds context; such methods have no dropout.
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout must be at least 0 and below 1, got {dropout}", cure="Pass a probability")
    if dropout and cls.kind not in ("additive", "weight"):
        raise Unsupported(f"{method} has no dropout", where="dropout", cure="Pass dropout=0")


def dropout_of(adapter: Adapter) -> float:
    """Return the dropout probability with which an adapter was trained; 0 if none is recorded.

    Raises:
        UsageError: the adapter was combined from adapters with different dropouts.
    """
    dropouts = dropouts_of(adapter)
    if len(set(dropouts)) > 1:
        why = f"the adapter was composed from adapters with the dropouts {dropouts}, but it has one dropout"
        raise UsageError(why, where="dropout", cure="Pass dropout=P to inject(), or dropout=0 for none")
    return dropouts[0] if dropouts else 0.0


def dropped_change(
    layer: TorchLayer, updates: Sequence[Update], x: Tensor, p: float, live: Callable[[Update], Update]
) -> Tensor | float:
    """Return the sum of the changes that updates add to the base's output. Each update draws its own dropout.

    Args:
        layer: the layer without the updates.
        updates: the updates, in the order in which they are applied. Updates without trained tensors get no dropout.
        x: the layer's input. Token ids get no dropout.
        p: the dropout probability, for input elements, rows or blocks. Input elements that are kept are divided by
            `1 - p`.
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
    """Return a factor for each row, drawn at random as in PEFT's LoHa and LoKr. Dropped rows have the factor 0.

    Kept rows have the factor 1, or `1 / (share of kept rows)` if `scaled`. PEFT's layers draw another random number
    first. To get the same numbers afterwards, this function also draws one, and discards it.
    """
    torch.rand(1)
    kept = (torch.rand(count) > p).float()
    return kept / kept.mean() if scaled else kept


def _without_blocks(update: Update, p: float) -> Update:
    """Replace a random share p of an update's rotations by the identity, as in PEFT's OFT and BOFT.

    Each rotation is computed from one block of a tensor. A block of zeros gives the identity.
    """
    changed = {}
    tensors: Any = update.tensors
    for name, leaf in tensors.items():
        axes = update.tensor_fields()[name].metadata["axes"]
        blocks, factors = axes.index("n"), axes.index("m")
        if blocks is None or (factors is None and leaf.shape[blocks] == 1):
            continue  # If all rotations share one block, PEFT never drops this block.
        factor = None if factors is None else int(torch.randint(0, leaf.shape[factors], (1,)))
        count = leaf.shape[blocks]
        dropped = torch.arange(count) < int(p * count)
        mask = (~dropped[torch.randperm(count)]).to(leaf)
        mask = mask.reshape(-1, *[1] * (len(leaf.shape) - blocks - 1))
        if factor is not None:
            mask = torch.where(torch.arange(leaf.shape[0]).reshape(-1, *[1] * mask.ndim) == factor, mask, 1.0).to(leaf)
        changed[name] = leaf * mask
    return update.replace(**changed)

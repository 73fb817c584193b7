"""Compute low-rank changes of linear layers with less memory and time than the plain formula needs.

If a method's `Additive.thin` is True, its forward is y + (x A^T) B^T. Here y is the base's output, and the method's
`pair` returns the factors B and A. The *plain formula* is `LowRank.forward`, which computes this sum in separate
operations. These operations make three tensors of the output's size, and autograd keeps x A^T for the backward pass.
`low_rank_sum` adds the product to y in one operation, and its backward pass needs only x, A and B. Autograd keeps the
layer's input x without a copy, so q, k and v (or gate and up) share one kept tensor.

A call of a Python autograd function costs about 50 microseconds. So the plain formula is faster for small inputs, and
is used for them. The tensors that autograd keeps for small inputs use little memory compared with the weights.

On a CPU, 16-bit tensors are multiplied by low-rank factors in float32, in blocks of rows. On a processor without
bfloat16 instructions, a product of [512, 8] and [8, 256] takes 4.8 ms in 16 bits and 0.1 ms in 32 bits (torch 2.13,
AVX2). PEFT's factors are float32 too.

The plain formula is also used wherever a Python autograd function is not supported. This is the case under
torch.compile, torch.export, torch.func's transforms, forward-mode differentiation and torch.jit.trace. It is also the
case for tensors of other types (DTensor, FakeTensor, sparse, nested). torch.compile and torch.export fuse the formula's
operations.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import functional

from ..core.updates import Update
from .layers import TorchLayer
from .scopes import Scope
from .sharding import is_sharded

if TYPE_CHECKING:
    from .parts import Part


_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
SMALL = 1 << 16
"""The plain formula is faster if a layer's input and output both have at most this many elements (measured on one
core)."""
BLOCK = 1 << 19
"""The number of 16-bit elements that are converted to float32 at once, so that the float32 copies stay small."""
ROWS = 64
"""A block has at least this many input rows, even if these rows have more than `BLOCK` elements. Smaller blocks would
be slower, because each block reads the whole weight once."""


def short_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, weight: float) -> Tensor | None:
    """Return x W^T + b + weight * (x A^T) B^T by the plain formula, or None if x or the result is large.

    If A is frozen and B is trained, the plain formula is used for large tensors too.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        b: `[out]`, or None.
        A: `[r, in]`, in W's dtype. If W has 16 bits, float32 is also allowed.
        B: `[out, r]`, in A's dtype.
        weight: the number by which the low-rank change is multiplied.
    """
    (out, into), size, dtype = W.shape, x.numel(), W.dtype
    most = max(size, size // into * out) if into else SMALL
    # With a frozen A (LoRA-FA), the plain formula is better for large tensors too: autograd keeps only x A^T, which is
    # smaller than x. The autograd functions of this module keep x.
    if most > SMALL and (A.requires_grad or not B.requires_grad):
        return None
    y = functional.linear(x, W, b)
    if is_wide(y):
        change = functional.linear(functional.linear(x.float(), A.float()), B.float()).to(dtype)
    elif A.dtype is dtype:
        change = functional.linear(functional.linear(x, A), B)
    else:
        change = functional.linear(functional.linear(x, A.to(dtype)), B.to(dtype))
    # Add in place if no other code holds y. This lowers the peak memory by one tensor of the output's size.
    if may_overwrite(y):
        return y.add_(change, alpha=weight)
    return torch.add(y, change, alpha=weight)


def is_wide(y: Tensor) -> bool:
    """Whether the products with low-rank factors are computed in float32: true if y has 16 bits and is on a CPU.

    y is the layer's output or the layer's weight.
    """
    return y.dtype in _HALF and y.device.type == "cpu"


def may_overwrite(y: Tensor) -> bool:
    """Whether `y`, the new output of a linear layer, may be overwritten. The layer's backward pass does not use y."""
    return not torch.compiler.is_compiling() and type(y) is Tensor and not y._is_view() and is_eager()


def is_eager() -> bool:
    """Whether torch runs without torch.func transforms, forward-mode differentiation, tracing and dispatch modes.

    Selective checkpointing is a dispatch mode. It keeps the outputs of operations, so no output may be overwritten.
    """
    if torch._C._len_torch_dispatch_stack():
        return False
    if forward_ad._current_level >= 0 or peek_interpreter_stack() is not None:
        return False
    return torch._C._get_tracing_state() is None


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, weight: float) -> Tensor | None:
    """Return x W^T + b + weight * (x A^T) B^T for frozen W and b, or None if the tensors need the plain formula.

    One autograd function computes both products. Its backward pass adds the two gradients of x in place, so only one
    tensor of x's size is needed.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        b: `[out]`, or None.
        A: `[r, in]`, in W's dtype. If `is_wide` holds for W, float32 is also allowed.
        B: `[out, r]`, in A's dtype.
        weight: the number by which the low-rank change is multiplied.
    """
    frozen = not W.requires_grad and (b is None or (type(b) in _PLAIN and b.dtype == W.dtype and not b.requires_grad))
    if not frozen or not _takes(W, x, A, B) or torch.is_autocast_enabled(x.device.type):
        return None
    if not (torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad)):
        return _added(functional.linear(x, W, b), x, A, B, weight, True)
    function: Any = _LowRankLinear
    out: Tensor = function.apply(x, W, b, A, B, weight)
    return out


def low_rank_sum(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float = 1.0, fresh: bool = False) -> Tensor:
    """Return y + weight * (x A^T) B^T.

    Args:
        y: `[..., out]`.
        x: `[..., in]`.
        A: `[r, in]`.
        B: `[out, r]`.
        weight: the number by which the low-rank change is multiplied.
        fresh: True if no other code holds y, so that the sum may overwrite y.
    """
    if not _takes(y, x, A, B):
        change = functional.linear(functional.linear(x, A.to(x.dtype)), B.to(x.dtype))
        return y + (change if weight == 1 else weight * change)
    fresh = fresh and not y._is_view()
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or A.requires_grad or B.requires_grad):
        function: Any = _LowRankSum
        out: Tensor = function.apply(y, x, A, B, weight, fresh)
        return out
    return _added(y, x, A, B, weight, fresh)


def scaled_linear(x: Tensor, W: Tensor, b: Tensor | None, s: Tensor, A: Tensor, B: Tensor) -> Tensor | None:
    """Return s * (x (W + B A)^T) + b without forming W + B A, or None if the tensors need the plain formula.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        b: `[out]`, or None.
        s: `[out]`, in A's dtype.
        A: `[r, in]`, in W's dtype. If `is_wide` holds for W, float32 is also allowed.
        B: `[out, r]`, in A's dtype.
    """
    frozen = not W.requires_grad and (b is None or (type(b) in _PLAIN and b.dtype == W.dtype and not b.requires_grad))
    if not frozen or not _takes(W, x, A, B) or torch.is_autocast_enabled(x.device.type):
        return None
    function: Any = _ScaledLinear
    out: Tensor = function.apply(x, W, b, s, A, B)
    return out


def _takes(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the autograd functions of this module can be used with these tensors in the current state of torch."""
    if torch.compiler.is_compiling() or not is_eager():
        return False
    if not all(type(t) in _PLAIN and t.layout is torch.strided for t in (y, x, A, B)):
        return False
    kind = y.device.type
    if kind == "meta" or not x.device == y.device == A.device == B.device:
        return False
    # Autocast gives y 16 bits, but x, A and B may have other dtypes. `_added` and `_of_factors` cast x, A and B.
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == y.dtype
    same = x.dtype == y.dtype or (cast and x.is_floating_point())
    thin = (y.dtype, torch.float32) if is_wide(y) else (y.dtype,)
    same = same and all(t.dtype in thin or (cast and t.is_floating_point()) for t in (A, B))
    return same and y.dtype in _DTYPES and x.numel() > 0 and y.numel() > 0


def _added(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, fresh: bool) -> Tensor:
    """Return y + weight * (x A^T) B^T in y's dtype. If `fresh`, the result overwrites y where possible."""
    flat_x, flat = x.reshape(-1, x.shape[-1]), y if y.ndim == 2 else y.reshape(-1, y.shape[-1])
    alone = fresh and flat.data_ptr() == y.data_ptr()
    with _without_autocast(y):
        if is_wide(y):
            A, B = A.float().mT, B.float().mT
            flat = flat if alone else flat.clone()
            for rows in _blocks(flat_x, y):
                h = flat_x[rows].float() @ A
                # Round the change to 16 bits first: adding a 32-bit tensor to a 16-bit tensor takes ten times as long
                # as adding two 16-bit tensors.
                flat[rows].add_(((h if weight == 1 else h.mul_(weight)) @ B).to(y.dtype))
            return y if alone else flat.view(y.shape)
        h = flat_x.to(y.dtype) @ A.to(y.dtype).mT
        if alone:
            flat.addmm_(h, B.to(y.dtype).mT, alpha=weight)
            return y
        return torch.addmm(flat, h, B.to(y.dtype).mT, alpha=weight).view(y.shape)


def _blocks(*tensors: Tensor) -> list[slice]:
    """Split the rows of the tensors into slices. In each slice, the widest tensor has about `BLOCK` elements."""
    width = max(tensor.shape[-1] for tensor in tensors)
    rows = tensors[0].numel() // tensors[0].shape[-1]
    step = max(BLOCK // width, ROWS)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _without_autocast(y: Tensor) -> AbstractContextManager[object]:
    kind = y.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


_NOTHING = nullcontext()


class _Context(Protocol):
    """The context of an autograd function, with all attributes that the functions below use."""

    weight: float

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_dirty(self, *tensors: Tensor) -> None: ...


class _LowRankLinear(torch.autograd.Function):
    """x W^T + b + weight * (x A^T) B^T with frozen W and b; keeps x, W, A and B for the backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.weight = weight
        return _added(functional.linear(x, W, b), x, A, B, weight, True)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W, A, B = ctx.saved_tensors
        into, _, _, to_A, to_B, _ = ctx.needs_input_grad
        of_x, of_A, of_B = _of_factors(grad, x, A, B, ctx.weight, to_A, to_B, W if into else None)
        return None if of_x is None else of_x.view(x.shape), None, None, of_A, of_B, None


class _ScaledLinear(torch.autograd.Function):
    """s * (x (W + B A)^T) + b; keeps x, W, s, A and B for the backward pass, and x (W + B A)^T for the gradient of s.

    x (W + B A)^T has the output's size. If it were not kept, the gradient of s would need a third product with W, and a
    training step would take longer than in PEFT, which keeps at least two tensors of this size.
    """

    @staticmethod
    def forward(ctx: _Context, x: Tensor, W: Tensor, b: Tensor | None, s: Tensor, A: Tensor, B: Tensor) -> Tensor:
        plain = _added(functional.linear(x, W), x, A, B, 1.0, True)
        ctx.save_for_backward(x, W, s, A, B, plain if ctx.needs_input_grad[3] else None)
        out = plain * s.to(plain.dtype)
        return out if b is None else out.add_(b)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, W, s, A, B, plain = ctx.saved_tensors
        into, _, _, to_s, to_A, to_B = ctx.needs_input_grad
        of_s = None
        if to_s:
            if torch.is_grad_enabled():  # For second derivatives, recompute `plain`: the saved tensor has no graph.
                flat = x.reshape(-1, x.shape[-1])
                plain = flat @ W.mT + (flat.to(A.dtype) @ A.mT @ B.mT).to(W.dtype)
            of_s = (plain.reshape(-1, plain.shape[-1]) * grad.reshape(-1, grad.shape[-1])).sum(0, dtype=s.dtype)
        scaled = grad * s.to(grad.dtype)
        of_x, of_A, of_B = _of_factors(scaled, x, A, B, 1.0, to_A, to_B, W if into else None)
        return None if of_x is None else of_x.view(x.shape), None, None, of_s, of_A, of_B


class _LowRankSum(torch.autograd.Function):
    """y + weight * (x A^T) B^T; keeps x, A and B for the backward pass."""

    @staticmethod
    def forward(ctx: _Context, y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, fresh: bool) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.weight = weight
        if fresh:
            ctx.mark_dirty(y)
        return _added(y, x, A, B, weight, fresh)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, A, B = ctx.saved_tensors
        _, into, to_A, to_B, *_ = ctx.needs_input_grad
        of_x, of_A, of_B = _of_factors(grad, x, A, B, ctx.weight, to_A, to_B, None, into)
        return grad, None if of_x is None else of_x.view(x.shape).to(x.dtype), of_A, of_B, None, None


def _of_factors(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, to_A: bool, to_B: bool, W: Tensor | None,
    to_x: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of weight * (x A^T) B^T with respect to x, A and B.

    If W is given, the gradient of x W^T is added to the gradient with respect to x.

    x A^T is recomputed, which costs less than keeping it. Gradients are added in place, unless the backward pass itself
    is differentiated.
    """
    flat, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    if is_wide(grad) and not torch.is_grad_enabled():
        return _of_factors_by_blocks(out, flat, A, B, weight, to_A, to_B, W, to_x)
    of_A = of_B = None
    of_x = None if W is None else out @ W
    with _without_autocast(grad):
        flat, wide_A, wide_B = flat.to(grad.dtype), A.to(grad.dtype), B.to(grad.dtype)
        inner = out @ wide_B if weight == 1 else weight * (out @ wide_B)
        if to_A:
            of_A = (inner.mT @ flat).to(A.dtype)
        if to_B:
            h = flat @ wide_A.mT
            of_B = (out.mT @ (h if weight == 1 else weight * h)).to(B.dtype)
        if of_x is None:
            of_x = inner @ wide_A if to_x else None
        elif torch.is_grad_enabled():
            of_x = of_x + inner @ wide_A
        else:
            of_x.addmm_(inner, wide_A)
    return of_x, of_A, of_B


def _of_factors_by_blocks(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, to_A: bool, to_B: bool, W: Tensor | None, to_x: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute `_of_factors` for 16-bit tensors on a CPU: in float32, and in blocks of rows to keep the copies small.

    The gradient of x is summed in float32, and the sum is rounded to 16 bits. If the processor has no instructions for
    16-bit matrix products, the product of `grad` and W is computed in float32 too, because this is faster. On AVX2,
    torch 2.13 takes 165 ms for a product of [512, 680] and [680, 256] in bfloat16, but 3 ms in float32.
    """
    to_x = to_x or W is not None
    of_x = x.new_empty(x.shape, dtype=grad.dtype) if to_x else None
    fast = W is not None and _multiplies(W.dtype)
    pieces = [] if W is None or fast else [slice(at, at + _rows_of(W)) for at in range(0, len(W), _rows_of(W))]
    # A weight that fits in one block is converted to float32 once for all rows.
    wide = W.float() if W is not None and len(pieces) == 1 else None
    wide_A, wide_B = A.float(), B.float()
    of_A: Tensor | None = None
    of_B: Tensor | None = None
    with _without_autocast(grad):
        for rows in _blocks(x, grad):
            some_x, some = x[rows].float(), grad[rows].float()
            inner = some @ wide_B if weight == 1 else weight * (some @ wide_B)
            if to_A:
                part = inner.mT @ some_x
                of_A = part if of_A is None else of_A.add_(part)
            if to_B:
                h = some_x @ wide_A.mT
                part = some.mT @ (h if weight == 1 else weight * h)
                of_B = part if of_B is None else of_B.add_(part)
            if of_x is None:
                continue
            change = inner @ wide_A
            if W is not None and fast:
                change = change.add_(grad[rows] @ W)
            for piece in pieces:
                assert W is not None
                change = change.addmm_(some[:, piece], W[piece].float() if wide is None else wide)
            of_x[rows] = change
    return of_x, None if of_A is None else of_A.to(A.dtype), None if of_B is None else of_B.to(B.dtype)


def _rows_of(W: Tensor) -> int:
    """Return the number of rows of a weight that together have about `BLOCK` elements."""
    return max(BLOCK // W.shape[1], 1)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for matrix products in this 16-bit dtype. If so, torch uses them."""
    ask: Any = torch.ops.mkldnn
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return bool(getattr(ask, name)()) if hasattr(ask, name) else False


# For one token, the products of a LoRA take a few microseconds. It takes several times as long to find out which
# adapters act, which kind of formula they have, and whether the layer is a plain nn.Linear. The answers are the same in
# every forward, so a plan caches them. The plan is discarded when a switch or an adapter's weight changes
# (`scopes.SETTINGS`), when a forward runs in another scope, and when the layer or the adapter gets other tensors.


class LeanPlan:
    """A cached plan for the forward of an `nn.Linear` with one low-rank update.

    Args:
        token: `SETTINGS.token`, read before the caller looked for the parts that act.
        scope: the scope in which the plan applies.
        part: the part that acts at the layer, if only one part acts there and has a single low-rank update; else None.
        layer: the layer.
    """

    def __init__(self, token: object, scope: Scope, part: Part | None, layer: TorchLayer | None) -> None:
        self.token: object = token
        self.scope, self.part, self.usable = scope, part, False
        if part is None or layer is None:
            return
        self.updates: tuple[Update, ...] = part.bound.updates
        update: Any = self.updates[0]
        if any(map(is_sharded, update.tensors.values())):
            return
        W: Any = layer.module._parameters.get("weight")
        self.update, self.W, self.module, self.shape = update, W, layer.module, layer.shape
        with torch.no_grad():
            B, A, scaling = update.factors(self.shape)
        self.usable = (
            type(W) in _PLAIN
            and not W.is_meta
            and (B.shape[0], A.shape[1]) == self.shape
            and A.dtype == B.dtype
            and update.bias_delta() is None
        )
        if self.usable:
            self.kind = W.device.type
            leaves = update.tensors.values()
            # A LoRA's factors are tensors of the update, so the plan keeps these factors. Other methods compute their
            # factors from their tensors, so the plan computes the factors again in each forward.
            self.fixed = all(any(factor is leaf for leaf in leaves) for factor in (A, B))
            self.fixed_factors = B, A, scaling * part.switch.weight

    def _factors(self) -> tuple[Tensor, Tensor, float]:
        B, A, scaling = self.update.factors(self.shape)
        assert self.part is not None
        return B, A, scaling * self.part.switch.weight

    def run(self, x: object) -> Tensor | None:
        """Return the layer's output, or None if the plan does not apply; the hook then runs without a plan."""
        if not self.usable or type(x) is not Tensor or self.part is None:
            return None
        W: Any = self.W
        parameters: Any = self.module._parameters
        if self.part.bound.updates is not self.updates or parameters.get("weight") is not W:
            self.token = None  # The plan uses old tensors; the next forward makes another plan.
            return None
        B, A, weight = self.fixed_factors if self.fixed else self._factors()
        dtype, wide = W.dtype, A.dtype
        same = wide is dtype or (wide is torch.float32 and dtype.itemsize == 2)
        if not same or W.shape != self.shape or torch.is_autocast_enabled(self.kind):
            return None
        # A parametrized or pruned bias is not in `_parameters`.
        b: Any = parameters["bias"] if "bias" in parameters else self.module.bias  # noqa: SIM401 - computed on access
        y = short_linear(x, W, b, A, B, weight)
        if y is None:
            A, B = (A, B) if wide is dtype or is_wide(W) else (A.to(dtype), B.to(dtype))
            y = low_rank_linear(x, W, b, A, B, weight)
        return y

"""Low-rank changes of linear layers, in training and inference, with less memory and time than their plain formula.

Every additive method whose `forward` is that of its `pair` (`Additive.thin`) comes down to y + (x A^T) B^T. The plain
formula is `LowRank.forward`. Run operation by operation it makes three tensors of the output's size, and autograd keeps
x A^T for the backward pass. `low_rank_sum` adds the product into the base's output in one operation, and its backward
pass needs x, A and B alone. Autograd keeps x as it came, so q, k and v (or gate and up) keep one tensor together.

A function in Python costs autograd some 50 microseconds, so inputs of few numbers take the plain formula too: what it
keeps of them is nothing beside the weights.

Numbers of 16 bits on a CPU are multiplied by thin factors in float32, some rows at a time. Without instructions for
bfloat16 a product of [512, 8] and [8, 256] takes 4.8 ms in 16 bits and 0.1 ms in 32 (torch 2.13, AVX2), and PEFT's
factors are float32 too.

The plain formula stays in charge wherever a Python autograd function is not understood: under torch.compile and
torch.export (which fuse by themselves), torch.func's transforms, forward-mode differentiation, torch.jit.trace, and
for tensors of other types (DTensor, FakeTensor, sparse, nested).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_HALF = (torch.float16, torch.bfloat16)
SMALL = 1 << 16
"""Numbers in a layer's input or output, up to which the plain formula is faster (measured on one core)."""
BLOCK = 1 << 19
"""Numbers of 16 bits that are made float32 at a time, so that their copies stay small."""


def short_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, weight: float) -> Tensor | None:
    """Return x W^T + b + weight * (x A^T) B^T by the plain formula; None where x or the result has many numbers.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        b: `[out]`, or None.
        A: `[r, in]`, in the dtype of W or, beside a W of 16 bits, in float32.
        B: `[out, r]`, in A's dtype.
        weight: of what the factors add.
    """
    (out, into), size, dtype = W.shape, x.numel(), W.dtype
    most = max(size, size // into * out) if into else SMALL
    # With A frozen (LoRA-FA) autograd keeps x A^T here and not x, which is less than the functions below keep.
    if most > SMALL and (A.requires_grad or not B.requires_grad):
        return None
    y = functional.linear(x, W, b)
    if is_wide(y):
        change = functional.linear(functional.linear(x.float(), A.float()), B.float()).to(dtype)
    elif A.dtype is dtype:
        change = functional.linear(functional.linear(x, A), B)
    else:
        change = functional.linear(functional.linear(x, A.to(dtype)), B.to(dtype))
    # In place where y is a tensor of its own: one tensor of the output's size less at the peak.
    if may_overwrite(y):
        return y.add_(change, alpha=weight)
    return torch.add(y, change, alpha=weight)


def is_wide(y: Tensor) -> bool:
    """Whether products of y's layer with thin factors are computed in float32: y has 16 bits, on a CPU."""
    return y.dtype in _HALF and y.device.type == "cpu"


def may_overwrite(y: Tensor) -> bool:
    """Whether a linear layer's output, which nobody else has, may be written over: autograd does not need it."""
    return not torch.compiler.is_compiling() and type(y) is Tensor and not y._is_view() and _is_eager()


def _is_eager() -> bool:
    """Whether no transform of torch.func, forward-mode differentiation or tracing is going on."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return torch._C._get_tracing_state() is None


def low_rank_linear(x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, weight: float) -> Tensor | None:
    """Return x W^T + b + weight * (x A^T) B^T for a frozen W; None where the tensors need the plain formula.

    One function for both products adds their gradients of x without a second tensor of its size.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        b: `[out]`, or None.
        A: `[r, in]`, in W's dtype, or in float32 beside a W for which `is_wide` holds.
        B: `[out, r]`, in A's dtype.
        weight: of what the factors add.
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
        weight: of the sum's second term.
        fresh: nobody else has y, so that the sum may be written over it.
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
    """Return s * (x (W + B A)^T) + b for a frozen W, without a new weight; None where the plain formula is needed.

    Args:
        x: `[..., in]`.
        W: `[out, in]`.
        b: `[out]`, or None.
        s: `[out]`, in A's dtype.
        A: `[r, in]`, in W's dtype, or in float32 beside a W for which `is_wide` holds.
        B: `[out, r]`, in A's dtype.
    """
    frozen = not W.requires_grad and (b is None or (type(b) in _PLAIN and b.dtype == W.dtype and not b.requires_grad))
    if not frozen or not _takes(W, x, A, B) or torch.is_autocast_enabled(x.device.type):
        return None
    function: Any = _ScaledLinear
    out: Tensor = function.apply(x, W, b, s, A, B)
    return out


def _takes(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the tensors and the state of torch are ones that the functions below are right for."""
    if torch.compiler.is_compiling() or not _is_eager():
        return False
    if not all(type(t) in _PLAIN and t.layout is torch.strided for t in (y, x, A, B)):
        return False
    kind = y.device.type
    if kind == "meta" or not x.device == y.device == A.device == B.device:
        return False
    # Autocast makes y 16 bits wide, while x, A and B may still be what they were; they are cast as it casts them.
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == y.dtype
    same = x.dtype == y.dtype or (cast and x.is_floating_point())
    thin = (y.dtype, torch.float32) if is_wide(y) else (y.dtype,)
    same = same and all(t.dtype in thin or (cast and t.is_floating_point()) for t in (A, B))
    return same and y.dtype in _DTYPES and x.numel() > 0 and y.numel() > 0


def _added(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, fresh: bool) -> Tensor:
    """y + weight * (x A^T) B^T in y's dtype, written over y where it is fresh."""
    flat_x, flat = x.reshape(-1, x.shape[-1]), y if y.ndim == 2 else y.reshape(-1, y.shape[-1])
    alone = fresh and flat.data_ptr() == y.data_ptr()
    with _without_autocast(y):
        if is_wide(y):
            A, B = A.float().mT, B.float().mT
            flat = flat if alone else flat.clone()
            for rows in _blocks(flat_x, y):
                h = flat_x[rows].float() @ A
                # A sum of 16 and 32 bits takes ten times as long as one of 16.
                flat[rows].add_(((h if weight == 1 else h.mul_(weight)) @ B).to(y.dtype))
            return y if alone else flat.view(y.shape)
        h = flat_x.to(y.dtype) @ A.to(y.dtype).mT
        if alone:
            flat.addmm_(h, B.to(y.dtype).mT, alpha=weight)
            return y
        return torch.addmm(flat, h, B.to(y.dtype).mT, alpha=weight).view(y.shape)


def _blocks(*tensors: Tensor) -> list[slice]:
    """Slices of rows in which the widest of the tensors has some `BLOCK` numbers."""
    width = max(tensor.shape[-1] for tensor in tensors)
    rows = tensors[0].numel() // tensors[0].shape[-1]
    step = max(BLOCK // width, 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _without_autocast(y: Tensor) -> Any:
    kind = y.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


class _LowRankLinear(torch.autograd.Function):
    """x W^T + b + weight * (x A^T) B^T with W and b frozen, keeping x, W, A and B for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, weight: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.weight = weight
        return _added(functional.linear(x, W, b), x, A, B, weight, True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B = ctx.saved_tensors
        into, _, _, to_A, to_B, _ = ctx.needs_input_grad
        of_x = grad.reshape(-1, grad.shape[-1]) @ W if into else None
        of_x, of_A, of_B = _of_factors(grad, x, A, B, ctx.weight, to_A, to_B, of_x)
        return None if of_x is None else of_x.view(x.shape), None, None, of_A, of_B, None


class _ScaledLinear(torch.autograd.Function):
    """s * (x (W + B A)^T) + b, keeping x, W, s, A and B for the backward pass, and x (W + B A)^T for the gradient of s.

    Without that tensor of the output's size the gradient of s would take a third product with W, and a step more time
    than PEFT's, which keeps at least two such tensors.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, s: Tensor, A: Tensor, B: Tensor) -> Tensor:
        plain = _added(functional.linear(x, W), x, A, B, 1.0, True)
        ctx.save_for_backward(x, W, s, A, B, plain if ctx.needs_input_grad[3] else None)
        out = plain * s.to(plain.dtype)
        return out if b is None else out.add_(b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, s, A, B, plain = ctx.saved_tensors
        into, _, _, to_s, to_A, to_B = ctx.needs_input_grad
        of_s = None
        if to_s:
            if torch.is_grad_enabled():  # The kept tensor has no graph of its own.
                flat = x.reshape(-1, x.shape[-1])
                plain = flat @ W.mT + (flat.to(A.dtype) @ A.mT @ B.mT).to(W.dtype)
            of_s = (plain.reshape(-1, plain.shape[-1]) * grad.reshape(-1, grad.shape[-1])).sum(0, dtype=s.dtype)
        scaled = grad * s.to(grad.dtype)
        of_x = scaled.reshape(-1, grad.shape[-1]) @ W if into else None
        of_x, of_A, of_B = _of_factors(scaled, x, A, B, 1.0, to_A, to_B, of_x)
        return None if of_x is None else of_x.view(x.shape), None, None, of_s, of_A, of_B


class _LowRankSum(torch.autograd.Function):
    """y + weight * (x A^T) B^T, keeping x, A and B for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, fresh: bool) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.weight = weight
        if fresh:
            ctx.mark_dirty(y)
        return _added(y, x, A, B, weight, fresh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        _, into, to_A, to_B, *_ = ctx.needs_input_grad
        of_x = x.new_zeros(x.shape, dtype=grad.dtype).reshape(-1, x.shape[-1]) if into else None
        of_x, of_A, of_B = _of_factors(grad, x, A, B, ctx.weight, to_A, to_B, of_x)
        return grad, None if of_x is None else of_x.view(x.shape).to(x.dtype), of_A, of_B, None, None


def _of_factors(
    grad: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, to_A: bool, to_B: bool, of_x: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight * (x A^T) B^T: of x, added to `of_x` where that is given, of A and of B.

    x A^T is computed again, which costs less than to keep it. Sums are made in place unless the backward pass is itself
    differentiated.
    """
    flat, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    again, wide = torch.is_grad_enabled(), torch.float32 if is_wide(grad) else grad.dtype
    blocks = _blocks(flat, out) if is_wide(grad) and not again else [slice(None)]
    wide_A, wide_B = A.to(wide), B.to(wide)
    of_A: Tensor | None = None
    of_B: Tensor | None = None
    with _without_autocast(grad):
        for rows in blocks:
            some_x, some = flat[rows].to(wide), out[rows].to(wide)
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
            if again:
                of_x = of_x + (inner @ wide_A).to(of_x.dtype)
            elif of_x.dtype == wide:
                of_x[rows].addmm_(inner, wide_A)
            else:
                of_x[rows].add_((inner @ wide_A).to(of_x.dtype))
    return of_x, None if of_A is None else of_A.to(A.dtype), None if of_B is None else of_B.to(B.dtype)


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()

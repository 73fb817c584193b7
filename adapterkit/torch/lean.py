"""Low-rank changes of linear layers, in training and inference, with less memory and time than their plain formula.

Every additive method whose `forward` is that of its `pair` (`Additive.thin`) comes down to y + (x A^T) B^T. The plain
formula is `LowRank.forward`. Run operation by operation it makes three tensors of the output's size, and autograd keeps
x A^T for the backward pass. `low_rank_sum` adds the product into the base's output in one operation, and its backward
pass needs x, A and B alone. Autograd keeps x as it came, so q, k and v (or gate and up) keep one tensor together.

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
        change = functional.linear(functional.linear(x, A), B)
        return y + (change if weight == 1 else weight * change)
    fresh = fresh and not y._is_view()
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or A.requires_grad or B.requires_grad):
        sum_: Any = _LowRankSum
        out: Tensor = sum_.apply(y, x, A, B, weight, fresh)
        return out
    return _added(y, x.to(y.dtype), A, B, weight, fresh)


def _takes(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the tensors and the state of torch are ones that `_LowRankSum` is right for."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if not all(type(t) in _PLAIN and t.layout is torch.strided for t in (y, x, A, B)):
        return False
    # Autocast makes y 16 bits wide, while x, A and B may still be what they were; they are cast as it casts them.
    kind = y.device.type
    cast = y.dtype if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == y.dtype else None
    same = all(t.dtype == y.dtype or (cast is not None and t.is_floating_point()) for t in (x, A, B))
    return same and y.dtype in _DTYPES and x.device == y.device == A.device == B.device and y.numel() > 0


def _added(y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, fresh: bool) -> Tensor:
    """y + weight * (x A^T) B^T, of one dtype, over y where it is fresh."""
    with torch.autocast(y.device.type, enabled=False) if torch.is_autocast_enabled(y.device.type) else _NOTHING:
        h = x.reshape(-1, x.shape[-1]) @ A.to(y.dtype).mT
        flat = y if y.ndim == 2 else y.reshape(-1, y.shape[-1])
        if fresh and flat.data_ptr() == y.data_ptr():
            flat.addmm_(h, B.to(y.dtype).mT, alpha=weight)
            return y
        return torch.addmm(flat, h, B.to(y.dtype).mT, alpha=weight).view(y.shape)


class _LowRankSum(torch.autograd.Function):
    """y + weight * (x A^T) B^T, keeping x, A and B for the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: float, fresh: bool) -> Tensor:
        ctx.save_for_backward(x, A, B)
        ctx.weight, ctx.dtype = weight, y.dtype
        if fresh:
            ctx.mark_dirty(y)
        return _added(y, x.to(y.dtype), A, B, weight, fresh)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        wide = [tensor.to(ctx.dtype) for tensor in (x, A, B)]
        flat, out = wide[0].reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        inner = out @ wide[2]
        if ctx.weight != 1:
            inner = ctx.weight * inner
        _, into, to_A, to_B, *_ = ctx.needs_input_grad
        of_x = (inner @ wide[1]).view(x.shape).to(x.dtype) if into else None
        of_A = (inner.mT @ flat).to(A.dtype) if to_A else None
        of_B = None
        if to_B:
            h = flat @ wide[1].mT
            of_B = (out.mT @ (h if ctx.weight == 1 else ctx.weight * h)).to(B.dtype)
        return grad, of_x, of_A, of_B, None, None


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_NOTHING = _Nothing()

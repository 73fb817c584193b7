"""y + (x A^T) B with the factors of another adapter for each row: one interface, by torch's products or by Triton.

On CUDA, where Triton can be imported (torch's wheels for Linux bring it), two kernels read each row's factors where
they lie: see kernels.py. Everywhere else, and wherever a gradient is wanted, the factors are gathered and `bmm` does
the rest. Both give y in the dtype that it came in.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .lean import is_wide


def add_gathered(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, ranks: Tensor, fresh: bool = False
) -> Tensor:
    """Return y[i] + (x[i] A[index[i]]^T) B[index[i]] for each row i.

    Args:
        y: `[rows, tokens, out]`.
        x: `[rows, tokens, in]`.
        A: `[slots, r, in]`, padded with zeros to the highest rank.
        B: `[slots, r, out]`, padded likewise.
        index: `[rows]`, the slot of each row.
        ranks: `[slots]`, how much of `r` each slot uses; 0 for rows that stay as they are.
        fresh: nobody else has y, so that the sum may be written over it.
    """
    if takes_kernel(y, x, A, B):
        from .kernels import add_by_kernel

        return add_by_kernel(y if fresh and y.is_contiguous() else y.clone(), x, A, B, index, ranks)
    return add_by_products(y, x, A.index_select(0, index), B.index_select(0, index), fresh)


def add_by_products(y: Tensor, x: Tensor, A: Tensor, B: Tensor, fresh: bool = False) -> Tensor:
    """Return y + (x A^T) B by torch's batched products; A and B are `[rows, r, in]` and `[rows, r, out]`."""
    if is_wide(y) and A.dtype == torch.float32:
        change = torch.bmm(torch.bmm(x.float(), A.mT), B).to(y.dtype)
        return y.add_(change) if fresh else y + change
    if A.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        A, B = A.to(x.dtype), B.to(x.dtype)
    h = torch.bmm(x, A.mT)
    if fresh and y.dtype == h.dtype == B.dtype:
        return y.baddbmm_(h, B)
    return torch.baddbmm(y, h, B)


def takes_kernel(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the kernels are at hand and right for these tensors."""
    if not x.is_cuda or not _has_triton() or torch.compiler.is_compiling():
        return False
    graph = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, x, A, B))
    return not graph and all(tensor.is_cuda and tensor.dtype in _DTYPES for tensor in (y, x, A, B))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

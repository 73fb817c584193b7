# mypy: disable-error-code="no-untyped-def, no-untyped-call, type-arg"
"""Triton kernels that apply low-rank factors to a batch in which each row has its own adapter.

As in Punica (https://arxiv.org/abs/2310.18547), there are two kernels: *shrink* computes `h = x @ A^T`, and *expand*
adds `h @ B` to y. The factors of all adapters are stacked. An adapter's index in the stack is its *slot*. Both kernels
read each row's factors directly from the stack, so no factors are copied. Each Triton program handles one tile of one
batch row. It looks up the row's slot and the slot's rank r, and reads only the first r rows of the slot's factors. So
the adapters' ranks may differ, and programs for rows without an adapter return immediately. Sums are computed in
float32, without TF32.

With TRITON_INTERPRET=1 the kernels run on the CPU, for tests. Import this module only if Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, INPUTS, OUTPUTS = 16, 64, 64
"""The sizes of a tile along tokens, inputs and outputs.

`tl.dot` needs at least 16 along each axis, so a row with one token uses 1/16 of its tile.
"""


def _shrink(x, A, index, ranks, h, tokens, width, rank, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(index + row)
    used = tl.load(ranks + slot)
    if used > 0:
        at = tl.program_id(1) * T + tl.arange(0, T)
        r = tl.arange(0, R)
        total = tl.zeros((T, R), dtype=tl.float32)
        for start in range(0, width, K):
            k = start + tl.arange(0, K)
            some = tl.load(
                x + (row * tokens + at[:, None]) * width + k[None, :],
                mask=(at[:, None] < tokens) & (k[None, :] < width), other=0.0,
            )  # fmt: skip
            factor = tl.load(
                A + (slot * rank + r[None, :]) * width + k[:, None],
                mask=(r[None, :] < used) & (k[:, None] < width), other=0.0,
            )  # fmt: skip
            total += tl.dot(some.to(tl.float32), factor.to(tl.float32), input_precision="ieee")
        tl.store(h + (row * tokens + at[:, None]) * R + r[None, :], total, mask=at[:, None] < tokens)


def _expand(h, B, index, ranks, y, tokens, width, rank, R: tl.constexpr, T: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(index + row)
    used = tl.load(ranks + slot)
    if used > 0:
        at = tl.program_id(1) * T + tl.arange(0, T)
        k = tl.program_id(2) * K + tl.arange(0, K)
        r = tl.arange(0, R)
        some = tl.load(h + (row * tokens + at[:, None]) * R + r[None, :], mask=at[:, None] < tokens, other=0.0)
        factor = tl.load(
            B + (slot * rank + r[:, None]) * width + k[None, :],
            mask=(r[:, None] < used) & (k[None, :] < width), other=0.0,
        )  # fmt: skip
        place = y + (row * tokens + at[:, None]) * width + k[None, :]
        inside = (at[:, None] < tokens) & (k[None, :] < width)
        before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        after = before + tl.dot(some, factor.to(tl.float32), input_precision="ieee")
        tl.store(place, after.to(y.dtype.element_ty), mask=inside)


shrink, expand = triton.jit(_shrink), triton.jit(_expand)


def add_by_kernel(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, ranks: Tensor) -> Tensor:
    """Overwrite `y[i]` with `y[i] + (x[i] @ A[index[i]]^T) @ B[index[i]]`; see `batched.add_gathered`.

    y must be contiguous.
    """
    rows, tokens, width = x.shape
    if not rows * tokens * width:
        return y
    rank, out = A.shape[1], y.shape[2]
    R, tiles = max(triton.next_power_of_2(rank), 16), triton.cdiv(tokens, TOKENS)
    h = x.new_empty(rows, tokens, R, dtype=torch.float32)
    x, A, B, index, ranks = (tensor.contiguous() for tensor in (x, A, B, index, ranks))
    shrink[rows, tiles](x, A, index, ranks, h, tokens, width, rank, R=R, T=TOKENS, K=INPUTS)
    expand[rows, tiles, triton.cdiv(out, OUTPUTS)](h, B, index, ranks, y, tokens, out, rank, R=R, T=TOKENS, K=OUTPUTS)
    return y

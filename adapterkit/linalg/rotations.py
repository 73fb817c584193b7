"""Make rows orthonormal, make rotations from skew-symmetric matrices, and multiply blocks of a weight by rotations.

Linear algebra runs in float32 or wider, because libraries have no 16-bit solvers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, TypedDict, cast

from ..errors import Malformed, ShapeMismatch
from .namespace import N, Numbers, namespace

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Array


def block_size(pairs: int) -> int:
    """Return the integer b with `b * (b - 1) / 2 == pairs`, or 0 if there is none."""
    if pairs < 0:
        return 0
    b = (1 + math.isqrt(1 + 8 * pairs)) // 2
    return b if b * (b - 1) // 2 == pairs else 0


def skew(pairs: N) -> N:
    """Return skew-symmetric matrices `[..., b, b]` from `pairs`, `[..., b*(b-1)/2]`.

    `pairs` contains the elements above each matrix's diagonal, row by row.
    """
    xp, b = namespace(pairs), block_size(pairs.shape[-1])
    if b < 2:
        return xp.zeros((*pairs.shape[:-1], b, b), **_kind(pairs))
    i = xp.arange(b, device=_kind(pairs)["device"])
    row, column = i[:, None], i[None, :]
    # Select the elements with an index and a mask: an ONNX graph can express assignment to elements only in some cases.
    place = row * (2 * b - row - 1) // 2 + column - row - 1
    above = row < column
    upper = pairs[..., xp.where(above, place, place * 0)] * xp.astype(above, pairs.dtype)
    return upper - upper.mT


def cayley(Q: N) -> N:
    """Return `(I - Q) @ inverse(I + Q)`, shape `[..., b, b]`.

    If Q is skew-symmetric, the result is a rotation, and the result for -Q is the rotation's transpose.
    """
    return in_float32(lambda Q: namespace(Q).linalg.solve(identity(Q) + Q, identity(Q) - Q), Q)


def orthonormal_rows(R: N) -> N:
    """Orthonormalize the rows of R `[r, n]` by Gram-Schmidt; rows that are already orthonormal do not change.

    Raises:
        Malformed: the rows are linearly dependent. Training tools replace a dependent row by another direction, which
            the file does not store.
    """
    try:
        return in_float32(_orthonormal, R)
    except (ValueError, RuntimeError) as error:  # numpy's LinAlgError is a ValueError, and torch's is a RuntimeError.
        if not type(error).__name__.endswith("LinAlgError"):
            raise
        raise _dependent(R) from None


def _orthonormal(R: N) -> N:
    xp = namespace(R)
    square = R @ R.mT
    L = xp.linalg.cholesky(square)
    # Gram-Schmidt makes each row orthogonal to the earlier rows. If a row depends linearly on the earlier rows, the
    # result for this row consists only of rounding errors. Refuse such a row, because its direction is noise.
    if _has_values(R):
        left, was = xp.linalg.diagonal(L * L), xp.linalg.diagonal(square)
        if bool(xp.any(left <= 16 * len(R) * xp.finfo(R.dtype).eps * was)):
            raise _dependent(R)
    return xp.linalg.solve(L, R)


def _dependent(R: Numbers) -> Malformed:
    why = f"the {R.shape[0]} rows of length {R.shape[1]} are linearly dependent, so they cannot be made orthonormal"
    cure = "Initialize the projection with orthonormal rows and train again, or set orthogonality to False"
    return Malformed(why, where="projection", cure=cure)


def _has_values(array: object) -> bool:
    """Whether Python can read an array's values. It cannot in ONNX graphs, torch traces and functorch transforms."""
    import numpy as np

    if isinstance(array, np.ndarray):
        return True
    import torch

    if not isinstance(array, torch.Tensor) or torch.compiler.is_compiling() or array.is_meta:
        return False
    from torch._C._functorch import peek_interpreter_stack

    plain = type(array) in (torch.Tensor, torch.nn.Parameter)
    return plain and torch._C._get_tracing_state() is None and peek_interpreter_stack() is None


def neumann(Q: N, terms: int, doubled: bool = False) -> N:
    """Approximate `(I + Q) @ inverse(I - Q)` by a truncated Neumann series.

    The series is `I` for one term, `I + 2 Q` for two terms, and `I + 2 Q + ... + 2 Q^(n-2) + Q^(n-1)` for n > 3 terms.
    If `terms` is 3, the series with four terms is used. With `doubled`, the last term also has the factor 2, and three
    terms give `I + 2 Q + 2 Q^2`.
    """
    if doubled:
        # Add 0 * Q, so that the result has the leading axes of Q even if the series has only one term.
        R = power = identity(Q) + 0 * Q
        for _ in range(1, terms):
            power = power @ Q
            R = R + 2 * power
        return R
    R = identity(Q) + (2 * Q if terms > 1 else 0 * Q)
    power, count = Q, max(terms, 4) if terms > 2 else 2
    for exponent in range(2, count):
        power = power @ Q
        R = R + (2 if exponent < count - 1 else 1) * power
    return R


def shortened(Q: N, square: N, most: float, more: float) -> N:
    """Multiply Q by `most / (|Q| + more)` if `|Q| + more` exceeds `most`; `square` is `|Q|^2`.

    The gradient is finite even at `|Q| = 0`.
    """
    # If Q need not be shortened, take the square root of 1 instead of `square`. At `|Q| = 0`, the square root has an
    # infinite gradient, and the backward pass of `where` would multiply this gradient by 0, which gives NaN.
    where, long = namespace(Q).where, square > max(most - more, 0.0) ** 2
    norm = where(long, square, square * 0 + 1) ** 0.5
    return Q * where(long, most / (norm + more), norm * 0 + 1)


def shortened_blocks(Q: N, eps: float) -> N:
    """Limit the norm of each block of Q `[n, b, b]` to `eps / sqrt(n)`, as in COFT."""
    return shortened(Q, (Q * Q).sum((1, 2))[:, None, None], eps / len(Q) ** 0.5, 0.0)


def turned(Q: N, terms: int, doubled: bool) -> N:
    """Return rotations from skew-symmetric Q.

    If `terms` is 0, `cayley` computes the rotations. Otherwise, `neumann` approximates them. The two functions
    rotate in opposite directions: `neumann` approximates the transpose of `cayley`'s result.
    """
    return neumann(Q, terms, doubled) if terms else cayley(Q)


def turn_columns(X: N, R: N) -> N:
    """Multiply each block of b columns of X `[rows, n * b]` from the right by the transpose of a rotation.

    R has one rotation for each block, `[n, b, b]`, or one for all blocks, `[b, b]`.
    """
    blocks = X.reshape((len(X), -1, R.shape[-1])).swapaxes(0, 1)
    return (blocks @ R.mT).swapaxes(0, 1).reshape(X.shape)


def turn_rows(X: N, R: N) -> N:
    """Multiply each block of b rows of X `[n * b, ...]` from the left by the transpose of a rotation.

    R has one rotation for each block, `[n, b, b]`, or one for all blocks, `[b, b]`.
    """
    return (R.mT @ X.reshape((-1, R.shape[-1], math.prod(X.shape[1:])))).reshape(X.shape)


def identity(like: N) -> N:
    """Return one identity matrix `[b, b]` with the dtype and device of the square matrices `like` `[..., b, b]`."""
    return namespace(like).eye(like.shape[-1], **_kind(like))


def in_float32(f: Callable[[N], N], X: N) -> N:
    """Return f(X); for 16-bit inputs, compute in float32 and round the result."""
    xp = namespace(X)
    if xp.finfo(X.dtype).bits > 16:
        return f(X)
    return xp.astype(f(xp.astype(X, xp.float32)), X.dtype)


def singular(W: N) -> tuple[N, N, N]:
    """Return U, S and V^T of a weight `[out, in]`, computed by torch in float32 on the CPU, as in PEFT.

    The result's signs and last digits depend on the library that computes it, and adapters depend on these signs and
    digits. So torch computes the decomposition even if W is a numpy array.

    Raises:
        ShapeMismatch: the weight is not a matrix.
    """
    import torch

    if len(W.shape) != 2:
        why = f"a weight of shape {list(W.shape)} is not a matrix, so it has no singular values"
        raise ShapeMismatch(why, cure="Choose linear layers only")
    U, S, V = torch.linalg.svd(_on_host(W), full_matrices=False)
    return _like(W, U), _like(W, S), _like(W, V)


def singular_by_sketch(W: N, r: int, steps: int, seed: int) -> tuple[N, N, N]:
    """Return U `[out, r]`, S `[r]` and V^T `[r, in]` for W's r largest singular values.

    `torch.svd_lowrank` computes them with `steps` iterations from a random start. As in PEFT, torch's CPU generator
    with `seed` draws the random start, even if W is not a torch tensor.
    """
    import torch

    host = _on_host(W)
    with seeded(seed):
        U, S, V = torch.svd_lowrank(host, q=r, niter=steps)
    return _like(W, U), _like(W, S), _like(W, V.T.contiguous())


def _on_host(W: Numbers) -> torch.Tensor:
    """Return W as a float32 torch tensor on the CPU."""
    import numpy as np
    import torch

    return (W.detach() if isinstance(W, torch.Tensor) else torch.tensor(np.asarray(W))).to("cpu", torch.float32)


def _like(W: N, part: torch.Tensor) -> N:
    """Convert a CPU tensor to an array of W's library, with W's dtype and device."""
    import torch

    if isinstance(W, torch.Tensor):
        return cast(N, part.to(W))
    return cast(N, part.numpy().astype(cast("Array", W).dtype))


def _kind(array: Numbers) -> _Kind:
    from array_api_compat import device

    return {"dtype": array.dtype, "device": device(array)}


class _Kind(TypedDict):
    """The dtype and device of an array, as arguments of the functions that create arrays."""

    dtype: object
    device: object


# Seed torch's global generator for a block of code. Only one thread at a time can be in such a block.


_ONE_AT_A_TIME = RLock()
"""All threads share torch's generator. Without this lock, two threads would draw from one random sequence."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator for the block, and restore its state when the block ends.

    Use this for torch functions that accept no generator, such as `torch.svd_lowrank`. Other threads that enter
    `seeded` wait until the block ends. Threads that draw random numbers without `seeded` do not wait.
    """
    import torch

    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

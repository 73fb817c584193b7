"""The numerics of rotations against formulas in float64: one function of `linalg/rotations.py` at a time."""

import math
import threading

import numpy as np
import pytest
import torch

from adapterkit.errors import Malformed, ShapeMismatch
from adapterkit.linalg.rotations import (
    block_size,
    cayley,
    in_float32,
    neumann,
    orthonormal_rows,
    seeded,
    shortened,
    shortened_blocks,
    singular,
    skew,
    turn_columns,
    turn_rows,
    turned,
)

LIBRARIES = {"numpy": np.asarray, "torch": torch.from_numpy}


@pytest.fixture(params=LIBRARIES)
def array(request):
    """What makes an array of one library of numpy's."""
    return LIBRARIES[request.param]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def skewed(n, b, size=1.0):
    M = size * normal(n, b, b)
    return M - M.swapaxes(1, 2)


def close(got, exact, atol=1e-13):
    np.testing.assert_allclose(np.asarray(got), exact, rtol=0, atol=atol)


def test_the_size_of_a_triangle():
    sizes = {b * (b - 1) // 2: b for b in range(1, 40)}
    assert {pairs: block_size(pairs) for pairs in range(-3, 700)} == {p: sizes.get(p, 0) for p in range(-3, 700)}


@pytest.mark.parametrize("b", [1, 2, 3, 6])
def test_triangles_are_filled_row_by_row(b, array):
    pairs = normal(4, b * (b - 1) // 2)
    exact = np.zeros((4, b, b))
    exact[:, *np.triu_indices(b, 1)] = pairs
    close(skew(array(pairs)), exact - exact.swapaxes(1, 2), 0)


@pytest.mark.parametrize("b", [1, 2, 5])
def test_the_cayley_transform(b, array):
    Q = skewed(3, b)
    eye = np.eye(b)
    close(cayley(array(Q)), (eye - Q) @ np.linalg.inv(eye + Q))
    close(turned(array(Q), 0, False), (eye - Q) @ np.linalg.inv(eye + Q))


SERIES = {1: [1], 2: [1, 2], 3: [1, 2, 2, 1], 4: [1, 2, 2, 1], 5: [1, 2, 2, 2, 1], 7: [1, 2, 2, 2, 2, 2, 1]}
"""Factors of the powers of Q in PEFT's `_cayley_batch`, by `num_cayley_neumann_terms`."""

DOUBLED = {1: [1], 2: [1, 2], 3: [1, 2, 2], 5: [1, 2, 2, 2, 2]}
"""The same before PEFT 0.18."""


@pytest.mark.parametrize(
    ("terms", "doubled", "factors"),
    [*((terms, False, f) for terms, f in SERIES.items()), *((terms, True, f) for terms, f in DOUBLED.items())],
)
def test_the_series_term_by_term(terms, doubled, factors, array):
    Q = skewed(3, 4)
    exact = sum(f * np.linalg.matrix_power(Q, power) for power, f in enumerate(factors))
    for got in (neumann(array(Q), terms, doubled), turned(array(Q), terms, doubled)):
        assert got.shape == Q.shape
        close(got, np.broadcast_to(exact, Q.shape), 1e-11)


@pytest.mark.parametrize(
    ("norm", "most", "more", "scaled"),
    [
        (0.5, 1.0, 0.0, False),
        (0.5, 1.0, 0.49, False),
        (0.5, 1.0, 0.51, True),
        (3.0, 1.0, 0.25, True),
        (0.2, 0.1, 0.5, True),  # What is added exceeds the bound alone.
        (0.0, 1.0, 0.5, False),
    ],
)
def test_a_norm_is_bounded(norm, most, more, scaled, array):
    """As in LyCORIS: Q * most / (|Q| + more) where that is shorter."""
    Q = skewed(2, 3)
    Q = Q * norm / np.linalg.norm(Q)
    got = shortened(array(Q), (array(Q) * array(Q)).sum(), most, more)
    close(got, Q * most / (norm + more) if scaled else Q, 1e-15)


def test_the_bound_has_a_gradient_where_nothing_turns():
    Q = torch.zeros(1, 3, 3, dtype=torch.float64, requires_grad=True)
    shortened(Q, (Q * Q).sum(), 0.1, 0.5).sum().backward()
    np.testing.assert_array_equal(Q.grad, np.ones((1, 3, 3)))


def test_each_block_is_bounded_by_its_share(array):
    """COFT: the norms of n blocks are at most eps / sqrt(n)."""
    Q, eps = skewed(4, 3), 0.5
    lengths = np.array([0.1, 0.24, 0.26, 7.0])
    Q = Q * (lengths / np.linalg.norm(Q, axis=(1, 2)))[:, None, None]
    exact = Q * (np.minimum(lengths, eps / math.sqrt(4)) / lengths)[:, None, None]
    close(shortened_blocks(array(Q), eps), exact, 1e-15)


def diagonal(R, n):
    """Place each block of R, or n times the only one, on the diagonal of a matrix."""
    blocks = list(R) if R.ndim == 3 and len(R) == n else [R.reshape(R.shape[-2:])] * n
    whole = np.zeros((n * R.shape[-1],) * 2)
    for at, block in enumerate(blocks):
        here = slice(at * len(block), (at + 1) * len(block))
        whole[here, here] = block
    return whole


@pytest.mark.parametrize("blocks", [(3, 4, 4), (1, 4, 4), (4, 4)])
def test_blocks_turn_rows_and_columns(blocks, array):
    R, X = normal(*blocks), normal(12, 12, seed=1)
    whole = diagonal(R, 3)
    close(turn_columns(array(X), array(R)), X @ whole.T)
    close(turn_columns(array(X[:5]), array(R)), X[:5] @ whole.T)
    close(turn_rows(array(X), array(R)), whole.T @ X)
    kernel = normal(12, 2, 3, seed=2)
    close(turn_rows(array(kernel), array(R)), np.einsum("ji,jkl->ikl", whole, kernel))


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_are_orthonormalized_in_order(rows, array):
    """Gram-Schmidt is the QR decomposition whose R has a positive diagonal."""
    R = normal(rows, 5)
    Q, upper = np.linalg.qr(R.T)
    close(orthonormal_rows(array(R)), (Q * np.sign(np.diag(upper))).T, 1e-12)
    close(orthonormal_rows(array(Q.T.copy())), Q.T, 1e-14)


def rounded_sum():
    """Three rows, the last the sum of the others: rounding leaves it a length above 0."""
    R = normal(3, 7, seed=3) / 3
    R[2] = R[0] + R[1]
    return R


@pytest.mark.parametrize("R", [np.zeros((2, 4)), np.ones((3, 7)), rounded_sum(), normal(4, 3)])
def test_rows_that_depend_on_each_other_are_refused(R, array):
    with pytest.raises(Malformed, match=f"{len(R)} rows of length {R.shape[1]} are linearly dependent") as raised:
        orthonormal_rows(array(R))
    assert "orthogonality to False" in raised.value.cure


def test_rows_that_nearly_depend_are_kept(array):
    """A direction of 1e-3 is far above float64's rounding."""
    R = normal(3, 7, seed=3)
    R[2] = R[0] + R[1] + 1e-3 * R[2]
    got = np.asarray(orthonormal_rows(array(R)))
    close(got @ got.T, np.eye(3), 1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    Q = torch.from_numpy(skewed(2, 4)).to(dtype)
    wide = Q.double().numpy()
    exact = (np.eye(4) - wide) @ np.linalg.inv(np.eye(4) + wide)
    got = cayley(Q)
    assert got.dtype == dtype
    nearest = torch.from_numpy(exact).float().to(dtype)
    # float32 may fall on the other side of a tie, which no element does here.
    torch.testing.assert_close(got, nearest, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "used"),
    [
        (torch.float8_e4m3fn, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_numbers_are_computed_in_float32_or_wider(dtype, used):
    seen = []
    got = in_float32(lambda X: seen.append(X.dtype) or X + 1, torch.zeros(2, 2).to(dtype))
    assert (seen, got.dtype) == ([used], dtype)
    assert torch.equal(got.float(), torch.ones(2, 2))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_singular_values_are_torch_s_in_float32(shape, array):
    W = normal(*shape)
    U, S, V = singular(array(W))
    np.testing.assert_array_equal(S, torch.linalg.svd(torch.from_numpy(W).float(), full_matrices=False)[1])
    close((np.asarray(U) * np.asarray(S)) @ np.asarray(V), W, 1e-5)
    assert all(part.dtype == array(W).dtype for part in (U, S, V))


def test_a_kernel_has_no_singular_values():
    with pytest.raises(ShapeMismatch, match=r"\[2, 3, 4\] is not a matrix") as raised:
        singular(np.zeros((2, 3, 4)))
    assert "linear layers" in raised.value.cure


def test_a_seed_holds_for_a_block_and_one_thread_at_a_time():
    torch.manual_seed(5)
    wanted, first = torch.rand(3), torch.Generator().manual_seed(9)
    torch.manual_seed(5)
    entered = threading.Event()

    def draw():
        with seeded(9):
            entered.set()

    with seeded(9):
        other = threading.Thread(target=draw)
        other.start()
        assert not entered.wait(0.05)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=first))
    other.join()
    assert entered.is_set()
    assert torch.equal(torch.rand(3), wanted)

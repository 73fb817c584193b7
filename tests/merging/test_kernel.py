"""The compiled loop of a merge gives the bits of numpy's float64 path, or says that it cannot."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled_loops import needs_loops
from hypothesis import given
from hypothesis import strategies as st

from adapterkit import native
from adapterkit.io.lazy import DTYPES
from adapterkit.merging import compiled as compiled_loops
from adapterkit.merging.compiled import WRITTEN, LowRankSum, NormalizedSum
from adapterkit.native import KINDS

ROOT = Path(__file__).resolve().parents[2]

compiled = needs_loops


@pytest.fixture(scope="module", params=[8, 16], autouse=True)
def lanes(request: pytest.FixtureRequest) -> Iterator[int | None]:
    """How many numbers are computed at a time; where there is no AVX-512, both are 8."""
    loaded = native.loops()
    yield None if loaded is None else loaded.adapterkit_lanes(request.param)
    if loaded is not None:
        loaded.adapterkit_lanes(native.MOST_LANES)


@compiled
def test_lanes_are_as_many_as_asked_for_at_most(lanes: int) -> None:
    assert lanes in (8, 16)
    assert native.loops().adapterkit_lanes(8) == 8
    assert native.loops().adapterkit_lanes(lanes) == lanes


def expected(weight: np.ndarray, change: np.ndarray, target: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (weight.astype(np.float64) + change).astype(DTYPES[target].array)


def made(weight: np.ndarray, left: np.ndarray, right: np.ndarray, source: str, target: str) -> np.ndarray | None:
    out = np.empty(weight.shape, DTYPES[target].array)
    added = LowRankSum(left, right)
    kinds = DTYPES[source], DTYPES[target]
    settled = added.write(weight.reshape(-1), out.reshape(-1), kinds, 0, len(weight))
    return None if settled is None else out


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


@compiled
@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("rank", [1, 7, 16, 33, 256])
def test_bits_are_those_of_float64(source: str, target: str, rank: int) -> None:
    rng = np.random.default_rng(rank)
    # Neither rows nor columns fill whole tiles.
    weight = (0.02 * rng.standard_normal((91, 773))).astype(DTYPES[source].array)
    left, right = 0.1 * rng.standard_normal((91, rank)), 0.1 * rng.standard_normal((rank, 773))
    ours = made(weight, left, right, source, target)
    assert ours is not None
    assert np.array_equal(bits(ours), bits(expected(weight, left @ right, target)))


@compiled
@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("below", [0.0, 2.0**-26, -(2.0**-26), 2.0**-44, -(2.0**-44)])
def test_sums_at_and_beside_a_tie(target: str, below: float) -> None:
    digits = {"BF16": 7, "F16": 10}[target]
    # One row sums to ties exactly, or off by so little that float32 cannot tell.
    weight = (1 + np.arange(64) * 2.0**-digits).astype(DTYPES["F32"].array)[None].repeat(5, 0)
    left = np.ones((5, 2))
    right = np.stack([np.full(64, 2.0 ** -(digits + 1)), np.full(64, below)])
    ours = made(weight, left, right, "F32", target)
    wanted = expected(weight, left @ right, target)
    # numpy decides a tie of float16 itself: its own float64 sum could lie on either side. bfloat16 goes by float32, in
    # which both sides are the same number.
    if below == 0.0 and target == "F16":
        assert ours is None
    else:
        assert ours is not None
        assert np.array_equal(bits(ours), bits(wanted))


@compiled
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
    st.floats(-30, 30),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(WRITTEN),
)
def test_any_scale(seed: int, base: float, factor: float, source: str, target: str) -> None:
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        weight = (10.0**base * rng.standard_normal((9, 40))).astype(DTYPES[source].array)
    left, right = rng.standard_normal((9, 5)), 10.0**factor * rng.standard_normal((5, 40))
    left[2], right[:, 3] = 0, 0
    ours = made(weight, left, right, source, target)
    wanted = expected(weight, left @ right, target)
    assert ours is None or np.array_equal(bits(ours), bits(wanted))


@compiled
@pytest.mark.parametrize("target", WRITTEN)
def test_zeros_keep_their_sign(target: str) -> None:
    weight = np.array([[0.0, -0.0] * 20] * 6).astype(DTYPES[target].array)
    left, right = np.zeros((6, 3)), np.ones((3, 40))
    ours = made(weight, left, right, target, target)
    assert ours is not None
    assert np.array_equal(bits(ours), bits(expected(weight, left @ right, target)))


@compiled
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_left_to_numpy(value: float) -> None:
    weight = np.ones((8, 32), DTYPES["BF16"].array)
    weight[3, 5] = value
    assert made(weight, np.ones((8, 1)), np.ones((1, 32)), "BF16", "BF16") is None


def normalized(weight: np.ndarray, m: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Equation 5 of the paper of DoRA, in float64."""
    V = weight.astype(np.float64) + left @ right
    return V * (m / np.sqrt((V * V).sum(1)))[:, None]


def scaled(
    weight: np.ndarray, m: np.ndarray, left: np.ndarray, right: np.ndarray, kinds: tuple[str, str]
) -> tuple[np.ndarray, float] | None:
    source, target = (DTYPES[kind] for kind in kinds)
    out = np.empty(weight.shape, target.array)
    update = NormalizedSum(m, left, right)
    norm = update.write(weight.reshape(-1), out.reshape(-1), (source, target), 0, len(weight))
    return None if norm is None else (out, norm)


@compiled
@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize(("rows", "width", "rank"), [(91, 773, 1), (64, 2048, 16), (7, 5, 33), (18, 1600, 64)])
def test_rows_scaled_to_a_magnitude_have_the_bits_of_float64(
    source: str, target: str, rows: int, width: int, rank: int
) -> None:
    rng = np.random.default_rng(rank)
    weight = (0.02 * rng.standard_normal((rows, width))).astype(DTYPES[source].array)
    left, right = 0.1 * rng.standard_normal((rows, rank)), 0.1 * rng.standard_normal((rank, width))
    m = rng.standard_normal(rows)
    ours = scaled(weight, m, left, right, (source, target))
    assert ours is not None
    wanted = normalized(weight, m, left, right)
    assert np.array_equal(bits(ours[0]), bits(wanted.astype(DTYPES[target].array)))
    assert ours[1] == pytest.approx(((wanted - weight.astype(np.float64)) ** 2).sum(), rel=1e-9)


@compiled
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-30, 30),
    st.floats(-30, 30),
    st.floats(-30, 30),
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(WRITTEN),
)
def test_scaled_rows_of_any_size(
    seed: int, base: float, factor: float, magnitude: float, source: str, target: str
) -> None:
    rng = np.random.default_rng(seed)
    # float16 rounds small weights to zeros, and row 2 has no change: its norm can be 0.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        weight = (10.0**base * rng.standard_normal((9, 40))).astype(DTYPES[source].array)
        left, right = rng.standard_normal((9, 5)), 10.0**factor * rng.standard_normal((5, 40))
        left[2], right[:, 3] = 0, 0
        m = 10.0**magnitude * rng.standard_normal(9)
        ours = scaled(weight, m, left, right, (source, target))
        wanted = normalized(weight, m, left, right).astype(DTYPES[target].array)
    assert ours is None or np.array_equal(bits(ours[0]), bits(wanted))


@compiled
@pytest.mark.parametrize("target", WRITTEN)
def test_scaled_rows_at_a_tie_and_at_zeros(target: str) -> None:
    """A row of ones with a norm of exactly 8 is scaled to ties of the output, and zeros keep their signs."""
    digits = {"BF16": 7, "F16": 10}[target]
    weight = np.ones((3, 64), DTYPES["F32"].array)
    m = 8 * (1 + np.arange(3) * 2.0**-digits + 2.0 ** -(digits + 1))
    wanted = normalized(weight, m, np.zeros((3, 1)), np.zeros((1, 64))).astype(DTYPES[target].array)
    ours = scaled(weight, m, np.zeros((3, 1)), np.zeros((1, 64)), ("F32", target))
    assert ours is None or np.array_equal(bits(ours[0]), bits(wanted))
    weight = np.array([[1.0, 0.0, -0.0, -2.0] * 10] * 6).astype(DTYPES[target].array)
    left, right, m = np.zeros((6, 3)), np.ones((3, 40)), -np.ones(6)
    ours = scaled(weight, m, left, right, (target, target))
    assert ours is not None
    assert np.array_equal(bits(ours[0]), bits(normalized(weight, m, left, right).astype(DTYPES[target].array)))


@compiled
@pytest.mark.parametrize(("at", "value"), [(5, np.nan), (5, np.inf), (slice(None), 0.0), (slice(None), 1e30)])
def test_rows_without_a_norm_in_range_are_left_to_numpy(at: int | slice, value: float) -> None:
    weight = np.ones((8, 32), DTYPES["BF16"].array)
    weight[3, at] = value
    left, right = np.zeros((8, 1)), np.zeros((1, 32))
    if value == 1e30:
        left[3], right[0] = 1e200, 1e200
    assert scaled(weight, np.ones(8), left, right, ("BF16", "BF16")) is None


@compiled
def test_a_magnitude_beyond_the_output_is_left_to_numpy() -> None:
    """numpy's path then raises the error that names the tensor."""
    weight = np.ones((8, 32), DTYPES["F16"].array)
    m = np.full(8, 1e7)
    assert scaled(weight, m, np.zeros((8, 1)), np.zeros((1, 32)), ("F16", "F16")) is None


@compiled
def test_factors_beyond_float32_are_left_to_numpy() -> None:
    weight = np.ones((8, 32), DTYPES["F32"].array)
    left, right = np.full((8, 1), 1e200), np.full((1, 32), 1e-200)
    ours = made(weight, left, right, "F32", "BF16")
    assert ours is None or np.array_equal(bits(ours), bits(expected(weight, left @ right, "BF16")))


@compiled
def test_small_numbers_count_in_a_thread_that_flushes_them() -> None:
    rng = np.random.default_rng(0)
    weight = (1e-39 * rng.standard_normal((12, 64))).astype(DTYPES["BF16"].array)
    left, right = np.zeros((12, 2)), 1e-39 * rng.standard_normal((2, 64))
    left[::2] = 1.0
    wanted = expected(weight, left @ right, "BF16")
    flushes = torch.set_flush_denormal(True)
    try:
        ours = made(weight, left, right, "BF16", "BF16")
    finally:
        torch.set_flush_denormal(False)
    assert flushes, "this processor cannot flush; the test shows nothing"
    assert ours is not None
    assert np.array_equal(bits(ours), bits(wanted))


@compiled
def test_a_library_of_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    native.loops.cache_clear()
    try:
        assert native.loops() is None
    finally:
        native.loops.cache_clear()


@pytest.mark.parametrize("word", ["off", "0"])
def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv(native.OFF, word)
    native.loops.cache_clear()
    try:
        assert native.loops() is None
    finally:
        native.loops.cache_clear()


@compiled
def test_the_bound_of_the_roundings_holds() -> None:
    """Sums in float32, in the order of the compiled loop and with a product rounded by itself, stay in the bound."""
    rng = np.random.default_rng(3)
    for rank in (1, 5, 16, 17, 40, 250):
        left, right = rng.standard_normal((64, rank)), rng.standard_normal((rank, 48))
        total = np.zeros((64, 48), np.float32)
        for first in range(0, rank, compiled_loops.CHUNK):
            part = np.zeros((64, 48), np.float32)
            for k in range(first, min(first + compiled_loops.CHUNK, rank)):
                part += left[:, k, None].astype(np.float32) * right[None, k].astype(np.float32)
            total += part
        summed = LowRankSum(left, right)
        bound = np.multiply.outer(summed._row_bound.astype(float), summed._column_bound[:48].astype(float))
        off = np.abs(total - left @ right)
        assert (off <= bound).all()
        # A bound that is far too wide would send everything to float64.
        assert off.max() > bound.min() / 200


@pytest.mark.parametrize(
    ("file", "name", "structure"),
    [("merge.c", "Factors", compiled_loops._Factors), ("normalize.c", "Normalized", compiled_loops._Normalized)],
)
def test_ctypes_reads_the_fields_that_c_has(file: str, name: str, structure: type[ctypes.Structure]) -> None:
    source = (ROOT / "adapterkit" / "native" / file).read_text("utf-8")
    body = source[source.rindex("typedef struct {", 0, source.index(f"}} {name};")) : source.index(f"}} {name};")]
    names = [line.split(";")[0].split()[-1].lstrip("*") for line in body.splitlines()[1:] if ";" in line]
    assert names == [field[0] for field in structure._fields_]
    assert ctypes.sizeof(structure) == 8 * len(names)

"""Comparison against the same numbers from dense matrices in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit import ops
from adapterkit.core.adapter import Adapter, Target
from adapterkit.core.updates import OutputUpdate, tensor
from adapterkit.errors import Malformed, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

TARGET = Target("q")


def lora(seed, rank=3, out=9, columns=(14,), lead=(), dtype=np.float64, **fields):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(*lead, rank, *columns)), rng.normal(size=(*lead, out, rank))
    return METHODS["lora"](A=from_numpy(A.astype(dtype)), B=from_numpy(B.astype(dtype)), **fields)


def dense(update):
    A, B = update.A.numpy().astype(float), update.B.numpy().astype(float)
    return update.scaling * B @ A.reshape(*B.shape[:-2], B.shape[-1], -1)


@pytest.mark.parametrize("whole", [False, True])
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 9))
def test_numbers_of_two_changes(whole, r, s, seed):
    one, other = lora(seed, r, scaling=0.5), lora(seed + 1, s, scaling=-2.0)
    X, Y = dense(one), dense(other)
    if whole:
        other = METHODS["dense"](D=from_numpy(Y))
    found = ops.compare(Adapter({TARGET: (one,)}), Adapter({TARGET: (other,)}))
    (got,) = found.targets
    x, y = np.linalg.norm(X), np.linalg.norm(Y)
    close(got.norm_a, x)
    close(got.norm_b, y)
    close(got.relative_error, np.linalg.norm(X - Y) / max(x, y))
    close(got.cosine, (X * Y).sum() / (x * y))
    for value, D in ((got.effective_rank_a, X), (got.effective_rank_b, Y)):
        p = np.linalg.svd(D, compute_uv=False)
        p = p[p > 1e-13 * p[0]] / p.sum()
        close(value, math.exp(-(p * np.log(p)).sum()))
    for value, (P, k), (Q, n) in (
        (got.overlap_out, (X, r), (Y, s)),
        (got.overlap_in, (X.T, r), (Y.T, s)),
    ):
        spans = [np.linalg.svd(D)[0][:, :rank] for D, rank in ((P, k), (Q, n))]
        close(value, np.linalg.norm(spans[0].T @ spans[1]) ** 2 / min(r, s))
    close(got.sign_conflict, (X * Y < 0).mean())
    close(got.interference, 1 - np.abs(X + Y).sum() / (np.abs(X).sum() + np.abs(Y).sum()))
    assert (got.bits, got.equal, found.equal) == (False, False, False)


def close(one, other):
    assert math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9)


@given(st.integers(0, 2**32 - 1))
def test_the_same_function_in_another_guise_is_equal(seed):
    rng = np.random.default_rng(seed)
    update, R = lora(seed), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    turned = METHODS["lora"](A=from_numpy(R.T @ update.A.numpy()), B=from_numpy(2 * update.B.numpy() @ R), scaling=0.5)
    full = METHODS["dense"](D=from_numpy(dense(update)))
    apart = (update.replace(scaling=0.25), turned.replace(scaling=0.375))
    for other in ((turned,), (full,), apart):
        found = ops.compare(Adapter({TARGET: (update,)}), Adapter({TARGET: other}))
        assert (found.equal, found.targets[0].bits) == (True, False)
    found = ops.compare(Adapter({TARGET: (update,)}), Adapter({TARGET: (update.replace(scaling=1 + 1e-5),)}))
    assert found.equal is False
    assert found.relative_error == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e-30, 1e-30), (1e20, 1e-3), (1e-9, 1e9), (1.0, 1e-20)])
@pytest.mark.parametrize("narrow", [np.float32, np.float16])
def test_elements_of_narrow_factors_are_those_of_float64(sizes, narrow):
    """Signs and shares of products that are formed in float32, for factors far from 1 and from each other."""
    if narrow == np.float16 and max(sizes) / min(sizes) > 1:
        sizes = (1.0, 2.0)
    if narrow == np.float16 and sizes[0] < 1e-3:
        sizes = (1e-3, 1e-3)
    one, other = (
        METHODS["lora"](
            A=from_numpy((size * np.random.default_rng([t, 1]).normal(size=(4, 300))).astype(narrow)),
            B=from_numpy(np.random.default_rng([t, 2]).normal(size=(200, 4)).astype(narrow)),
        )
        for t, size in enumerate(sizes)
    )
    X, Y = dense(one), dense(other)
    (got,) = ops.compare(Adapter({TARGET: (one,)}), Adapter({TARGET: (other,)})).targets
    assert abs(got.sign_conflict - (X * Y < 0).sum() / (X * Y != 0).sum()) <= 1e-5
    expected = 1 - np.abs(X + Y).sum() / (np.abs(X).sum() + np.abs(Y).sum())
    assert abs(got.interference - expected) <= 1e-6


@pytest.mark.parametrize("apart", [1.0, 1e-3, 1e-6, 1e-9])
def test_a_small_difference_of_large_factors_is_measured(apart):
    """Against dense float64: the decomposition must not lose what two nearly equal adapters differ in."""
    one = lora(0, 8, 300, (400,))
    moved = one.replace(B=from_numpy(one.B.numpy() + apart * np.random.default_rng(5).normal(size=(300, 8))))
    (got,) = ops.compare(Adapter({TARGET: (one,)}), Adapter({TARGET: (moved,)}), signs=False).targets
    X, Y = dense(one), dense(moved)
    expected = np.linalg.norm(X - Y) / max(np.linalg.norm(X), np.linalg.norm(Y))
    assert abs(got.relative_error - expected) <= 1e-6 * expected + 1e-15


def test_equal_bits_are_found_across_files(tmp_path):
    dense_bias = METHODS["dense"](d=from_numpy(np.ones(3)))
    adapter = Adapter({TARGET: (lora(0, dtype=np.float32),), Target("b"): (dense_bias,)})
    for name in ("one", "two"):
        ak.write(adapter, tmp_path / f"{name}.safetensors")
    found = ops.compare(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert (found.equal, [each.bits for each in found.targets]) == (True, [True, True])
    assert found.relative_error == 0


def test_biases_count():
    one, other = (lora(0, bias=from_numpy(np.full(9, b))) for b in (1.0, 1.5))
    found = ops.compare(Adapter({TARGET: (one,)}), Adapter({TARGET: (other,)}))
    size = math.sqrt(np.linalg.norm(dense(one)) ** 2 + 9 * 1.5**2)
    assert found.equal is False
    close(found.relative_error, 1.5 / size)
    alone = ops.compare(
        Adapter({TARGET: (METHODS["dense"](d=from_numpy(np.ones(9))),)}),
        Adapter({TARGET: (METHODS["dense"](d=from_numpy(2 * np.ones(9))),)}),
    )
    assert (alone.targets[0].relative_error, alone.targets[0].cosine) == (0.5, 1.0)


def test_stacked_experts_and_targets_of_one_alone():
    target = Target("e", "e out *in")
    one, other = lora(0, lead=(2,)), lora(1, lead=(2,))
    found = ops.compare(Adapter({target: (one,), TARGET: (lora(2),)}), Adapter({target: (other,)}), signs=False)
    X, Y, Z = dense(one), dense(other), dense(lora(2))
    both, alone = found.targets
    close(both.relative_error, np.linalg.norm(X - Y) / max(np.linalg.norm(X), np.linalg.norm(Y)))
    close(both.cosine, (X * Y).sum() / (np.linalg.norm(X) * np.linalg.norm(Y)))
    assert (alone.equal, alone.relative_error, alone.norm_b, alone.cosine) == (False, 1.0, 0.0, None)
    assert both.sign_conflict is None
    squares = [(D * D).sum() for D in (X, Y, Z)]
    close(found.cosine, (X * Y).sum() / math.sqrt((squares[0] + squares[2]) * squares[1]))
    a, b = squares[0] + squares[2], squares[1]
    close(found.relative_error, math.sqrt((((X - Y) ** 2).sum() + squares[2]) / max(a, b)))


def test_formulas_that_need_the_weight_are_compared_by_their_fields_or_at_a_base(base):
    scales = np.random.default_rng(0).normal(size=9)
    ia3 = METHODS["ia3"](l=from_numpy(scales))
    narrow = METHODS["ia3"](l=from_numpy(scales.astype(np.float32)))
    wide = METHODS["ia3"](l=from_numpy(scales.astype(np.float32).astype(float)))
    other = METHODS["ia3"](l=from_numpy(scales + 1))

    def compared(a, b, **options):
        return ops.compare(Adapter({TARGET: (a,)}), Adapter({TARGET: (b,)}), **options)

    assert (compared(ia3, ia3).equal, compared(narrow, wide).equal) == (True, True)
    assert compared(ia3, other).equal is None
    W = np.random.default_rng(1).normal(size=(9, 14))
    model = base({"q.weight": W})
    found = compared(ia3, other, base=model)
    assert found.equal is False
    X, Y = (scales[:, None] * W - W), scales[:, None] * W
    assert found.relative_error == pytest.approx(np.linalg.norm(Y - X) / max(map(np.linalg.norm, (X, Y))), rel=1e-6)
    lowered = METHODS["dense"](D=from_numpy(X))
    assert compared(ia3, lowered, base=model).equal is True


class Bottleneck(OutputUpdate):
    """A made-up formula on outputs."""

    down: object = tensor("r in")


def test_formulas_of_outputs_are_the_same_when_their_fields_are(base):
    one, same, other = (Adapter({TARGET: (Bottleneck(down=from_numpy(np.full((2, 3), v))),)}) for v in (1.0, 1.0, 2.0))
    model = base({"q.weight": np.ones((3, 3))})
    for options in ({}, {"base": model}):
        assert ops.compare(one, same, **options).equal is True
        assert ops.compare(one, other, **options).equal is None


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf])
def test_bad_comparisons_are_refused(tolerance):
    adapter = Adapter({TARGET: (lora(0),)})
    with pytest.raises(UsageError, match="tolerance"):
        ops.compare(adapter, adapter, tolerance=tolerance)
    with pytest.raises(UsageError, match="no target in common"):
        ops.compare(adapter, Adapter({Target("k"): (lora(0),)}))


def test_a_change_of_nothing():
    still = lora(0).replace(B=from_numpy(np.zeros((9, 3))))
    found = ops.compare(Adapter({TARGET: (still,)}), Adapter({TARGET: (still.replace(scaling=2.0),)}))
    assert (found.equal, found.relative_error, found.cosine) == (True, 0.0, None)
    assert found.targets[0].effective_rank_a == 0.0


@pytest.mark.parametrize("kind", ["well", "dependent", "zero", "tiny", "graded"])
def test_the_qr_of_tall_factors_is_numpys_to_rounding(kind: str) -> None:
    from adapterkit.ops.lowrank import orthonormal

    rng = np.random.default_rng(0)
    tall = rng.standard_normal((200, 6))
    tall = {
        "well": tall, "dependent": np.hstack([tall[:, :5], tall[:, :1]]), "zero": 0 * tall, "tiny": 1e-200 * tall,
        "graded": tall * 10.0 ** -np.arange(0, 24, 4),
    }[kind]  # fmt: skip
    Q, R = orthonormal(tall)
    assert np.abs(Q.T @ Q - np.eye(6)).max() < 1e-13
    assert np.abs(Q @ R - tall).max() <= 1e-14 * np.abs(tall).max()


@pytest.mark.parametrize("op", [lambda a: ops.compare(a, a.step("read")), lambda a: ops.resize(a, rank=1)])
def test_numbers_that_are_too_large_name_their_target(op):
    A, B = (np.full(shape, 1e150) for shape in ((2, 4), (3, 2)))
    B[0, 0] = -1e150
    adapter = Adapter({Target("layers.0.q"): (METHODS["lora"](A=from_numpy(A), B=from_numpy(B)),)})
    with pytest.raises(Malformed, match=r"layers\.0\.q: the values of the change are too large"):
        op(adapter)


@pytest.mark.parametrize("op", [ak.ops.add, ak.combine], ids=["add", "combine"])
def test_a_parameter_and_its_module_are_one_target(op):
    """PEFT adapts routers of experts as the parameter `gate.weight`; `extract` names the module `gate`."""
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 6)), rng.standard_normal((4, 2))
    one, other = (
        ak.Adapter({ak.Target(path): (ak.METHODS["lora"](A=A, B=B),)}) for path in ("mlp.gate.weight", "mlp.gate")
    )
    assert ak.diff(one, other).equal
    both = op([one, other])
    assert [target.path for target in both.updates] == ["mlp.gate"]

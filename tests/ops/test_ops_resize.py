"""Other ranks against the SVD of the dense change in float64: no factors of a rank are better (Eckart and Young)."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit import ops
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import Unsupported, UsageError
from adapterkit.io.lazy import as_array, from_numpy
from adapterkit.methods import METHODS
from adapterkit.ops.sketching import EXCESS, SMALL, Criterion, dominant, exact

TARGET = Target("q")


def lora(B, A, **fields):
    return METHODS["lora"](A=from_numpy(A), B=from_numpy(B), **fields)


def random_lora(seed, out=12, columns=(20,), rank=6, decay=0.5, lead=()):
    """Factors whose product has singular values that fall off."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(*lead, rank, *columns))
    B = rng.normal(size=(*lead, out, rank)) * decay ** np.arange(rank)
    return lora(B, A, scaling=1.5)


def dense(update):
    """The change of a LoRA in float64, `[out, in * k]`, experts in front."""
    A, B = (np.asarray(as_array(leaf), np.float64) for leaf in (update.A, update.B))
    return update.scaling * B @ A.reshape(*B.shape[:-2], B.shape[-1], -1)


def best(D, rank):
    U, S, Vh = np.linalg.svd(D, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.sampled_from([(20,), (4, 3, 3)]), st.sampled_from([(), (3,)]))
def test_no_factors_of_the_rank_are_better(seed, rank, columns, lead):
    update, cuts = random_lora(seed, columns=columns, lead=lead), []
    target = Target("q", "e out *in" if lead else "out *in")
    (made,) = ops.resize(Adapter({target: (update,)}), rank, report=cuts.append).updates[target]
    D, kept = dense(update), min(rank, 6)
    assert made.A.shape == (*lead, kept, *columns)
    error, least = (float(np.linalg.norm(D - other)) for other in (dense(made), best(D, rank)))
    assert error <= least + 1e-6 * float(np.linalg.norm(D))
    assert [(cut.target, cut.method, cut.before, cut.rank) for cut in cuts] == [("q", "lora", 6, kept)]
    assert math.isclose(cuts[0].norm, float(np.linalg.norm(D)), rel_tol=1e-12)
    assert math.isclose(cuts[0].error, error, rel_tol=1e-6, abs_tol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_another_gauge_is_the_same_adapter(seed, rank):
    """B R and R^-1 A have the product of B and A, whatever the invertible R."""
    update, R = random_lora(seed), np.random.default_rng(seed).normal(size=(6, 6)) + 3 * np.eye(6)
    other = lora(update.B.numpy() @ R, np.linalg.solve(R, update.A.numpy()), scaling=update.scaling)
    made = [dense(ops.resize(Adapter({TARGET: (u,)}), rank).updates[TARGET][0]) for u in (update, other)]
    # Of two nearly equal singular values at the cut, either may be kept.
    S = np.linalg.svd(dense(update), compute_uv=False)
    if S[rank] < 0.9 * S[rank - 1]:
        np.testing.assert_allclose(made[0], made[1], atol=1e-5 * S[0])


@pytest.mark.parametrize(
    ("name", "value"), [("energy", 0.5), ("energy", 0.99), ("energy", 1), ("error", 0.3), ("frobenius", 2.0)]
)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_rank_is_the_smallest_that_is_enough(name, value, seed):
    update, cuts = random_lora(seed), []
    ops.resize(Adapter({TARGET: (update,)}), **{name: value}, report=cuts.append)
    S = np.linalg.svd(dense(update), compute_uv=False)[:6]
    lost = np.array([np.sqrt((S[k:] ** 2).sum()) for k in range(7)])
    limit = limit_of(name, value, lost[0])
    assert cuts[0].rank == max(1, int(np.flatnonzero(lost <= limit + 1e-12 * lost[0])[0]))


def limit_of(name, value, norm):
    """The Frobenius norm that may be left out."""
    return math.sqrt(1 - value) * norm if name == "energy" else value * norm if name == "error" else value


def several():
    return Adapter({
        Target("a"): (random_lora(1, decay=0.9),), Target("b"): (random_lora(2, decay=0.3),),
        Target("c"): (lora(np.full((12, 1), 1e-6), np.full((1, 20), 1e-6)),),
    })  # fmt: skip


@pytest.mark.parametrize(("criterion", "count"), [({"rank": 3}, 9), ({"rank": 1}, 3)])
def test_targets_compete_for_the_rank_on_average(criterion, count):
    adapter, cuts = several(), []
    made = ops.resize(adapter, **criterion, scope="all", report=cuts.append)
    spectra = {t.path: np.linalg.svd(dense(u), compute_uv=False) for t, u in adapter}
    pooled = sorted(((s, path) for path, S in spectra.items() for s in S[:6]), reverse=True)[:count]
    wanted = {path: sum(owner == path for _, owner in pooled) for path in spectra}
    assert {cut.target: cut.rank for cut in cuts} == wanted
    assert wanted["c"] == 0
    assert {target.path for target in made.updates} == {path for path, n in wanted.items() if n}
    lost = [cut.relative for cut in cuts if cut.target == "c"]
    assert lost == [1.0], "what is left out altogether is told"
    squares = sum(s * s for S in spectra.values() for s in S)
    left = squares - sum(s * s for s, _ in pooled)
    assert math.isclose(made.recipe[-1].args["error_of_all"], math.sqrt(left / squares), rel_tol=1e-5)


@pytest.mark.parametrize("criterion", [{"energy": 0.9}, {"error": 0.2}, {"frobenius": 4.0}])
def test_an_error_for_all_targets_together_takes_the_smallest_sum_of_ranks(criterion):
    adapter, cuts = several(), []
    ops.resize(adapter, **criterion, scope="all", report=cuts.append)
    pooled = np.sort(np.concatenate([np.linalg.svd(dense(u), compute_uv=False) for _, u in adapter]))[::-1]
    lost = np.array([np.sqrt((pooled[k:] ** 2).sum()) for k in range(len(pooled) + 1)])
    (name, value), = criterion.items()  # fmt: skip
    limit = limit_of(name, value, lost[0])
    assert sum(cut.rank for cut in cuts) == int(np.flatnonzero(lost <= limit)[0])


def test_everything_else_stays_as_it_is():
    rng = np.random.default_rng(0)
    head = METHODS["replacement"](bias=from_numpy(rng.normal(size=12)))
    whole, norm = (METHODS["dense"](D=from_numpy(rng.normal(size=shape))) for shape in ((12, 20), (12,)))
    bias = from_numpy(rng.normal(size=12))
    update = random_lora(0).replace(bias=bias)
    adapter = Adapter({TARGET: (head, update, whole), Target("n"): (norm,)})
    made = ops.resize(adapter, 2)
    assert made.updates[Target("n")] == (norm,)
    assert made.updates[TARGET][:2] == (head, whole)
    np.testing.assert_allclose(made.updates[TARGET][2].bias.numpy(), 1.5 * bias.numpy(), rtol=1e-7)


def test_several_updates_of_a_target_become_one():
    one, other = random_lora(0), random_lora(1, rank=2)
    (made,) = ops.resize(Adapter({TARGET: (one, other)}), 8, dtype="float64").updates[TARGET]
    np.testing.assert_allclose(dense(made), dense(one) + dense(other), atol=1e-12)


@pytest.mark.parametrize(("dtype", "digits"), [(None, 1e-12), ("float32", 1e-6), ("BF16", 2e-2)])
def test_the_error_that_is_told_is_that_of_what_is_stored(dtype, digits):
    update, cuts = random_lora(0), []
    (made,) = ops.resize(Adapter({TARGET: (update,)}), 6, dtype=dtype, report=cuts.append).updates[TARGET]
    error = float(np.linalg.norm(dense(made) - dense(update)))
    assert error <= digits * cuts[0].norm
    assert math.isclose(cuts[0].error, error, rel_tol=1e-3, abs_tol=1e-13 * cuts[0].norm)


def test_a_rank_above_that_of_the_weight_comes_down():
    """LoRA of rank 16 on a head of 3 outputs."""
    update, cuts = random_lora(0, out=3, rank=16), []
    (made,) = ops.resize(Adapter({TARGET: (update,)}), error=1e-9, dtype="F64", report=cuts.append).updates[TARGET]
    assert made.A.shape == (3, 20)
    np.testing.assert_allclose(dense(made), dense(update), atol=1e-12)
    assert (cuts[0].before, cuts[0].rank) == (3, 3)


def test_other_methods_become_a_lora_of_their_rank():
    rng = np.random.default_rng(0)
    fields = {"w1_a": (12, 2), "w1_b": (2, 20), "w2_a": (12, 2), "w2_b": (2, 20)}
    held = {name: rng.normal(size=shape) for name, shape in fields.items()}
    D = (held["w1_a"] @ held["w1_b"]) * (held["w2_a"] @ held["w2_b"])
    loha = METHODS["loha"](**{name: from_numpy(value) for name, value in held.items()})
    plain, cuts = random_lora(0), []
    made = ops.promote(Adapter({TARGET: (loha,), Target("p"): (plain,)}), report=cuts.append)
    assert made.updates[Target("p")] == (plain,)
    np.testing.assert_allclose(dense(made.updates[TARGET][0]), D, atol=1e-12)
    assert [(cut.rank, cut.relative < 1e-12) for cut in cuts] == [(4, True)]
    (cut,) = ops.promote(Adapter({TARGET: (loha,)}), 2).updates[TARGET]
    np.testing.assert_allclose(dense(cut), best(D, 2), atol=1e-12)


def test_dense_changes_are_promoted_to_the_rank_that_they_have():
    D = np.random.default_rng(0).normal(size=(12, 3)) @ np.random.default_rng(1).normal(size=(3, 20))
    adapter, cuts = Adapter({TARGET: (METHODS["dense"](D=from_numpy(D)),)}), []
    with pytest.raises(UsageError, match=r"no change in this adapter has low-rank factors(.|\n)*--promote"):
        ops.resize(adapter, 2)
    (made,) = ops.promote(adapter, report=cuts.append).updates[TARGET]
    assert made.A.shape == (3, 20)
    np.testing.assert_allclose(dense(made), D, atol=1e-12)
    (made,) = ops.promote(adapter, 2).updates[TARGET]
    np.testing.assert_allclose(dense(made), best(D, 2), atol=1e-12)


def test_formulas_that_need_the_weight_are_promoted_at_a_base(base):
    rng = np.random.default_rng(0)
    W = rng.normal(size=(12, 20))
    fields = {"A": rng.normal(size=(2, 20)), "B": rng.normal(size=(12, 2)), "magnitude": rng.normal(size=12)}
    dora = METHODS["dora"](**{name: from_numpy(value) for name, value in fields.items()})
    adapter = Adapter({TARGET: (dora,)})
    assert ops.promote(adapter).updates[TARGET] == (dora,)
    V = W + fields["B"] @ fields["A"]
    D = V * (fields["magnitude"] / np.linalg.norm(V, axis=1))[:, None] - W
    (made,) = ops.promote(adapter, 5, base=base({"q.weight": W})).updates[TARGET]
    np.testing.assert_allclose(dense(made), best(D, 5), atol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "none"), ({"rank": 2, "energy": 0.5}, "rank and energy"), ({"rank": 0}, "rank is 0,"),
        ({"rank": 2.5}, "rank 2.5 is not a whole number"), ({"rank": True}, "rank True is not a whole number"),
        ({"rank": 13}, "rank is 13, but the weights have at most rank 12"),
        ({"energy": 0}, "energy is 0,"), ({"energy": 1.1}, "energy is 1.1,"), ({"error": -1}, "error is -1,"),
        ({"error": math.nan}, "error is nan,"), ({"frobenius": math.inf}, "frobenius is inf,"),
        ({"rank": 2, "scope": "some"}, "unknown scope"),
    ],
)  # fmt: skip
def test_bad_criteria_are_refused(arguments, why):
    with pytest.raises(UsageError, match=why):
        ops.resize(Adapter({TARGET: (random_lora(0),)}), **arguments)


@pytest.mark.parametrize("dtype", ["int8", "float99", "C64"])
def test_factors_are_of_real_numbers(dtype):
    with pytest.raises(Unsupported, match="cannot have the dtype"):
        ops.resize(Adapter({TARGET: (random_lora(0),)}), 2, dtype=dtype)


SPECTRA = {
    "flat": np.ones(SMALL + 20), "slow": 0.99 ** np.arange(SMALL + 20), "fast": 0.7 ** np.arange(SMALL + 20),
    "few": np.r_[np.ones(10), np.zeros(SMALL + 10)], "steps": 1 / (1 + np.arange(SMALL + 20) // 16),
}  # fmt: skip


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", SPECTRA)
def test_a_sketch_is_as_good_as_it_says(name, turned):
    """Of matrices whose singular values are known; float32 makes a relative error of 1e-7 by itself."""
    rng, S = np.random.default_rng(3), SPECTRA[name]
    U, V = (np.linalg.qr(rng.normal(size=(size, len(S))))[0] for size in (len(S), 500))
    D = ((U * S) @ V.T).astype(np.float32)
    D = D.T if turned else D
    for criterion in (Criterion(rank=8), Criterion(error=0.5)):
        U_, S_, Vh = dominant(D, criterion, 0)
        rank, norm = len(S_), float(np.linalg.norm(S))
        least = math.sqrt(float((S[rank:] ** 2).sum()))
        assert float(np.linalg.norm(D - (U_ * S_) @ Vh)) <= (1 + EXCESS) * least + 2e-6 * norm
        if criterion.rank is None:
            assert least <= 0.5 * norm
        else:
            assert rank == 8
        assert np.array_equal(S_, dominant(D, criterion, 0)[1]), "the same numbers each time"


@pytest.mark.parametrize("shape", [(6, 9), (SMALL + 5, SMALL + 30), (SMALL + 30, SMALL + 5)])
def test_the_exact_decomposition_multiplies_to_the_matrix(shape):
    D = np.random.default_rng(0).normal(size=shape)
    D[:, :2] = D[:, 2:4]
    U, S, Vh = exact(D)
    assert (np.diff(S) <= 1e-12).all()
    np.testing.assert_allclose((U * S) @ Vh, D, atol=1e-11)
    np.testing.assert_allclose(S, np.linalg.svd(D, compute_uv=False), atol=1e-5)


@pytest.mark.parametrize("wanted", [1.5, 4.0, 50.0])
def test_kohyas_criteria_keep_what_kohya_keeps(wanted):
    """By the formulas of its resize_lora.py, on the singular values of the whole matrix."""
    update = random_lora(3, 40, (50,), 8)
    adapter = Adapter({TARGET: (update,)})
    S = np.linalg.svd(dense(update), compute_uv=False)
    share = 1 - 1 / wanted
    expected = {
        "sv_ratio": int((S[0] / wanted < S).sum()),
        "sv_cumulative": int(np.searchsorted(np.cumsum(S) / S.sum(), share)) + 1,
        "sv_fro": int(np.searchsorted(np.cumsum(S**2) / (S**2).sum(), share**2)) + 1,
    }
    for name, count in expected.items():
        value = wanted if name == "sv_ratio" else share
        made = ops.resize(adapter, **{name: value})
        assert made.updates[TARGET][0].A.shape[0] == min(count, 8)
        assert ops.resize(adapter, 2, **{name: value}).updates[TARGET][0].A.shape[0] == min(count, 2)


def test_kohyas_criteria_are_of_each_target_and_in_range():
    adapter = Adapter({TARGET: (random_lora(3),)})
    for options in ({"sv_ratio": 0.5}, {"sv_fro": 0.0}, {"sv_cumulative": 2.0}, {"sv_fro": 0.5, "sv_ratio": 2.0},
                    {"sv_fro": 0.5, "scope": "all"}, {"sv_fro": 0.5, "energy": 0.5}):  # fmt: skip
        with pytest.raises(UsageError):
            ops.resize(adapter, **options)

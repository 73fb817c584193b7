"""Ways to combine: what must hold whatever the numbers, the papers' formulas on whole matrices, and what is refused."""

import os
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adapterkit as ak
from adapterkit.cli import adapterkit
from adapterkit.core.adapter import Adapter, Step, Target
from adapterkit.errors import Malformed, ShapeMismatch, Unsupported, UsageError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.ops import COMBINERS, blocks
from adapterkit.ops.blocks import Blocks
from adapterkit.ops.combiners import ctm
from adapterkit.ops.combiners._combiner import DEPENDENCES
from adapterkit.ops.combiners._entrywise import Entrywise
from adapterkit.ops.combiners.lego import clusters
from adapterkit.ops.context import Census, FormulaContext
from adapterkit.ops.lowering import Change
from adapterkit.ops.prefetch import MEMORY, ahead, one_blas_thread
from adapterkit.testing import formulas

OUT, IN, RANK = 20, 28, 3
Q, V = Target("layers.0.q"), Target("layers.1.v")

BY_FACTORS, BY_PLACE, BY_SIZE, BY_SEED = (
    {name for name in COMBINERS if what in COMBINERS[name].depends} for what in ("factors", "order", "size", "seed")
)
"""Methods whose result depends on more than the changes: they say so, and tests hold them to it both ways."""
WITH_DATA = {name for name in COMBINERS if COMBINERS[name].data}
BASED = {name for name in COMBINERS if COMBINERS[name].based}
PLAIN = sorted(set(COMBINERS) - WITH_DATA - BASED)
SEVERAL = [name for name in PLAIN if COMBINERS[name].takes[1] is None]
assert set().union(*(COMBINERS[name].depends for name in COMBINERS)) <= set(DEPENDENCES)
KEEPING = [
    "linear", "task_arithmetic", "multislerp", "karcher", "model_stock", "tsv", "cart", "wudi", "pico", "svc",
    "knots_task_arithmetic", "core_task_arithmetic", "core_tsv", "ctm_task_arithmetic", "pico_tsv",
]  # fmt: skip
"""Methods that give back an adapter that is alone."""


def lora(rng, out=OUT, columns=(IN,), rank=RANK, bias=False, lead=(), **more):
    fields = {"A": (*lead, rank, *columns), "B": (*lead, out, rank)} | ({"bias": (*lead, out)} if bias else {})
    return METHODS["lora"](**{name: from_numpy(rng.normal(size=shape)) for name, shape in fields.items()}, **more)


def adapters(count=3, targets=(Q, V), seed=0, **more):
    return [
        Adapter({target: (lora(np.random.default_rng([seed, t, i]), **more),) for i, target in enumerate(targets)})
        for t in range(count)
    ]


def change(adapter, target=Q):
    return adapter.delta(target.path).numpy().astype(np.float64)


def exact(adapter, target=Q):
    """The change in float64, from the factors."""
    update = adapter.updates[target][0]
    if update.method == "dense":
        return update.D.numpy()
    B, A = update.B.numpy(), update.A.numpy()
    return update.scaling * (B @ A.reshape(len(A), -1))


def close(one, other, tolerance=1e-9):
    assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-300)


def few(name):
    return COMBINERS[name].takes[1] or 3


def basis(name):
    """Bases that do not depend on how a product was split."""
    return {"basis": "products"} if "basis" in COMBINERS[name].parameters() else {}


@pytest.mark.parametrize("name", PLAIN)
def test_every_method_combines_and_its_result_can_be_written_and_read(name, tmp_path):
    made = ak.ops.combine(adapters(few(name), bias=True), name)
    made.validate()
    made.check_values()
    ak.write(made, tmp_path / "made.safetensors")
    read = ak.read(tmp_path / "made.safetensors")
    assert read.digest() == made.digest()
    said = read.recipe[0]
    assert (said.op, said.args["method"]) == ("combine", name)
    assert set(said.args["parameters"]) == set(COMBINERS[name]().values())
    assert len(said.args["of"]) == few(name)


SEEDS = st.integers(0, 2**32 - 1)
"""Of random adapters."""

few_seeds = settings(max_examples=5)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - BY_FACTORS))
@few_seeds
@given(drawn=SEEDS)
def test_a_product_counts_and_not_how_it_was_split(name, drawn):
    given_ = adapters(few(name), targets=[Q], seed=drawn)
    others = [turned(adapter, seed) for seed, adapter in enumerate(given_)]
    one, other = (ak.ops.combine(each, name, **basis(name)) for each in (given_, others))
    close(exact(one), exact(other), 1e-6)


@pytest.mark.parametrize("name", sorted({*set(PLAIN) - BY_FACTORS, "core_ties", "core_cart", "pico_tsv", "knots_ties"}))
def test_a_change_counts_and_not_whether_it_is_stored_as_factors(name):
    given_ = adapters(few(name) if name in PLAIN else 4, out=11, columns=(17,), rank=2)
    whole = [
        Adapter({target: (METHODS["dense"](D=from_numpy(exact(adapter, target))),) for target in (Q, V)})
        for adapter in given_
    ]
    more = basis(name if name in PLAIN else name.split("_")[0]) | ({"rank": 2} if name == "ctm" else {})
    one, other = (ak.ops.combine(each, name, **more) for each in (given_, whole))
    for target in (Q, V):
        close(exact(one, target), exact(other, target), 1e-7)


OTHER_SCALES = {
    "cart": "factor by which the differences from the mean are multiplied",
    "robust_merge": "c, the factor of A and of B",
}
"""Methods whose `scale` is another factor than that of the result, with its meaning."""


@pytest.mark.parametrize("name", [name for name in PLAIN if "scale" in COMBINERS[name].parameters()])
def test_a_scale_is_a_factor_of_the_result_biases_included(name):
    if name in OTHER_SCALES:
        assert COMBINERS[name].parameters()["scale"].metadata["meaning"] == OTHER_SCALES[name]
        return
    one, half = (ak.ops.combine(adapters(few(name), bias=True), name, scale=scale) for scale in (1.0, 0.5))
    for target in (Q, V):
        close(change(half, target), 0.5 * change(one, target), 1e-6)
        smaller, larger = (Change(target, (OUT, IN), each.updates[target]).bias() for each in (half, one))
        # Of PCB's entries over the whole model, none of these biases is among the best.
        assert np.abs(larger).max() > 0 or name == "pcb"
        close(smaller, 0.5 * larger)


def test_a_dense_result_that_its_dtype_cannot_hold_names_the_target():
    huge = [
        Adapter({Q: (METHODS["lora"](A=from_numpy(np.full((1, 4), 1e30)), B=from_numpy(np.full((3, 1), 1e30))),)})
        for _ in range(2)
    ]
    made = ak.ops.combine(huge, "ties", dtype="F32")
    with pytest.raises(Malformed, match=f"{re.escape(str(Q))}: a result is out of the range of F32"):
        made.updates[Q][0].D.numpy()


@pytest.mark.parametrize("name", sorted(set(SEVERAL) - BY_PLACE))
@few_seeds
@given(order=st.permutations(range(3)), drawn=SEEDS)
def test_the_order_of_adapters_does_not_matter(name, order, drawn):
    given_, weights = adapters(seed=drawn), [1.0, 0.5, 2.0]
    one = ak.ops.combine(given_, name, weights)
    other = ak.ops.combine([given_[i] for i in order], name, [weights[i] for i in order])
    close(exact(one), exact(other), 1e-7)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - BY_SIZE))
@few_seeds
@given(drawn=SEEDS)
def test_twice_the_changes_make_twice_the_result(name, drawn):
    given_ = adapters(few(name), seed=drawn)
    one = ak.ops.combine(given_, name)
    other = ak.ops.combine([ak.ops.scale(adapter, 4.0) for adapter in given_], name)
    close(exact(other), 4 * exact(one), 1e-6)


def turned(adapter, seed):
    """The same change by other factors."""
    R = np.random.default_rng(seed).normal(size=(RANK, RANK)) + 2 * np.eye(RANK)
    update = adapter.updates[Q][0]
    A, B = np.linalg.solve(R, update.A.numpy()), update.B.numpy() @ R
    return adapter.replace(updates={Q: (update.replace(A=from_numpy(A), B=from_numpy(B)),)})


OTHERWISE = {
    "factors": lambda name, given_: exact(ak.ops.combine([turned(a, t) for t, a in enumerate(given_)], name)),
    "order": lambda name, given_: exact(ak.ops.combine(given_[::-1], name)),
    "size": lambda name, given_: 2.0**17 * exact(ak.ops.combine([ak.ops.scale(a, 2.0**-17) for a in given_], name)),
    "seed": lambda name, given_: exact(ak.ops.combine(given_, name, seed=1)),
}
"""The same combination in another guise, by what a result may depend on."""


@pytest.mark.parametrize("what", list(DEPENDENCES))
@pytest.mark.parametrize("name", PLAIN)
def test_a_method_says_what_its_result_depends_on(name, what):
    """Each dependence that is said shows, and none shows that is not said; what is fixed by a parameter is set."""
    if what == "factors" and basis(name):
        return
    differs = False
    for seed in range(4):
        given_ = adapters(few(name), targets=[Q], seed=seed)
        one, other = exact(ak.ops.combine(given_, name)), OTHERWISE[what](name, given_)
        differs |= bool(np.abs(one - other).max() > 1e-6 * np.abs(one).max())
    assert differs == (what in COMBINERS[name].depends)


@pytest.mark.parametrize("name", PLAIN)
def test_the_documented_invariances_are_those_that_methods_declare(name):
    """The page's table is measured by `adapterkit.testing.formulas`."""
    measured = formulas.dependences(name)
    assert measured - ({"factors"} if basis(name) else set()) == COMBINERS[name].depends


@pytest.mark.parametrize(("name", "expected"), [("linear", "sum"), ("ties", "more"), ("ctm", "one's"), ("tsv", "sum")])
def test_the_documented_ranks_are_those_of_results(name, expected):
    assert formulas.rank_of_result(name) == expected


@pytest.mark.parametrize("name", KEEPING)
@few_seeds
@given(drawn=SEEDS)
def test_an_adapter_alone_is_what_it_was(name, drawn):
    (one,) = adapters(1, seed=drawn)
    close(exact(ak.ops.combine([one], name)), exact(one), 1e-9)


def test_dare_ties_can_trim_what_chance_left():
    """As MergeLM does: drop, rescale, then TIES with its own trimming."""
    given_ = adapters(targets=[Q])
    masks = [FormulaContext(Q, (OUT, IN), (0, 1, 2)).uniform(t, (OUT, IN)) < 0.6 for t in range(3)]
    dropped = [exact(a) * mask / 0.6 for a, mask in zip(given_, masks, strict=True)]
    kept = [trimmed([D], 0.2)[0] for D in dropped]
    close(exact(ak.ops.combine(given_, "dare_ties", density=0.6, trim=0.2)), elected_mean(np.stack(kept)))


@pytest.mark.parametrize("plug", ["knots", "core"])
@pytest.mark.parametrize("then", ["linear", "task_arithmetic", "model_stock", "karcher"])
@few_seeds
@given(drawn=SEEDS)
def test_linear_methods_are_the_same_in_any_coordinates(plug, then, drawn):
    given_, weights = adapters(seed=drawn), [1.0, -0.5, 2.0]
    close(exact(ak.ops.combine(given_, plug, weights, then=then)), exact(ak.ops.combine(given_, then, weights)))


def test_ctm_has_the_rank_that_was_asked_for_and_a_pair_of_equal_spaces_is_kept():
    made = ak.ops.combine(adapters(), "ctm", rank=2)
    assert made.updates[Q][0].A.shape[0] == 2
    one = adapters(1)[0]
    several = [one, ak.ops.scale(one, 0.5)]
    close(exact(ak.ops.combine(several, "ctm", then="linear")), 1.5 * exact(one))


@pytest.mark.parametrize("common", [0.0, 1.0, 20.0])
def test_ctm_iterates_to_the_bases_of_the_papers_decomposition(common, monkeypatch):
    """Higher-order orthogonal iteration by LAPACK's decompositions, where spans are found by products and where not."""
    plain, tried = ctm._iterated, []

    def iterated(*given_):
        tried.append(plain(*given_))
        return tried[-1]

    monkeypatch.setattr(ctm, "_iterated", iterated)
    rng = np.random.default_rng(3)
    B, A = rng.normal(size=(40, 4)), rng.normal(size=(4, 44))
    given_ = [
        Adapter({Q: (METHODS["lora"](B=from_numpy(common * B + b), A=from_numpy(common * A + a)),)})
        for b, a in ((rng.normal(size=B.shape), rng.normal(size=A.shape)) for _ in range(8))
    ]
    deltas = np.stack([exact(adapter) for adapter in given_])
    sizes = np.sqrt((deltas**2).sum((1, 2), keepdims=True))
    X = deltas * (0.25 + 0.75 * sizes.mean() / sizes)
    U, V, error, rounds = first_left(X), first_left(X.swapaxes(1, 2)), np.inf, 0
    while True:
        U = first_left(X @ V)
        V = first_left(X.swapaxes(1, 2) @ U)
        now = np.sqrt(1 - ((U.T @ X @ V) ** 2).sum() / (X**2).sum())
        if error - now < 1e-6:
            break
        error, rounds = now, rounds + 1
    made = exact(ak.ops.combine(given_, "ctm", then="linear"))
    close(made, U @ (U.T @ deltas.sum(0) @ V) @ V.T, 1e-8)
    failed = [found is None for found in tried]
    assert not all(failed)
    assert any(failed) or common > 0


def first_left(X, count=4):
    return np.linalg.svd(np.hstack(list(X)))[0][:, :count]


def test_disjoint_spaces_are_only_summed():
    """Where no direction is shared, whitening and calibration have nothing to do."""
    parts = []
    for t in range(2):
        B, A = np.zeros((OUT, RANK)), np.zeros((RANK, IN))
        rng = np.random.default_rng(t)
        B[t * 8 : t * 8 + 8], A[:, t * 10 : t * 10 + 10] = rng.normal(size=(8, RANK)), rng.normal(size=(RANK, 10))
        parts.append(Adapter({Q: (METHODS["lora"](A=from_numpy(A), B=from_numpy(B)),)}))
    total = exact(parts[0]) + exact(parts[1])
    for name in ("tsv", "svc", "wudi"):
        close(exact(ak.ops.combine(parts, name)), total)


@pytest.mark.parametrize("name", ["dare_linear", "della"])
def test_random_drops_leave_the_mean(name):
    (one,) = adapters(1, targets=[Q])
    more = {"sign": "none", "denominator": "none"} if name == "della" else {}
    found = np.stack([exact(ak.ops.combine([one], name, density=0.5, seed=s, **more)) for s in range(400)])
    kept = (found != 0).mean()
    assert abs(kept - 0.5) < 0.01
    assert np.abs(found.mean(0) - exact(one)).max() < 6 * (found.std(0) / 20).max()


def test_what_is_random_does_not_depend_on_other_targets_or_runs():
    both = ak.ops.combine(adapters(), "dare_ties", density=0.5, seed=7)
    alone = ak.ops.combine(adapters(targets=[Q]), "dare_ties", density=0.5, seed=7)
    assert (exact(both) == exact(alone)).all()
    assert (exact(both) != exact(ak.ops.combine(adapters(), "dare_ties", density=0.5, seed=8))).any()
    updates = both.updates
    assert list(updates) == [Q, V]
    backwards = [Adapter(dict(reversed(a.updates.items()))) for a in adapters()]
    again = ak.ops.combine(backwards, "dare_ties", density=0.5, seed=7)
    assert (exact(again) == exact(both)).all()
    assert (exact(again, V) == exact(both, V)).all()


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "knots_dare_ties", "core_dare_ties", "lego"])
def test_what_is_random_does_not_depend_on_threads(name):
    """Combined and read by several threads at once, targets in any order, it is what one thread makes, bit by bit."""
    targets = [Target(f"layers.{i}.{path}") for i in range(6) for path in "qv"]
    given_ = adapters(targets=targets, rank=2)
    expected = {target: exact(ak.ops.combine(given_, name, seed=3), target) for target in targets}

    def scrambled(seed):
        order = [targets[i] for i in np.random.default_rng(seed).permutation(len(targets))]
        made = ak.ops.combine([Adapter({t: a.updates[t] for t in order}) for a in given_], name, seed=3)
        return [(target, exact(made, target)) for target in reversed(order)]

    shared = ak.ops.combine(given_, name, seed=3)
    with ThreadPoolExecutor(4) as pool:
        apart = [pair for pairs in pool.map(scrambled, range(4)) for pair in pairs]
        together = list(pool.map(lambda target: (target, exact(shared, target)), [*targets, *reversed(targets)]))
    assert all((found == expected[target]).all() for target, found in [*apart, *together])


# The papers' formulas, on whole matrices.


def trimmed(matrices, density):
    """The largest entries over all matrices of one task, as the authors of TIES count them."""
    flat = np.abs(np.concatenate([matrix.ravel() for matrix in matrices]))
    least = np.sort(flat)[len(flat) - int(density * len(flat)) - 1]
    return [np.where(np.abs(matrix) >= least, matrix, 0) for matrix in matrices]


def elected_mean(kept):
    elected = np.sign(kept.sum(0))
    agree = np.sign(kept) == elected
    return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_ties_trims_over_the_whole_adapter(density):
    given_ = adapters(bias=True)
    per_task = []
    for adapter in given_:
        tensors = [exact(adapter), exact(adapter, V), *(adapter.updates[t][0].bias.numpy() for t in (Q, V))]
        per_task.append(trimmed(tensors, density))
    made = ak.ops.combine(given_, "ties", density=density)
    for i, target in enumerate((Q, V)):
        close(exact(made, target), elected_mean(np.stack([task[i] for task in per_task])))
        close(made.updates[target][0].d.numpy(), elected_mean(np.stack([task[i + 2] for task in per_task])))


def test_ties_of_many_targets_is_exact_whatever_a_few_of_them_tell():
    """Targets of sizes over six orders of magnitude, of which every other is looked at for a sample."""
    targets = [Target(f"layers.{i}.q") for i in range(40)]
    given_ = [
        Adapter({t: (u[0].replace(scaling=10.0 ** (i % 7 - 3)),) for i, (t, u) in enumerate(a.updates.items())})
        for a in adapters(2, targets=targets, out=12, rank=2)
    ]
    kept = [trimmed([exact(a, t) for t in targets], 0.2) for a in given_]
    made = ak.ops.combine(given_, "ties")
    for i, target in enumerate(targets):
        close(exact(made, target), elected_mean(np.stack([task[i] for task in kept])))


def test_knots_ties_is_ties_on_aligned_coordinates():
    given_ = adapters()
    U, aligned = {}, [[] for _ in given_]
    for target in (Q, V):
        U[target], S, Vh = np.linalg.svd(np.hstack([exact(a, target) for a in given_]), full_matrices=False)
        rank = int((S > 1e-9).sum())
        U[target] = U[target][:, :rank]
        for t in range(len(given_)):
            aligned[t].append((S[:, None] * Vh)[:rank, t * IN : (t + 1) * IN])
    kept = [trimmed(task, 0.2) for task in aligned]
    made = ak.ops.combine(given_, "knots_ties", density=0.2)
    for i, target in enumerate((Q, V)):
        close(exact(made, target), U[target] @ elected_mean(np.stack([task[i] for task in kept])))


@pytest.mark.parametrize("seed", range(12))
def test_the_entry_at_the_threshold_is_kept_although_it_is_computed_twice(seed):
    """Whether it is computed from thin factors or from whole matrices, and counted over one tensor or the model."""
    thin = adapters(2, targets=[Q, V], seed=seed, out=40)
    found = [
        thin,
        [a.replace(updates={t: (METHODS["dense"](D=from_numpy(exact(a, t))),) for t in (Q, V)}) for a in thin],
    ]
    one, other = (ak.ops.combine(each, "knots_ties") for each in found)
    for target in (Q, V):
        close(exact(one, target), exact(other, target))


def test_core_ties_is_ties_between_bases_of_the_factors():
    given_ = adapters(targets=[Q])
    pairs = [(a.updates[Q][0].B.numpy(), a.updates[Q][0].A.numpy()) for a in given_]
    U = np.linalg.svd(np.hstack([B for B, _ in pairs]), full_matrices=False)[0]
    Vh = np.linalg.svd(np.vstack([A for _, A in pairs]), full_matrices=False)[2]
    cores = [U.T @ B @ A @ Vh.T for B, A in pairs]
    merged = elected_mean(np.stack([trimmed([core], 0.3)[0] for core in cores]))
    made = ak.ops.combine(given_, "core_ties", density=0.3)
    close(exact(made), U @ merged @ Vh)
    beside = ak.ops.combine(adapters(targets=[Q, V]), "core_ties", density=0.3)
    close(exact(beside), exact(made))


def test_arcee_fusion_keeps_what_stands_out_at_a_base(tmp_path):
    """The formula in float64, for the weight and the bias of each expert."""
    stacked, rng = Target("experts", "e out *in"), np.random.default_rng(5)
    base = {"experts.weight": rng.normal(size=(2, OUT, IN)), "experts.bias": rng.normal(size=(2, OUT))}
    save_file(base, tmp_path / "base.safetensors")
    (one,) = adapters(1, targets=[stacked], lead=(2,), bias=True)
    made = ak.ops.combine([one], "arcee_fusion", base=tmp_path / "base.safetensors").updates[stacked][0]
    update = one.updates[stacked][0]
    changes = {"experts.weight": update.B.numpy() @ update.A.numpy(), "experts.bias": update.bias.numpy()}
    for (name, D), found in zip(changes.items(), (made.D, made.d), strict=True):
        for e in range(2):
            p, q = (np.exp(X) / np.exp(X).sum(-1, keepdims=True) + 1e-8 for X in (base[name][e] + D[e], base[name][e]))
            importance = np.abs(D[e]) * (p * np.log(p / q)).sum(-1, keepdims=True)
            q1, q2, q3 = (np.sort(importance.ravel())[int(k * (importance.size - 1))] for k in (0.25, 0.5, 0.75))
            close(found.numpy()[e], D[e] * (importance >= q2 + 1.5 * (q3 - q1)))


def polar(X):
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    return U @ Vh


def leading(matrix, count):
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return U[:, :count], S[:count], Vh[:count].T


@pytest.mark.parametrize("kept", [None, 2])
def test_tsv_whitens_the_tasks_singular_vectors(kept):
    given_ = adapters()
    parts = [leading(exact(adapter), kept or RANK) for adapter in given_]
    U, V = (polar(np.hstack([part[i] for part in parts])) for i in (0, 2))
    expected = U @ np.diag(np.concatenate([part[1] for part in parts])) @ V.T
    close(exact(ak.ops.combine(given_, "tsv", directions=kept)), expected)


def test_tsv_keeps_a_tasks_share_of_the_weights_directions():
    """int(min(m, n) / T) each: less than the rank, where T ranks are more than the weight has."""
    given_ = adapters(4, rank=8)
    parts = [leading(exact(adapter), OUT // 4) for adapter in given_]
    U, V = (polar(np.hstack([part[i] for part in parts])) for i in (0, 2))
    close(exact(ak.ops.combine(given_, "tsv")), U @ np.diag(np.concatenate([part[1] for part in parts])) @ V.T)


def test_iso_c_makes_singular_values_equal():
    given_ = adapters()
    total = sum(exact(adapter) for adapter in given_)
    U, S, V = leading(total, 3 * RANK)
    close(exact(ak.ops.combine(given_, "iso_c")), S.mean() * U @ V.T)
    close(exact(ak.ops.combine(given_, "iso_c", over="weight", scale=2.0)), 2 * S.sum() / min(OUT, IN) * U @ V.T)


def test_iso_cts_adds_each_tasks_own_directions():
    given_ = adapters()
    tasks = [exact(adapter) for adapter in given_]
    own, common = 1, 3 * RANK - 3
    U, S, V = leading(sum(tasks), common)
    parts = [leading(task - U @ U.T @ task, own) for task in tasks]
    Us, Vs = (polar(np.hstack([first, *(part[i] for part in parts)])) for i, first in ((0, U), (2, V)))
    mean = np.concatenate([S, *(part[1] for part in parts)]).mean()
    close(exact(ak.ops.combine(given_, "iso_cts", common=common / (3 * RANK))), mean * Us @ Vs.T)


def test_cart_adds_leading_differences_to_the_mean():
    given_ = adapters()
    tasks = [exact(adapter) for adapter in given_]
    expected = centre = sum(tasks) / 3
    for task in tasks:
        U, S, V = leading(task - centre, 2)
        expected = expected + 0.5 * U @ np.diag(S) @ V.T
    close(exact(ak.ops.combine(given_, "cart", share=2 / (3 * RANK), scale=0.5)), expected)


def test_the_share_of_cart_is_of_the_weights_directions_as_its_authors_have_it():
    given_ = adapters(out=12, columns=(20,))
    tasks = [exact(adapter) for adapter in given_]
    expected = centre = sum(tasks) / 3
    for task in tasks:
        U, S, V = leading(task - centre, 3)
        expected = expected + 2.0 * U @ np.diag(S) @ V.T
    close(exact(ak.ops.combine(given_, "cart", share=0.3, over="weight")), expected)


def test_pico_damps_shared_directions_and_keeps_the_mean_norm():
    given_ = adapters()
    factors = [a.updates[Q][0] for a in given_]
    U, S, _ = np.linalg.svd(np.hstack([f.B.numpy() for f in factors]), full_matrices=False)
    alpha = 1 / (1 + 2 * S**2 / (S**2).sum())
    damped = np.eye(OUT) + U @ np.diag(alpha - 1) @ U.T
    total = sum(damped @ exact(adapter) for adapter in given_)
    norm = np.mean([np.linalg.norm(exact(adapter)) for adapter in given_])
    made = exact(ak.ops.combine(given_, "pico"))
    close(made, total * norm / np.linalg.norm(total))
    assert abs(np.linalg.norm(made) - norm) < 1e-9 * norm
    close(exact(ak.ops.combine(given_, "pico", rescale="none")), total)
    each = [(damped @ D) * np.linalg.norm(D) / np.linalg.norm(damped @ D) for D in map(exact, given_)]
    close(exact(ak.ops.combine(given_, "pico", rescale="each")), sum(each))


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_scales_directions_that_were_counted_double(alpha):
    given_ = adapters()
    tasks = [exact(adapter) for adapter in given_]
    total = sum(tasks)
    U, S, Vh = np.linalg.svd(total, full_matrices=False)
    expected = np.zeros_like(total)
    for r in range(3 * RANK):
        replies = [U[:, r] @ task for task in tasks]
        counted = [max(alpha, (U[:, r] @ total) @ reply / (reply @ reply)) for reply in replies]
        expected += 3 / sum(counted) * S[r] * np.outer(U[:, r], Vh[r])
    close(exact(ak.ops.combine(given_, "svc", alpha=alpha)), expected)


def test_wudi_is_where_the_descent_from_the_sum_ends():
    given_ = adapters()
    tasks = [exact(adapter) for adapter in given_]
    grams = [task.T @ task / np.linalg.norm(task) ** 2 for task in tasks]
    found = sum(tasks)
    for _ in range(20000):
        found = found - sum((found - task) @ G for task, G in zip(tasks, grams, strict=True))
    close(exact(ak.ops.combine(given_, "wudi")), found, 1e-4)


def test_wudi_by_adam_stops_where_the_authors_do():
    """Their loss by torch's own gradients and optimizer, in float64."""
    import torch

    given_ = [ak.ops.scale(adapter, 1e-3) for adapter in adapters()]
    tasks = torch.tensor(np.stack([exact(adapter) for adapter in given_]))
    merged = torch.nn.Parameter(tasks.sum(0))
    adam = torch.optim.Adam([merged], lr=1e-4)
    sizes = tasks.reshape(3, -1).norm(dim=1) ** 2
    for _ in range(40):
        adam.zero_grad()
        loss = (((merged - tasks) @ tasks.mT) ** 2).sum((1, 2)) / sizes
        loss.sum().backward()
        adam.step()
    made = ak.ops.combine(given_, "wudi", solver="adam", steps=40, rate=1e-4)
    close(exact(made), merged.detach().numpy(), 1e-7)


def test_consensus_keeps_what_matters_to_two_tasks():
    given_, level = adapters(), 0.6
    tasks = np.stack([exact(adapter) for adapter in given_])
    total = tasks.sum(0)
    matter = (np.abs(tasks) >= level * np.abs(total - tasks)).sum(0) >= 2
    assert 0 < matter.sum() < matter.size
    close(exact(ak.ops.combine(given_, "consensus", threshold=level)), total * matter)


@pytest.mark.parametrize(("quantile", "scale"), [(0.0, 1.0), (0.8, 2.0)])
def test_robust_merge_sums_pruned_factors_scaled_by_what_was_lost(quantile, scale):
    given_ = adapters()
    factors = [a.updates[Q][0] for a in given_]
    As, Bs = ([getattr(f, name).numpy() for f in factors] for name in "AB")

    def pruned(X):
        """torch's kthvalue(int(n (1 - p))) is the least that is kept."""
        least = np.sort(np.abs(X).ravel())[int(X.size * (1 - 0.37)) - 1]
        return np.where(np.abs(X) >= least, X, 0)

    A, B = ([pruned(X) for X in each] for each in (As, Bs))
    scales = np.stack([np.abs(one).sum(1) / np.abs(kept).sum(1) for one, kept in zip(As, A, strict=True)])
    for row in scales:
        row[:] = np.clip(row, sorted(row)[int(quantile * len(row))], None)
    scales = scales / scales.sum(0)
    expected = scale**2 * sum(b * s for b, s in zip(B, scales, strict=True)) @ sum(A)
    close(exact(ak.ops.combine(given_, "robust_merge", density=0.37, quantile=quantile, scale=scale)), expected)


@pytest.mark.parametrize("beside", [None, 0.0])
def test_dc_merge_keeps_all_of_a_task_whose_directions_are_equal(beside):
    """0.001 of so few entries is one; which of equal ones it is must not be for rounding to say."""
    one, other = adapters(2, targets=[Q])
    made = ak.ops.combine([one] if beside is None else [one, other], "dc_merge", [1.0, 0.0][: 1 + (beside is not None)])
    U, S, Vh = np.linalg.svd(exact(one))
    close(exact(made), S[:RANK].mean() * U[:, :RANK] @ Vh[:RANK])


@pytest.mark.parametrize(("smoothing", "density"), [("average", 0.1), ("linear", 0.3), ("average", 0.001)])
def test_dc_merge_evens_tasks_out_in_a_space_that_covers_them(smoothing, density):
    """On whole matrices: singular values of the same sum, polar bases, the largest entries, elected by task."""
    given_ = adapters()
    us, vs, smooth = [], [], []
    for D in map(exact, given_):
        u, s, v = leading(D, RANK)
        ratio = 1.0 if smoothing == "average" else min(5.0, s[0] / s[-1])
        even = np.linspace(ratio, 1.0, RANK)
        us.append(u)
        vs.append(v)
        smooth.append(u @ np.diag(s.sum() * even / even.sum()) @ v.T)
    U, V = polar(np.hstack(us)), polar(np.hstack(vs))
    kept = []
    for D in smooth:
        M = U.T @ D @ V
        least = np.sort(np.abs(M).ravel())[-max(1, int(density * M.size))]
        kept.append(np.where(np.abs(M) >= least, M, 0))
    agree = [np.sign(M) == np.sign(sum(kept)) for M in kept]
    merged = sum(M * a for M, a in zip(kept, agree, strict=True)) / np.maximum(sum(a.astype(int) for a in agree), 1)
    merged[sum(kept) == 0] = 0
    block = np.kron(np.eye(3), np.ones((RANK, RANK)))
    made = ak.ops.combine(given_, "dc_merge", smoothing=smoothing, density=density)
    close(exact(made), U @ (merged * block) @ V.T)


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_pcb_weighs_entries_by_how_they_compete(scope, ratio):
    """The formula on all entries of an adapter, or of a tensor, in one array."""
    given_ = adapters(bias=True)
    each = [[exact(a, t).ravel() for t in (Q, V)] + [a.updates[t][0].bias.numpy() for t in (Q, V)] for a in given_]
    groups = [np.stack([np.concatenate(parts) for parts in each])] if scope == "model" else [
        np.stack([parts[i] for parts in each]) for i in range(4)
    ]  # fmt: skip
    merged = []
    for x in groups:
        d, ordered = x.shape[1], np.sort(np.abs(x), 1)
        low, high = ordered[:, [int(d * 1e-4)]], ordered[:, [int(d * (1 - 1e-4) - 1)]]
        size = np.clip(np.abs(x), low, high)
        own = (size - size.min(1, keepdims=True)) / (size.max(1, keepdims=True) - size.min(1, keepdims=True))
        score = np.exp(len(x) * own**2) * np.tanh(x * x.sum(0))
        ordered = np.sort(score, 1)
        least = ordered[:, [int(d * (1 - ratio))]]
        part = (np.clip(score, least, None) - least) / (ordered[:, [-1]] - least)
        merged.append((part * np.sign(x) * size).sum(0) / np.maximum(part.sum(0), 1e-12))
    made = ak.ops.combine(given_, "pcb", ratio=ratio, scope=scope)
    found = [exact(made, Q).ravel(), exact(made, V).ravel(), *(made.updates[t][0].d.numpy() for t in (Q, V))]
    close(np.concatenate(found), np.concatenate(merged))


def test_emr_elects_one_change_and_gives_each_task_its_part():
    given_ = adapters(bias=True)
    tensors = [[exact(a, Q), exact(a, V), *(a.updates[t][0].bias.numpy() for t in (Q, V))] for a in given_]
    unified = []
    for tasks in map(np.stack, zip(*tensors, strict=True)):
        sign = np.where(tasks.sum(0) > 0, 1, -1)
        unified.append(sign * np.where(tasks * sign > 0, np.abs(tasks), 0).max(0))
    made = ak.ops.combine(given_, "emr")
    close(exact(made), unified[0])
    for t in range(3):
        masks = [u * D > 0 for u, D in zip(unified, tensors[t], strict=True)]
        scale = sum(np.abs(D).mean() for D in tensors[t]) / sum(
            np.abs(u * m).mean() for u, m in zip(unified, masks, strict=True)
        )
        own = ak.ops.combine(given_, "emr", task=t)
        close(exact(own, V), scale * unified[1] * masks[1])
        close(own.updates[Q][0].d.numpy(), scale * unified[2] * masks[2])


def test_lines_scales_by_depth():
    targets = [Target(f"layers.{i}.q") for i in range(4)] + [Target("head")]
    given_ = adapters(2, targets=targets)
    for alpha, beta in ((None, None), (0.3, 0.5)):
        made = ak.ops.combine(given_, "lines", alpha=alpha, beta=beta)
        first, gain = (0.5, 0.5) if alpha is None else (alpha, beta)
        for depth, target in [*zip((0, 1 / 3, 2 / 3, 1), targets, strict=False), (0, targets[-1])]:
            close(exact(made, target), (first + gain * depth) * sum(exact(a, target) for a in given_))
    trimmed_ = ak.ops.combine(given_, "lines_ties", density=0.4)
    close(exact(trimmed_, targets[3]), exact(ak.ops.combine(given_, "ties", density=0.4), targets[3]))


@pytest.mark.parametrize("beta", [0.01, 0.3, 0.8])
def test_boosting_raises_small_singular_values(beta):
    given_ = adapters()
    U, S, V = leading(sum(map(exact, given_)), 3 * RANK)
    least = S[(S.cumsum() / S.sum() >= beta).nonzero()[0][0]]
    close(exact(ak.ops.combine(given_, "boost", beta=beta)), U @ np.diag(np.maximum(S, least)) @ V.T)


def test_lot_drifts_least_on_the_tasks_inputs():
    """Against least squares of least norm; with fewer samples than inputs, the rest of the space gets nothing."""
    given_ = adapters(2, targets=[Q])
    X = [np.random.default_rng([8, t]).normal(size=(9, IN)) for t in range(2)]
    made = ak.ops.combine(given_, "lot", data=lambda t, _: X[t])
    Y = np.vstack([x @ exact(a).T for x, a in zip(X, given_, strict=True)])
    close(exact(made), np.linalg.lstsq(np.vstack(X), Y, rcond=None)[0].T, 1e-6)


def test_breadcrumbs_of_rows_drops_each_rows_tails():
    given_ = adapters()
    expected = np.zeros((OUT, IN))
    for adapter in given_:
        for row, kept in zip(exact(adapter), expected, strict=True):
            ranked = sorted(range(IN), key=lambda i: -abs(row[i]))[int(0.1 * IN) :][: int(0.2 * IN)]
            kept[ranked] += row[ranked]
    close(exact(ak.ops.combine(given_, "breadcrumbs", density=0.2, gamma=0.1, scope="row")), expected)


def test_della_drops_by_rank_and_takes_the_weighted_mean_of_what_agrees():
    """Over many seeds the share of an entry that is kept is that of its rank in its row, from 0.63 to 0.77."""
    (one,) = adapters(1, targets=[Q])
    found = np.stack([exact(ak.ops.combine([one], "della", [2.0], seed=seed)) for seed in range(600)])
    ranks = np.argsort(np.argsort(np.abs(exact(one)), 1), 1)
    chance = 0.63 + 0.14 * ranks / (IN - 1)
    for rank in (0, IN // 2, IN - 1):
        assert abs((found[:, ranks == rank] != 0).mean() - chance[ranks == rank][0]) < 0.02
    close(found.max(0), np.maximum(exact(one) / chance, 0))


def test_lego_puts_equal_pairs_together():
    """Two copies of one adapter: each pair meets its copy, and r pairs are left, scaled by the root of two."""
    one = adapters(1)[0]
    close(exact(ak.ops.combine([one, one], "lego")), np.sqrt(2) * exact(one))


def test_clusters_are_those_of_points_far_apart():
    rng = np.random.default_rng(0)
    centres, own = 50 * rng.normal(size=(4, 6)), np.repeat(np.arange(4), 5)
    points = centres[own] + rng.normal(size=(20, 6))
    found = clusters(points @ points.T, 4, rng.random((5, 4)))
    assert all(len(set(found[own == c])) == 1 for c in range(4))
    assert len(set(found)) == 4


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40),
    st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    st.integers(0, 90),
)
def test_the_census_finds_the_threshold_of_numbers_in_parts(one, other, kept):
    census = Census()
    parts = [Blocks.of(np.array([part])) for part in (one, other)]
    census.run(lambda _: [census.count([0], part, [lambda *_: kept]) for part in parts])
    sizes = np.sort(np.abs([*one, *other]))[::-1]
    expected = np.inf if kept == 0 else sizes[min(kept, len(sizes)) - 1]
    assert census.threshold(0) == expected


@pytest.mark.parametrize("series", ["normal", "equal", "few", "wide", "misled", "sparse"])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.2, 0.9999, 1.0])
def test_numbers_too_many_to_hold_are_selected_exactly(monkeypatch, series, share):
    """Against a full sort: by bins alone, with ties, over 600 orders of magnitude, and from a sample that misleads."""
    monkeypatch.setattr(blocks, "MAX_NUMBERS", 40)
    rng = np.random.default_rng(3)
    values = np.abs(rng.normal(size=20000))
    sparse = np.where(rng.random(20000) < 0.1, values, 0.0)
    values = {
        "sparse": sparse,
        "equal": np.full(20000, 0.3),
        "few": rng.integers(0, 3, 20000) * 0.1,
        "wide": values**200,
    }.get(series, values)
    k = round(share * len(values))
    search = blocks.Selection(lambda *_: k)
    search.sample(values[:500] if series != "misled" else np.full(500, 1e-300), len(values))
    rounds = []
    blocks.settle([search], lambda: [rounds.append(1), *(search.feed(part) for part in np.split(values, 5))])
    ordered = np.sort(values)[::-1]
    expected = ordered[k - 1] if k else np.inf
    found = search.selected
    assert (found.value, found.above, found.total) == (expected, (values > expected).sum(), len(values))
    assert found.equal == (values == expected).sum()
    assert len(rounds) <= 8


def test_numbers_that_are_not_finite_are_refused_by_a_selection():
    for bad, k in ((np.inf, 1), (np.nan, 2)):
        search = blocks.Selection(lambda *_, k=k: k)
        with pytest.raises(Malformed, match="too large"):
            blocks.settle([search], lambda s=search, v=bad: s.feed(np.array([1.0, v])))


ENTRYWISE = sorted(name for name in set(PLAIN) - {"lego"} if issubclass(COMBINERS[name], Entrywise))


@pytest.mark.parametrize("name", ENTRYWISE)
def test_a_result_does_not_depend_on_blocks_or_workers(name, monkeypatch):
    """Formed a row at a time, by several threads, from thresholds of a small sample, it is what one block makes."""
    targets = [Target(f"layers.{i}.q") for i in range(3)]
    given_ = adapters(few(name), targets=targets, bias=True)
    more = [{}, {"scope": "row"}] if name == "breadcrumbs" else [{}]
    more += [{"rescale": "norm"}] if "rescale" in COMBINERS[name].parameters() else []
    whole = [ak.ops.combine(given_, name, workers=1, **each) for each in more]
    expected = [[(exact(made, t), made.updates[t][0].d.numpy()) for t in targets] for made in whole]
    monkeypatch.setattr("adapterkit.ops.blocks.ENTRIES", 2 * IN * len(given_))
    monkeypatch.setattr("adapterkit.ops.blocks.WHOLE", 40)
    monkeypatch.setattr(blocks, "MAX_NUMBERS", 7)
    for each, found in zip(more, expected, strict=True):
        made = ak.ops.combine(given_, name, workers=3, **each)
        for target, (D, d) in zip(targets, found, strict=True):
            close(exact(made, target), D, 1e-12)
            close(made.updates[target][0].d.numpy(), d, 1e-12)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", ["ties", "linear"])
def test_a_large_result_is_cut_near_to_the_best_with_its_error_measured(name, streams, monkeypatch):
    """Held or gone over some rows at a time: against the decomposition of the whole result by LAPACK."""
    if streams:
        monkeypatch.setattr("adapterkit.ops.combining.MEMORY", 1000)
    rng = np.random.default_rng(1)
    dense_one = Adapter({Q: (METHODS["dense"](D=from_numpy(rng.normal(size=(400, 450)).astype("f4"))),)})
    given_ = adapters(2, targets=[Q], out=400, columns=(450,)) if name == "ties" else [
        dense_one, *adapters(1, targets=[Q], out=400, columns=(450,))
    ]  # fmt: skip
    whole = change(ak.ops.combine(given_, name))
    cuts = []
    made = ak.ops.combine(given_, name, rank=6, report=cuts.append)
    lost = np.linalg.norm(exact(made) - whole)
    S = np.linalg.svd(whole, compute_uv=False)
    assert abs(cuts[0].error - lost) <= 1e-4 * np.linalg.norm(whole)
    assert abs(cuts[0].norm - np.linalg.norm(whole)) <= 1e-4 * np.linalg.norm(whole)
    assert lost <= 1.02 * np.sqrt((S[6:] ** 2).sum())


def test_workers_share_a_budget_and_one_needs_as_much_as_it_needs():
    held, most = [], []

    def work(cost):
        held.append(cost)
        most.append(sum(held))
        held.remove(cost)
        return cost

    costs = [MEMORY // 2, MEMORY // 2, MEMORY // 3, 2 * MEMORY, 5, MEMORY]
    with ahead(work, costs, 4, lambda cost: cost) as results:
        assert list(results) == costs
    assert max(most) <= 2 * MEMORY
    assert all(total <= MEMORY or total == 2 * MEMORY for total in most)


def test_a_blas_that_is_not_loaded_yet_is_limited():
    """In a fresh process, as `diff` and `combine` begin on the command line."""
    code = (
        "import sys; from adapterkit.ops.prefetch import one_blas_thread; assert 'numpy' not in sys.modules\n"
        "with one_blas_thread():\n"
        "    import numpy, threadpoolctl\n"
        "    print(*(lib['num_threads'] for lib in threadpoolctl.threadpool_info() if lib['user_api'] == 'blas'))"
    )
    free = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=free)
    assert set(run.stdout.split()) == {"1"}


def test_blas_has_its_threads_back_after_several_threads_limited_it():
    from threadpoolctl import threadpool_info

    def threads():
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    def limited(_):
        with one_blas_thread():
            np.ones((50, 50)) @ np.ones((50, 50))
            return set(threads())

    before = threads()
    with ThreadPoolExecutor(4) as pool:
        assert all(found <= {1} for found in pool.map(limited, range(40)))
    assert threads() == before


# Other shapes, other methods of adaptation, absent targets.


@pytest.mark.parametrize("name", ["linear", "ties", "knots_ties", "tsv", "core_dare_linear", "model_stock", "ctm"])
def test_each_expert_is_combined_for_itself(name):
    stacked = Target("experts", "e out *in")
    given_ = adapters(targets=[stacked], lead=(2,), bias=True)
    more = {"scope": "tensor"} if name in ("ties", "knots_ties", "ctm") else {}
    together = change(ak.ops.combine(given_, name, **more), stacked)
    if "dare" in name:
        assert together.shape == (2, OUT, IN)
        return
    for e in range(2):
        parts = [Adapter({Q: (adapter.updates[stacked][0].map(lambda leaf, e=e: from_numpy(leaf.numpy()[e])),)})
                 for adapter in given_]  # fmt: skip
        close(together[e], change(ak.ops.combine(parts, name, **more)), 1e-5)


@pytest.mark.parametrize("name", ["ties", "knots_ties", "tsv", "core_tsv"])
def test_kernels_are_flattened(name):
    made = ak.ops.combine(adapters(columns=(7, 2, 2)), name)
    flat = ak.ops.combine(adapters(columns=(28,)), name)
    assert change(made).shape == (OUT, 7, 2, 2)
    # The same random numbers in another shape.
    close(change(made).reshape(OUT, IN), change(flat), 1e-6)


@pytest.mark.parametrize("rank", ["fit", 1, 2])
@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "sce", "tsv"])
def test_a_weight_with_one_row_stays_a_lora(name, rank, tmp_path):
    """A head with one label has rank 1, so the cut loses nothing, and PEFT's format can store the result."""
    rng = np.random.default_rng(3)
    heads = [
        Adapter({target: (METHODS["lora"](A=from_numpy(rng.normal(size=(2, 16)).astype("f4")),
                                          B=from_numpy(rng.normal(size=(out, 2)).astype("f4"))),)
                 for target, out in ((Target("score"), 1), (Q, 8))})
        for _ in range(2)
    ]  # fmt: skip
    ak.write(ak.ops.combine(heads, name, rank=rank), tmp_path / "a", "peft")
    head = Target("score")
    close(change(ak.read(tmp_path / "a"), head), change(ak.ops.combine(heads, name), head), 1e-5)


@pytest.mark.parametrize("name", ["linear", "ties", "tsv", "knots", "iso_c", "wudi", "ctm_linear"])
def test_methods_without_thin_factors_are_combined_too(name):
    rng = np.random.default_rng(9)
    dense = Adapter({Q: (METHODS["dense"](D=from_numpy(rng.normal(size=(OUT, IN)))),)})
    given_ = [adapters(1, targets=[Q])[0], dense]
    made = ak.ops.combine(given_, name, **({"rank": 4} if name == "ctm_linear" else {}))
    assert change(made).shape == (OUT, IN)
    assert np.isfinite(change(made)).all()
    if name == "tsv":
        parts = [np.linalg.svd(exact(adapter), full_matrices=False) for adapter in given_]
        kept = [RANK, OUT // 2]
        U = polar(np.hstack([part[0][:, :k] for part, k in zip(parts, kept, strict=True)]))
        Vh = polar(np.vstack([part[2][:k] for part, k in zip(parts, kept, strict=True)]))
        S = np.concatenate([part[1][:k] for part, k in zip(parts, kept, strict=True)])
        close(exact(made), U @ np.diag(S) @ Vh)


def test_an_adapter_without_a_target_takes_no_part_there():
    both, alone = adapters(2), adapters(1, targets=[Q])
    made = ak.ops.combine([*both, alone[0]], "model_stock")
    close(exact(made, V), exact(ak.ops.combine(both, "model_stock"), V))


def test_ranks_may_differ():
    given_ = [adapters(1, rank=2)[0], adapters(2, rank=5)[1]]
    for name in ("knots_ties", "tsv", "core_task_arithmetic", "lego", "ctm"):
        assert np.isfinite(change(ak.ops.combine(given_, name))).all()


def test_a_result_is_cut_to_its_best_approximation():
    given_ = adapters()
    for name in ("linear", "ties", "tsv"):
        U, S, V = leading(exact(ak.ops.combine(given_, name)), 4)
        made = ak.ops.combine(given_, name, rank=4)
        assert made.updates[Q][0].A.shape == (4, IN)
        close(exact(made), U @ np.diag(S) @ V.T, 1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "linear", "model_stock", "karcher", "tsv", "iso_c", "iso_cts", "cart", "wudi", "svc", "core_ties",
        "core_dare_ties", "pico", "ctm", "lego", "robust_merge",
    ],
)  # fmt: skip
def test_factors_are_never_multiplied_out(name):
    size = 1500
    given_ = adapters(targets=[Q], out=size, columns=(size,), rank=2)
    tracemalloc.start()
    try:
        ak.ops.combine(given_, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size * size * 8 / 2


# Weights and parameters that differ from place to place.


def test_weights_by_glob_and_by_depth():
    given_ = adapters(2)
    made = ak.ops.combine(given_, "linear", [{"*.q": 2.0}, [0.25, 0.75]])
    close(exact(made), 2 * exact(given_[0]) + 0.25 * exact(given_[1]))
    close(exact(made, V), exact(given_[0], V) + 0.75 * exact(given_[1], V))


def test_parameters_by_glob_and_by_adapter():
    given_ = adapters(2)
    made = ak.ops.combine(given_, "magnitude_prune", density={"*.q": 0.5, "*": 1.0})
    close(exact(made, V), exact(given_[0], V) + exact(given_[1], V))
    close(exact(made), exact(ak.ops.combine(given_, "magnitude_prune", density=0.5)))
    own = ak.ops.combine(given_, "magnitude_prune", each=[{"density": 0.0}, {"density": 1.0}])
    close(exact(own), exact(given_[1]))
    beside = ak.ops.combine(given_, "ties", density=1.0, each=[{"density": 0.3}, {}], sign="none", denominator="none")
    kept = trimmed([exact(given_[0]), exact(given_[0], V)], 0.3)
    for target, part in zip((Q, V), kept, strict=True):
        close(exact(beside, target), part + exact(given_[1], target))


# Methods that learn.


def wanted(given_, coefficients):
    return {
        target: sum(c * exact(a, target) for c, a in zip(coefficients[target], given_, strict=True))
        for target in (Q, V)
    }


@pytest.mark.parametrize("name", ["adamerging", "cat"])
def test_coefficients_are_learned_from_gradients(name):
    given_ = adapters(2)
    goal = wanted(given_, {Q: [0.9, 0.1], V: [0.3, 0.7]})

    def score(adapter):
        rest = {target: exact(adapter, target) - goal[target] for target in (Q, V)}
        return sum(float((r * r).sum()) for r in rest.values()), {str(t): 2 * r for t, r in rest.items()}

    made = ak.ops.combine(given_, name, data=score, steps=400, rate=0.05)
    for target in (Q, V):
        close(exact(made, target), goal[target], 0.02)


def test_coefficients_are_learned_from_scores_alone():
    given_ = adapters(2)
    goal = wanted(given_, {Q: [0.6, -0.4], V: [0.6, -0.4]})

    def score(adapter):
        return sum(float(((exact(adapter, target) - goal[target]) ** 2).sum()) for target in (Q, V))

    made = ak.ops.combine(given_, "adamerging", data=score, per="task", steps=300, rate=0.02)
    close(exact(made), goal[Q], 0.02)
    found = ak.ops.combine(given_, "lorahub", data=score, apart=False, steps=300, penalty=0.0)
    close(exact(found), goal[Q], 0.1)
    apart = ak.ops.combine(given_, "lorahub", data=score, steps=30)
    assert apart.updates[Q][0].A.shape == (RANK, IN)


@pytest.mark.parametrize("name", ["regmean", "regmean_plus"])
def test_regression_has_the_least_error_on_the_tasks_inputs(name):
    given_ = adapters(2)
    inputs = {(t, str(target)): np.random.default_rng([5, t, i]).normal(size=(40, IN)) * (1 + np.arange(IN))
              for t in range(2) for i, target in enumerate((Q, V))}  # fmt: skip
    seen = []

    def data(t, path, *merged):
        seen.append((path, [None if m is None else list(m.updates) for m in merged]))
        return inputs[t, path]

    made = ak.ops.combine(given_, name, data=data, alpha=1.0)
    for target in (Q, V):
        X = np.vstack([inputs[t, str(target)] for t in range(2)])
        Y = np.vstack([inputs[t, str(target)] @ exact(a, target).T for t, a in enumerate(given_)])
        close(exact(made, target), np.linalg.lstsq(X, Y, rcond=None)[0].T, 1e-6)
    after = [merged for path, merged in seen if path == str(V)]
    assert after == ([[[Q]]] * 2 if name == "regmean_plus" else [[]] * 2)


@pytest.mark.parametrize("name", PLAIN)
def test_results_that_do_not_vanish_are_not_warned_of(name):
    """Changes with factors, and without."""
    thin = adapters(few(name), targets=[Q])
    whole = [Adapter({Q: (METHODS["dense"](D=from_numpy(exact(each))),)}) for each in thin]
    for given_ in (thin, whole) if name not in BY_FACTORS - {"core", "pico"} else (thin,):
        words = {"rank": RANK} if name == "ctm" else {}
        warned = ak.ops.combine(given_, name, **words).recipe[-1].args.get("warnings", [])
        # Without a base, combiners that use the depth of layers warn where the layers end.
        assert [line for line in warned if "over the layers ends" not in line] == []


@pytest.mark.parametrize("dtype", [None, "F64"])
def test_results_that_vanish_are_said_with_numbers(dtype):
    """Model Stock of opposite changes, and products that float32 cannot hold."""
    one = adapters(1, targets=[Q])[0]
    made = ak.ops.combine([one, ak.ops.scale(one, -1.0)], "model_stock")
    (line,) = made.recipe[-1].args["warnings"]
    assert "the result is zero" in line
    assert not exact(made).any()
    small = [Adapter({Q: (METHODS["lora"](**{n: from_numpy((1e-25 * getattr(a.updates[Q][0], n).numpy()).astype("f4"))
             for n in "AB"}),)}) for a in adapters(2, targets=[Q])]  # fmt: skip
    made = ak.ops.combine(small, "ties", dtype=dtype)
    said = made.recipe[-1].args.get("warnings", [])
    assert len(said) == (dtype is None)
    assert bool(exact(made).any()) == (dtype == "F64")
    assert all("are zero in F32" in line and "e-" in line for line in said)


# What is refused.


def refused(error, words, *args, **more):
    with pytest.raises(error, match=words):
        ak.ops.combine(*args, **more)


def test_bad_input_is_refused():
    two = adapters(2)
    refused(UsageError, "no adapter was given", [])
    refused(UsageError, "a single adapter was given instead of a list", two[0])
    refused(Unsupported, "unknown way to combine 'tiess'.*ties", two, "tiess")
    refused(UsageError, "no parameter 'densty'.*density", two, "ties", densty=0.5)
    refused(UsageError, "'half' is not a number", two, "ties", density="half")
    refused(UsageError, "1.5 is not allowed", two, "ties", density=1.5)
    refused(UsageError, "'most' is not allowed.*model, tensor", two, "ties", scope="most")
    refused(UsageError, "1 weights for 2 adapters", two, "ties", [1.0])
    refused(UsageError, "not a finite number", two, "ties", [1.0, float("nan")])
    refused(UsageError, "sum to 0", two, "slerp", [1.0, -1.0])
    refused(UsageError, "slerp takes 2 adapters", adapters(3), "slerp")
    refused(UsageError, "nearswap takes 1 adapters, not 2", two, "nearswap")
    refused(UsageError, "needs the weights of the base", two[:1], "arcee_fusion")
    refused(UsageError, "cannot be the inner method", two, "knots", then="arcee_fusion")
    refused(UsageError, "no target matches", two, "linear", [{"*.k": 1.0}, 1.0])
    refused(UsageError, "rank is 99, but the weights have at most rank 20", two, "linear", rank=99)
    refused(UsageError, "rank is 99, but the weights have at most rank 20", two, "ctm", rank=99)
    refused(UsageError, "rank is '4', but", two, "linear", rank="4")
    refused(UsageError, "seed -1 is not a whole number", two, "dare_ties", seed=-1)
    refused(UsageError, "needs data", two, "regmean")
    refused(UsageError, "does not use data", two, "ties", data=print)
    refused(UsageError, "cannot differ between adapters", two, "ties", each=[{"scale": 1.0}, {}])
    refused(UsageError, "is not a list of dicts", two, "ties", each=[0.5, 0.2])
    refused(UsageError, "cannot differ", two, "ties", density={"*.q": 0.5})
    refused(UsageError, "cannot differ", two, "ties", density={"*.q": 1.0, "*": 0.5})
    refused(UsageError, "cannot be the inner method", two, "knots", then="core")
    refused(
        UsageError,
        r"cannot be summed separately(.|\n)*adapterkit resize A --rank R",
        [*adapters(1), adapters(2, rank=5)[1]],
        "factors",
    )
    refused(
        UsageError,
        r"no target in common(.|\n)*--disjoint \(disjoint=\)",
        [adapters(1, targets=[Q])[0], adapters(1, targets=[V])[0]],
        "ties",
    )
    refused(ShapeMismatch, "made for weights", [*adapters(1), adapters(2, out=OUT + 1)[1]], "ties")
    refused(UsageError, "returned no gradients", two, "cat", data=lambda _: 1.0)


@pytest.mark.parametrize("name", PLAIN)
def test_adapters_that_change_nothing_yet_are_combined(name):
    """B of a fresh LoRA is zero."""
    fresh = [a.replace(updates={Q: (a.updates[Q][0].replace(B=from_numpy(np.zeros((OUT, RANK)))),)})
             for a in adapters(few(name), targets=[Q])]  # fmt: skip
    assert not change(ak.ops.combine(fresh, name)).any()


def test_numbers_that_are_none_are_refused_when_they_are_read():
    good, bad = adapters(2, targets=[Q])
    A = np.full((RANK, IN), np.nan)
    bad = bad.replace(updates={Q: (bad.updates[Q][0].replace(A=from_numpy(A)),)})
    for name in ("tsv", "ties", "model_stock"):
        refused(Malformed, "NaN or an infinity", [good, bad], name)


FRAGILE = ["ctm", "wudi", "tsv", "iso_c", "core_ties", "knots_ties", "ties", "boost", "dc_merge"]


@pytest.mark.parametrize("name", FRAGILE)
@pytest.mark.parametrize("size", [1e75, 1e150])
def test_numbers_too_large_are_a_typed_error_or_a_result(name, size):
    """Whatever LAPACK makes of them, the error is ours and names the target."""
    given_ = [ak.ops.scale(adapter, size) for adapter in adapters(2, targets=[Q])]
    given_ = [a.replace(updates={Q: (a.updates[Q][0].replace(B=from_numpy(size * a.updates[Q][0].B.numpy())),)})
              for a in given_]  # fmt: skip
    found = {}
    with suppress(Malformed):
        try:
            found["made"] = exact(ak.ops.combine(given_, name))
        except Malformed as error:
            found["where"] = error.where
            raise
    assert np.isfinite(found["made"]).all() if "made" in found else "layers.0.q" in found["where"]


def test_third_parties_follow_the_same_rules():
    for name, cls in COMBINERS.items():
        assert cls.title, name
        assert cls.paper.startswith("https://"), name
        assert all(field.metadata["meaning"] for field in cls.parameters().values())
        for peer, values in cls.compat.items():
            assert peer in ("mergekit", "peft")
            assert all(cls.checked(key, value) == value for key, value in values.items())


def test_an_outline_has_the_lineage_of_the_result():
    """Formats look there for the kind of model, such as kohya for the names of a U-Net's convolutions."""
    seen = []
    one, other = adapters(2)
    one = one.replace(recipe=(Step("read", {"format": "kohya"}),))
    made = ak.ops.combine([one, other], "ties", before=seen.append)
    assert [step.op for step in seen[0].recipe] == ["combine"]
    assert seen[0].recipe == made.recipe
    assert seen[0].foreign is made.foreign is None


def test_a_lora_without_convolutions_is_combined_with_one_that_has_them(tmp_path):
    """kohya's names of convolutions differ between Stable Diffusion 1 and XL; both files say which they are of."""
    paths = []
    for number, modules in enumerate((["attn"], ["attn", "conv"])):
        rng, tensors = np.random.default_rng(number), {}
        for module in modules:
            name, kernel = {
                "attn": ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", ()),
                "conv": ("down_blocks_0_resnets_0_conv1", (3, 3)),
            }[module]
            tensors[f"lora_unet_{name}.lora_down.weight"] = rng.normal(size=(2, 320, *kernel)).astype("f4")
            tensors[f"lora_unet_{name}.lora_up.weight"] = rng.normal(size=(320, 2, *(1 for _ in kernel))).astype("f4")
            tensors[f"lora_unet_{name}.alpha"] = np.array(2.0, "f4")
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1], {"ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora"})
    out = tmp_path / "out.safetensors"
    done = CliRunner().invoke(adapterkit, ["combine", *map(str, paths), "--method", "ties", "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert len(ak.read(out).updates) == 2


@pytest.mark.parametrize("name", ["model_stock", "slerp", "karcher", "multislerp"])
def test_factors_that_are_larger_than_their_weight_stay_factors_in_a_format_without_dense_updates(name, tmp_path):
    """The result has twice the rank, which is stored as a dense difference where a format has one."""
    given_ = adapters(2, targets=[Q], rank=16)
    for number, adapter in enumerate(given_):
        ak.write(adapter, tmp_path / str(number), format="peft")
    paths = [str(tmp_path / str(number)) for number in range(2)]
    done = CliRunner().invoke(adapterkit, ["combine", *paths, "--method", name, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    close(change(ak.read(tmp_path / "out")), exact(ak.ops.combine(given_, name)), 1e-5)

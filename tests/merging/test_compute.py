"""Blocks of a merge against float64 formulas: layouts, rows, stacks and biases, where a block ends inside a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adapterkit as ak
from adapterkit.core.updates import Update
from adapterkit.errors import Malformed
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.io.lazy import from_numpy
from adapterkit.merging import blocks as blocks_module
from adapterkit.merging import planned as planned_module
from adapterkit.merging import planned_update as update_module
from adapterkit.merging.arrays import NumpyArrays, Workspace
from adapterkit.merging.blocks import Block, blocks
from adapterkit.merging.compiled import THIN
from adapterkit.merging.compute import is_thin, load_all, norm_of, side_by_side
from adapterkit.merging.planned import BLOCK_ELEMENTS, Output
from adapterkit.merging.planned_update import PlannedUpdate, factor_bytes
from adapterkit.methods import METHODS

Array = np.ndarray
OUT, IN, EXPERTS = 12, 10, 3
LAYOUTS = ["out *in", "in out *k", "e out *in", "e in out *k"]
ROWS = [None, (3, 9)]


def numbers(*shape: int, seed: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


@dataclass(frozen=True)
class Change:
    """An update, and the formula of one weight `[out, in]` of it in numpy, by expert."""

    update: Update
    formula: Callable[[Array, int], Array]


def update(name: str, tensors: dict[str, Array], **attributes: object) -> Update:
    return METHODS[name](**{key: from_numpy(value) for key, value in tensors.items()}, **attributes)


def change(name: str, out: int, stack: tuple[int, ...], seed: int) -> Change:
    """An update of a weight with `out` rows, of one weight or with a leading axis of experts, and its formula."""
    A, B, scale, D = (numbers(*stack, *s, seed=seed + i) for i, s in enumerate([(2, IN), (out, 2), (out,), (out, IN)]))
    of = (lambda t, e: t[e]) if stack else (lambda t, _: t)
    if name == "lora":
        return Change(update("lora", {"A": A, "B": B}, scaling=0.5), lambda W, e: W + 0.5 * of(B, e) @ of(A, e))
    if name == "dense":
        return Change(update("dense", {"D": D}, scaling=0.3), lambda W, e: W + 0.3 * of(D, e))
    if name == "ia3":
        return Change(update("ia3", {"l": scale}), lambda W, e: W * of(scale, e)[:, None])

    def dora(W: Array, e: int) -> Array:
        V = W + 0.5 * of(B, e) @ of(A, e)
        return abs(of(scale, e))[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True)

    return Change(update("dora", {"A": A, "B": B, "magnitude": abs(scale)}, scaling=0.5), dora)


def weights_of(stored: Array, layout: str, rows: tuple[int, int] | None) -> Iterator[Array]:
    """Views `[out, in]` of a stored tensor's weights: what a target with this layout and these rows names."""
    for weight in stored if layout.startswith("e ") else [stored]:
        view = weight if layout.endswith("in") else weight.T
        yield view if rows is None else view[slice(*rows)]


COMBINATIONS = [
    ("lora",),
    ("dense",),
    ("ia3",),
    ("dora",),
    ("lora", "lora"),
    ("lora", "dense"),
    ("ia3", "dora", "lora"),
]


@pytest.mark.parametrize("elements", [7, 3 * IN, 5 * OUT, BLOCK_ELEMENTS])
@pytest.mark.parametrize("rows", ROWS, ids=["all", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_any_blocks_give_the_formula(
    names: tuple[str, ...],
    layout: str,
    rows: tuple[int, int] | None,
    elements: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W' = W + sum of weight * (f(W) - W) in float64, and the norm of each of these changes in the report."""
    monkeypatch.setattr("adapterkit.merging.blocks.BLOCK_ELEMENTS", elements)
    stack = (EXPERTS,) if layout.startswith("e ") else ()
    stored = numbers(*stack, *((OUT, IN) if layout.endswith("in") else (IN, OUT)), seed=1)
    size = OUT if rows is None else rows[1] - rows[0]
    changes = [change(name, size, stack, seed=10 * at) for at, name in enumerate(names, 1)]
    weights = [1.0, -0.75, 2.0][: len(names)]
    save_file({"m.weight": stored}, tmp_path / "base.safetensors")
    adapters = [ak.Adapter({ak.Target("m", layout, rows=rows): (each.update,)}) for each in changes]
    report = ak.merge(tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors", weights=weights)

    exact, norms = stored.copy(), []
    for each, weight in zip(changes, weights, strict=True):
        new = stored.copy()
        for expert, view in enumerate(weights_of(new, layout, rows)):
            view[...] = each.formula(view.copy(), expert)
        exact += weight * (new - stored)
        norms.append(abs(weight) * float(np.linalg.norm(new - stored)))
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")["m.weight"], exact, rtol=0, atol=1e-13)
    assert report.norms["m.weight"] == pytest.approx(norms, rel=1e-12)


SPANS = [(0, 5), (3, 8), (9, 12)]


@pytest.mark.parametrize("elements", [IN, 3 * IN, BLOCK_ELEMENTS])
@pytest.mark.parametrize("together", [False, True], ids=["adapters", "one adapter"])
@pytest.mark.parametrize("names", [("ia3", "lora", "dora"), ("dora", "ia3", "ia3"), ("lora", "dense", "lora")])
def test_changes_of_different_rows(
    names: tuple[str, ...], together: bool, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many blocks have no part in some changes. Several adapters add up; targets of one apply one after another."""
    monkeypatch.setattr("adapterkit.merging.blocks.BLOCK_ELEMENTS", elements)
    stored = numbers(OUT, IN, seed=1)
    save_file({"m.weight": stored}, tmp_path / "base.safetensors")
    pairs = list(zip(names, SPANS, strict=True))
    changes = [change(name, last - first, (), seed=first) for name, (first, last) in pairs]
    one = {ak.Target("m", rows=rows): (each.update,) for each, rows in zip(changes, SPANS, strict=True)}
    adapters = [ak.Adapter(one)] if together else [ak.Adapter({target: us}) for target, us in one.items()]
    ak.merge(tmp_path / "base.safetensors", adapters, tmp_path / "out.safetensors")
    exact = stored.copy()
    for each, rows in zip(changes, SPANS, strict=True):
        seen = (exact if together else stored)[slice(*rows)]
        exact[slice(*rows)] += each.formula(seen, 0) - seen
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")["m.weight"], exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "experts"])
@pytest.mark.parametrize("before", [False, True], ids=["alone", "after another"])
@pytest.mark.parametrize("layout", ["out *in", "in out *k"])
def test_a_bias_that_depends_on_the_weight(stacked: bool, before: bool, layout: str, tmp_path: Path) -> None:
    """GLoRA's b' = b + W @ C, where W is the weight that the adapter's earlier updates of it leave."""
    stack = (EXPERTS,) if stacked else ()
    W = numbers(*stack, OUT, IN, seed=1)
    b, C, scale = (numbers(*stack, n, seed=n) for n in (OUT, IN, OUT))
    stored = W if layout == "out *in" else W.swapaxes(-1, -2).copy()
    save_file({"m.weight": stored, "m.bias": b}, tmp_path / "base.safetensors")
    glora, ia3 = update("glora", {"C": C}), update("ia3", {"l": scale})
    target = ak.Target("m", f"e {layout}" if stacked else layout)
    adapter = ak.Adapter({target: (ia3, glora) if before else (glora,)})
    ak.merge(tmp_path / "base.safetensors", adapter, tmp_path / "out.safetensors", weights=[0.5])
    seen, vector = (W * scale[..., None], b * scale) if before else (W, b)
    exact = b + 0.5 * (vector + np.einsum("...oi,...i->...o", seen, C) - b)
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")["m.bias"], exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("dtype", "size"), [("F16", 1e5), ("BF16", 1e39), ("F32", 1e39)])
@pytest.mark.parametrize("name", ["lora", "dense", "ia3"])
def test_a_result_beyond_the_dtype_is_refused(name: str, dtype: str, size: float, tmp_path: Path) -> None:
    """Base and factors are finite, and the sum is not once it is rounded. A tenth of the change is."""
    large = {
        "lora": lambda: update("lora", {"A": np.ones((1, IN)), "B": np.full((OUT, 1), size)}),
        "dense": lambda: update("dense", {"D": np.full((OUT, IN), size)}),
        "ia3": lambda: update("ia3", {"l": np.full(OUT, size)}),
    }[name]()
    save_file({"m.weight": np.ones((OUT, IN), np.float32)}, tmp_path / "base.safetensors")
    adapter, out = ak.Adapter({ak.Target("m"): (large,)}), tmp_path / "out.safetensors"
    with pytest.raises(Malformed, match=f"a NaN or an infinity in {dtype}") as raised:
        ak.merge(tmp_path / "base.safetensors", adapter, out, dtype=dtype)
    assert raised.value.where == "m.weight"
    assert not out.exists()
    ak.merge(tmp_path / "base.safetensors", adapter, out, dtype=dtype, weights=[0.1])


def planned(
    update_: Update, shape: tuple[int, ...] = (OUT, IN), layout: str = "out *in", rows: tuple[int, int] | None = None
) -> PlannedUpdate:
    return PlannedUpdate(ak.Target("m", layout, rows=rows), (update_,), 1.0, 0, False, shape)


def low_rank(out: int, rank: int, seed: int = 0) -> Update:
    return update("lora", {"A": numbers(rank, IN, seed=seed), "B": numbers(out, rank, seed=seed + 1)})


def test_only_low_ranks_of_matrices_are_thin() -> None:
    """Nothing but speed depends on it: joined factors of a high rank cost more than the sum of their products."""
    dense, stacked = change("dense", OUT, (), 0).update, change("lora", OUT, (EXPERTS,), 0).update
    cases = [
        (planned(low_rank(OUT, 2)), True),
        (planned(low_rank(OUT, THIN)), True),
        (planned(low_rank(OUT, THIN + 1)), False),
        (planned(dense), False),
        (planned(change("ia3", OUT, (), 0).update), False),
        (planned(stacked, (EXPERTS, OUT, IN), "e out *in"), False),
    ]
    for fold, thin in cases:
        assert is_thin(fold, load_all(fold, NumpyArrays())) == thin, fold.updates
    both = [each for fold in (planned(low_rank(OUT, 2)), planned(dense)) for each in load_all(fold, NumpyArrays())]
    assert not is_thin(cases[0][0], both)


def test_joined_factors_are_the_sum() -> None:
    arrays = NumpyArrays()
    folds = [planned(low_rank(OUT, rank, seed=rank)) for rank in (2, 5, 1)]
    terms = [(fold, load_all(fold, arrays), weight) for fold, weight in zip(folds, (0.5, -2.0, 3.0), strict=True)]
    one = side_by_side(terms, Workspace(arrays))
    exact = sum(weight * each[0].tensors["B"] @ each[0].tensors["A"] for _, each, weight in terms)
    np.testing.assert_allclose(one.delta((OUT, IN)), exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("ranks", [(3,), (3, 5), (3, 5, 2)])
def test_the_memory_of_factors_is_what_they_take(ranks: tuple[int, ...]) -> None:
    """Loaded float64 factors, and the workspace's joined ones where there are several."""
    arrays = NumpyArrays()
    folds = [planned(low_rank(OUT, rank)) for rank in ranks]
    loaded = [(fold, load_all(fold, arrays), 1.0) for fold in folds]
    taken = sum(leaf.nbytes for _, updates, _ in loaded for each in updates for leaf in each.tensors.values())
    if len(folds) > 1:
        taken += sum(leaf.nbytes for leaf in side_by_side(loaded, Workspace(arrays)).tensors.values())
    assert factor_bytes(folds) == taken


@pytest.mark.parametrize("stack", [(), (EXPERTS,)], ids=["one", "experts"])
def test_the_norm_of_a_sum_is_that_of_its_matrix(stack: tuple[int, ...]) -> None:
    pair = [change(name, OUT, stack, seed) for seed, name in enumerate(("lora", "dense"))]
    target = ak.Target("m", "e out *in" if stack else "out *in")
    fold = PlannedUpdate(target, tuple(each.update for each in pair), 1.0, 0, False, (*stack, OUT, IN))
    zero = np.zeros((OUT, IN))
    sums = [pair[0].formula(zero, e) + pair[1].formula(zero, e) for e in range((len(stack) and EXPERTS) or 1)]
    assert norm_of(load_all(fold, NumpyArrays()), fold) == pytest.approx(np.linalg.norm(sums), rel=1e-13)


SHAPES = [
    # stored shape, layout, rows, shape of one weight in the axes of updates
    ((12, 10), "out *in", None, (12, 10)),
    ((12, 10), "in out *k", None, (10, 12)),
    ((12, 10), "out *in", (3, 9), (6, 10)),
    ((10, 12), "in out *k", (3, 9), (6, 10)),
    ((12, 10, 3, 2), "out *in", None, (12, 10, 3, 2)),
    ((12, 10, 3), "in out *k", None, (10, 12, 3)),
    ((4, 12, 10), "e out *in", None, (12, 10)),
    ((4, 10, 12), "e in out *k", None, (12, 10)),
    ((4, 10, 12), "e in out *k", (3, 9), (6, 10)),
    ((12,), "out *in", None, (12, 1)),
    ((12,), "out *in", (3, 9), (6, 1)),
]


@pytest.mark.parametrize(("stored", "layout", "rows", "shape"), SHAPES)
def test_updates_see_a_weight_with_its_outputs_first(
    stored: tuple[int, ...], layout: str, rows: tuple[int, int] | None, shape: tuple[int, ...]
) -> None:
    assert planned(low_rank(OUT, 2), stored, layout, rows).logical == shape


def outputs(shape: tuple[int, ...], folds: tuple[PlannedUpdate, ...], tmp_path: Path) -> Output:
    save_file({"m.weight": np.zeros(shape, np.float32)}, tmp_path / "base.safetensors")
    source = open_checkpoint(tmp_path / "base.safetensors").tensors["m.weight"]
    return Output("m.weight", source.dtype, shape, 0, source, folds)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((5000, 300), "out *in"),
        ((700, 3, 5, 7), "out *in"),
        ((3, 500, 1000), "e out *in"),
        ((2, BLOCK_ELEMENTS + 1), "out *in"),
        ((40, 9000), "out *in"),
    ],
)
def test_blocks_fit_the_cache_and_cover_each_row_once(shape: tuple[int, ...], layout: str, tmp_path: Path) -> None:
    """Rows come in multiples of 16, for which products of factors are fastest, unless a block has fewer."""
    stack = layout.startswith("e ")
    fold = planned(low_rank(shape[stack], 2), shape, layout)
    cut = blocks(outputs(shape, (fold,), tmp_path))
    rows, width = shape[stack], int(np.prod(shape[stack + 1 :]))
    found = [(block.expert, row) for block in cut for row in range(block.start, block.stop)]
    assert found == [(expert, row) for expert in (range(shape[0]) if stack else [None]) for row in range(rows)]
    at = 0
    for block in cut:
        assert block.first == at
        at += block.elements
        assert block.elements == (block.stop - block.start) * width
        assert block.elements <= max(BLOCK_ELEMENTS, width)
        last, fit = block.stop == rows, max(BLOCK_ELEMENTS // width, 1)
        # No block but the last has room for 16 more rows.
        assert last or block.stop - block.start == (fit if fit <= 16 else fit // 16 * 16)
    assert at == int(np.prod(shape))


def test_an_update_of_all_rows_at_once_is_one_block(tmp_path: Path) -> None:
    """A rotation of the outputs mixes all rows."""
    size, width = 1024, 600
    rotation = update("oft", {"pairs": numbers(size // 4, 6, seed=0)}, side="out")
    output = outputs((size, width), (planned(rotation, (size, width)),), tmp_path)
    assert size * width > BLOCK_ELEMENTS
    assert blocks(output) == [Block(None, 0, size, size, width)]
    assert blocks(output)[0].whole
    assert not Block(None, 0, size - 1, size, width).whole
    assert not Block(None, 1, size, size, width).whole


MODULES = [blocks_module, planned_module, update_module]
VALUES = [c for m in MODULES for c in vars(m).values() if is_dataclass(c) and c.__module__ == m.__name__]


@pytest.mark.parametrize("cls", VALUES)
def test_a_plan_is_a_value(cls: type) -> None:
    """Threads and other machines read a plan at the same time, so nobody changes it."""
    value = object.__new__(cls)
    for each in fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(value, each.name, None)

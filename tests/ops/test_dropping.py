"""The compiled loop that drops entries at random gives the bits of numpy's code."""

from __future__ import annotations

import numpy as np
import pytest
from compiled_loops import needs_loops
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS
from adapterkit.ops.blocks import Blocks
from adapterkit.ops.combiners import COMBINERS, _entrywise
from adapterkit.ops.context import FormulaContext

pytestmark = needs_loops

Q = Target("layers.0.q")
ROWS = ("normal", "equal", "zeros", "sparse", "tiny", "huge", "ordered", "reversed", "near", "octaves", "whole")


def row(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of a kind that a way of sorting may meet badly."""
    drawn = rng.standard_normal(n)
    return {
        "normal": drawn,
        "equal": np.full(n, -1.5),
        "zeros": np.zeros(n) * np.sign(drawn),
        "sparse": drawn * (rng.random(n) < 0.1),
        "tiny": drawn * 5e-324,
        "huge": drawn * 1e307,
        "ordered": np.sort(drawn),
        "reversed": -np.sort(np.abs(drawn))[::-1],
        # Equal in their leading bits and falling: every key has to be moved past all before it.
        "near": 1.0 - np.arange(n) * 2.0**-36,
        "octaves": drawn * 2.0 ** rng.integers(-60, 60, n),
        "whole": np.round(3 * drawn),
    }[kind]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32), columns=st.integers(1, 700), kinds=st.lists(st.sampled_from(ROWS), min_size=1),
    density=st.sampled_from([0.0, 1e-300, 0.3, 0.7, 1.0]), epsilon=st.sampled_from([0.0, 0.07, 0.29]),
    rescale=st.sampled_from(["inverse", "none", "norm"]), first=st.integers(0, 50),
    name=st.sampled_from(["della", "dare_linear", "dare_ties"]),
)  # fmt: skip
def test_entries_are_those_of_numpy(seed, columns, kinds, density, epsilon, rescale, first, name):
    rng = np.random.default_rng(seed)
    changes = np.stack([np.stack([row(kind, columns, rng) for kind in kinds]) for _ in range(2)])
    own = {"density": density, "rescale": rescale}
    if name == "della":
        own["epsilon"] = min(epsilon, density / 2 if density < 1 else 0.0)
        own["density"] = max(density, 0.1)
    method = COMBINERS[name](**own)
    at = FormulaContext(Q, changes.shape[1:], (0, 3), seed=seed)
    whole = Blocks([ak.ops.combiners._combiner.whole(D) for D in changes])
    rows = slice(first, first + len(kinds))
    with np.errstate(over="ignore", invalid="ignore"):
        ours = method._kept(whole, at)(changes.copy(), rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_entrywise, "loops", lambda: None)
            theirs = method._kept(whole, at)(changes.copy(), rows)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("more", [{}, {"rescale": "norm"}, {"scale": 0.5}])
@pytest.mark.parametrize("name", ["della", "dare_linear", "dare_ties", "knots_dare_ties", "core_dare_linear"])
def test_results_are_those_of_numpy(name, more, monkeypatch):
    """Many rows and blocks, a bias, several adapters with settings of their own."""
    asked = []

    def none():
        asked.append(True)

    def update(t):
        rng = np.random.default_rng(t)
        shapes = {"B": (300, 4), "A": (4, 1100), "bias": (300,)}
        return METHODS["lora"](**{name: from_numpy(rng.standard_normal(shape)) for name, shape in shapes.items()})

    given_ = [Adapter({Q: (update(t),)}) for t in range(3)]
    each = [{"density": 0.9}, {}, {"density": 1.0}]
    ours = made(given_, name, each, more)
    monkeypatch.setattr(_entrywise, "loops", none)
    assert made(given_, name, each, more) == ours
    assert asked


def made(given_, name, each, more):
    update = ak.ops.combine(given_, name, each=each, **more).updates[Q][0]
    return {field: leaf.numpy().tobytes() for field, leaf in update.tensors.items()}

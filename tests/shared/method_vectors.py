"""The vectors of weight methods: their targets and weights, opened once."""

from functools import cache
from pathlib import Path

import pytest

import adapterkit as ak
from adapterkit.io.checkpoint import open_checkpoint
from adapterkit.methods import METHODS
from adapterkit.naming.binding import bind

VECTORS = Path(__file__).parents[2] / "spec" / "vectors" / "methods"
OF_WEIGHTS = [name for name, cls in METHODS.items() if cls.kind in ("additive", "weight")]


def vectors_of(*kinds):
    """Return the names of the vectors of methods of these kinds: the method's, then one for each newer version."""
    names = (path.name.removesuffix(".adapter.safetensors") for path in sorted(VECTORS.glob("*.adapter.safetensors")))
    return [name for name in names if METHODS[name.partition(".")[0]].kind in kinds]


CASES = [
    pytest.param(vector, target.path, id=f"{vector}-{target.path}")
    for vector in vectors_of("additive", "weight")
    for target in ak.read(VECTORS / f"{vector}.adapter.safetensors", format="adapterkit").updates
]


@cache
def opened(vector):
    """Return the adapter, the base and the sites of a vector, by path."""
    base = open_checkpoint(VECTORS / f"{vector}.expected.safetensors")
    adapter = ak.read(VECTORS / f"{vector}.adapter.safetensors", format="adapterkit")
    return adapter, base, {site.target.path: site for site in bind(adapter, base).sites}

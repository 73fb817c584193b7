"""The vectors of the methods of weights: their targets, and what lies there, opened once."""

from functools import cache
from pathlib import Path

import pytest

import adapterkit as ak
from adapterkit.binding import bind
from adapterkit.methods import METHODS
from adapterkit.tensors.checkpoint import open_checkpoint

VECTORS = Path(__file__).parent.parent / "spec" / "vectors" / "methods"
OF_WEIGHTS = [name for name, cls in METHODS.items() if cls.kind in ("additive", "weight")]

CASES = [
    pytest.param(method, target.path, id=f"{method}-{target.path}")
    for method in OF_WEIGHTS
    for target in ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit").updates
]


@cache
def opened(method):
    """Adapter, base and the sites of a method's vector, by path."""
    base = open_checkpoint(VECTORS / f"{method}.expected.safetensors")
    adapter = ak.read(VECTORS / f"{method}.adapter.safetensors", format="adapterkit")
    return adapter, base, {site.target.path: site for site in bind(adapter, base).sites}

"""Another adapter's factors for each row: `add_gathered` equals the float64 formula, by torch's products and by Triton.

The kernels run in Triton's interpreter, on the CPU. They are skipped where Triton is not installed.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.methods import METHODS
from adapterkit.torch import batched as gathered

RANKS = (3, 16, 8, 1, 0)
"""Of each slot; the last is of rows without an adapter."""
SHAPES = [(7, 1, 24, 40), (5, 3, 130, 66), (3, 33, 64, 20), (1, 1, 16, 16), (4, 2, 65, 129)]
"""(rows, tokens, in, out): below, at and above the tiles' sizes, none a multiple of all."""


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(shape, dtype):
    rows, tokens, into, out = shape
    y, x = draw(rows, tokens, out, seed=1).to(dtype), draw(rows, tokens, into, seed=2).to(dtype)
    A, B = draw(len(RANKS), max(RANKS), into, seed=3).to(dtype), draw(len(RANKS), max(RANKS), out, seed=4).to(dtype)
    for slot, rank in enumerate(RANKS):
        A[slot, rank:], B[slot, rank:] = 0, 0
    index = torch.arange(rows) * 3 % len(RANKS)
    return y, x, A, B, index, torch.tensor(RANKS, dtype=torch.int32)


def formula(y, x, A, B, index, ranks):
    """In numpy, row by row, with each slot's own rank."""
    y, x, A, B = (tensor.double().numpy() for tensor in (y, x, A, B))
    out = []
    for row, slot in enumerate(index.tolist()):
        rank = int(ranks[slot])
        out.append(y[row] + x[row] @ A[slot, :rank].T @ B[slot, :rank])
    return np.stack(out)


def check(shape, dtype):
    given = case(shape, dtype)
    wanted = formula(*given)
    before = given[0].clone()
    loose = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    got = gathered.add_gathered(*given)
    assert got.dtype == dtype
    assert torch.equal(given[0], before), "y is somebody's"
    assert np.abs(got.double().numpy() - wanted).max() <= loose * np.abs(wanted).max()
    over = gathered.add_gathered(*given, fresh=True)
    assert torch.equal(over, got)
    assert over.data_ptr() == given[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_row_gets_its_own_factors(shape, dtype):
    check(shape, dtype)


def test_the_kernels_are_for_cuda_alone():
    assert not gathered.takes_kernel(*case(SHAPES[0], torch.float32)[:4])


def whole_model():
    """A route through two adapters of different ranks, and rows of the base; every row equals its own run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 72))
    names = []
    for number, rank in enumerate((2, 20)):
        updates = {
            Target(path): (
                METHODS["lora"](
                    A=draw(rank, into, seed=number).float(), B=draw(out, rank, seed=number + 9).float(), scaling=0.3
                ),
            )
            for path, into, out in (("0", 64, 80), ("2", 80, 72))
        }
        ak.torch.inject(model, Adapter(updates), name=f"a{number}", active=True)
        names.append(f"a{number}")
    x = draw(6, 5, 64, seed=7).float()
    rows = ["a0", None, "a1", "a1", "a0", None]
    with torch.no_grad():
        with ak.torch.route(model, rows):
            y = model(x)
        for row, name in enumerate(rows):
            with ak.torch.route(model, [name]):
                torch.testing.assert_close(y[row : row + 1], model(x[row : row + 1]), rtol=1e-5, atol=1e-4)
        handles = ak.torch.handles(model)
        for name in names:
            alone = [other for other in names if other != name]
            with handles[alone[0]].disable():
                one = model(x)
            for row in (r for r, each in enumerate(rows) if each == name):
                torch.testing.assert_close(y[row], one[row], rtol=1e-5, atol=1e-4)


def test_a_route_through_a_model_by_products():
    whole_model()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_in_the_interpreter():
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel runs:" in done.stdout


def by_kernel():
    """What the test above runs in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    from adapterkit.torch import batched, kernels

    runs, add = [], kernels.add_by_kernel
    kernels.add_by_kernel = lambda *given: (runs.append(len(given)), add(*given))[1]
    gathered.takes_kernel = batched.takes_kernel = lambda *_: True
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(shape, dtype)
    before = len(runs)
    assert before == 2 * 3 * len(SHAPES)
    whole_model()
    assert len(runs) == before + 2 * 7, "both layers, in every routed forward"
    sys.stdout.write(f"kernel runs: {len(runs)}")


if __name__ == "__main__":
    by_kernel()

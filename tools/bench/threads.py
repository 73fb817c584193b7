"""Threads with one model: each runs many forwards, each of another route, and checks every row of every one.

    python tools/bench threads [--threads 8] [--forwards 1000] [--only METHOD]... [--dtype float32]

Three adapters of each method of weights that `create` makes are attached to one linear layer, and of each method of
outputs beside it. Each forward must give what the same route gave in one thread before. It prints one line for each
method, as it is done, with the seconds that passed and those of the processor: a forward with its route takes 0.5 to
2.5 milliseconds, so all methods take ten minutes of processor time. It exits with 1 if any forward differed.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS

NAMES = (None, "a", "b", "c")
ROWS = 4


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--forwards", type=int, default=1000)
    parser.add_argument("--only", action="append", help="one method; may be given several times")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    started, done, wrong = time.monotonic(), [], 0
    for method in options.only or sorted(METHODS):
        made = model_of(method, getattr(torch, options.dtype))
        if made is None:
            continue
        done.append(method)
        before, processor = time.monotonic(), time.process_time()
        try:
            fault = run(*made, options.threads, options.forwards)
            wrong += bool(fault)
        except AdapterkitError as error:
            fault = f"refused: {error}"
        spent = f"{time.monotonic() - before:.1f} s, {time.process_time() - processor:.1f} s of the processor"
        print(f"{method}: {fault or 'no difference'} ({spent})", flush=True)
    each = f"{options.threads} threads x {options.forwards} forwards, {options.dtype}"
    print(f"{len(done)} methods, {each}: {wrong} differ; {time.monotonic() - started:.0f} s")
    print("methods:", ", ".join(done))
    return int(wrong > 0)


def model_of(method: str, dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor] | None:
    """A model with three adapters of a method attached, and an input; None where the method is not of one layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    for seed, name in enumerate(NAMES[1:]):
        try:
            adapter = ak.torch.create(model, method, targets="0", rank=2, seed=seed)
            generator = torch.Generator().manual_seed(seed)

            def moved(leaf: Any, generator: torch.Generator = generator) -> Any:
                tensor = torch.as_tensor(leaf)
                if not tensor.is_floating_point():
                    return tensor
                return tensor + 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

            updates = {
                target: tuple(u.replace(**{n: moved(t) for n, t in u.tensors.items() if n not in u.frozen}) for u in us)
                for target, us in adapter.updates.items()
            }
            ak.torch.inject(model, adapter.replace(updates=updates), name=name)
        except AdapterkitError:
            return None
    return model, torch.randn(ROWS, 3, 16, dtype=dtype)


@torch.no_grad()
def run(model: nn.Module, x: torch.Tensor, threads: int, forwards: int) -> str:
    """What went wrong first; empty where nothing did."""
    names = [[NAMES[(turn // 4**row) % 4] for row in range(ROWS)] for turn in range(4**ROWS)]
    wanted = []
    for each in names:
        with ak.torch.route(model, each):
            wanted.append(model(x))
    # In 16 bits products of many rows and of few round apart by some units.
    loose = {torch.float32: 1e-5, torch.float64: 1e-12}.get(x.dtype, 2e-2)
    faults: list[str] = []
    gate = threading.Barrier(threads)

    @torch.no_grad()
    def work(number: int) -> None:
        gate.wait()
        for turn in range(forwards):
            at = (number * 37 + turn * 5) % len(names)
            try:
                with ak.torch.route(model, names[at]):
                    got = model(x)
            except Exception as error:
                faults.append(f"{names[at]}: {type(error).__name__}: {error}")
                return
            apart = float((got - wanted[at]).abs().max())
            if not apart <= loose * max(float(wanted[at].abs().max()), 1.0):
                faults.append(f"{names[at]}: apart by {apart:.2e}")
                return

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    return faults[0] if faults else ""


if __name__ == "__main__":
    sys.exit(main())

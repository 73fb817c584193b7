"""Measures merging into the weights of a live model in place: the share of the memory bandwidth, and the memory used.

    python tools/bench in_place [--device cuda] [--layers 8] [--width 4096] [--rank 16] [--rounds 3]

The merge reads and writes each bfloat16 weight once; it is compared with a copy of the same number of bytes by torch on
the same device.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

import adapterkit as ak
from adapterkit.methods.lora import LoRA


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the device is done."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def held(device: torch.device) -> int:
    """Return the peak memory so far: on CUDA, that of torch on the device; otherwise, that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def adapter_for(layers: int, width: int, rank: int) -> ak.Adapter:
    """Return a LoRA on every layer."""
    pairs = [(torch.randn(rank, width) * 0.02, torch.randn(width, rank) * 0.02) for _ in range(layers)]
    return ak.Adapter({ak.Target(str(n)): (LoRA(A=A, B=B, scaling=1.0),) for n, (A, B) in enumerate(pairs)})


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    for name, value in (("layers", 8), ("width", 4096), ("rank", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    device, width = torch.device(options.device), options.width
    linears = (torch.nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(options.layers))
    model = torch.nn.Sequential(*linears).to(device)
    source = torch.ones(options.layers * width * width, dtype=torch.bfloat16, device=device)
    target = torch.ones_like(source)
    shares, grown = [], 0
    for _ in range(options.rounds):
        copying = timed(lambda: target.copy_(source), device)
        handle = ak.torch.inject(model, adapter_for(options.layers, width, options.rank))
        before = held(device)
        shares.append(copying / timed(handle.merge_, device))
        grown = max(grown, held(device) - before)
    median, least, most = (100 * pick(shares) for pick in (statistics.median, min, max))
    print(f"{median:.1f} % of a copy's bandwidth ({least:.1f} to {most:.1f})")
    print(
        f"{grown / 1e6:.0f} MB more held at most; one whole change in float32 would be {4 * width * width / 1e6:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

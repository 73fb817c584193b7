"""Measures combinations of whole adapters by the command line: processor time and memory, compared with other tools.

    python tools/bench/scale.py [--targets 224] [--size 4096] [--tasks 8] [--rank 16] [--only METHOD...] [--busy]
        [--peers]

Random float32 LoRA adapters in PEFT's format are written to --work once, 0.9 GB by default. Each method runs as
`adapterkit combine ... -o DIR`; results of methods that compute with every entry are cut to the rank. Seconds are user
and system time of the process. Memory is the largest anonymous memory; the largest resident size, which includes pages
of the input files, is in brackets. --busy repeats each run while other processes keep every processor busy. PEFT's
`ties_svd` and mergekit's `ties` are timed on one target, and the time is multiplied by the number of targets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rig.process import Run, measure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MODULES = {
    "q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn", "gate_proj": "mlp",
    "up_proj": "mlp", "down_proj": "mlp",
}  # fmt: skip

GOALS = {
    "linear": 30, "tsv": 30, "iso_c": 30, "core_ties": 30, "knots_ties": 30, "ctm": 45, "ties": 600, "dare_ties": 600,
    "della": 600, "breadcrumbs": 600, "sce": 600,
}  # fmt: skip
"""Time limits by method for 8 adapters with 224 targets of 4096 x 4096, in seconds."""

RANKED = ("linear", "ties", "dare_ties", "della", "breadcrumbs", "sce")
"""Methods whose result this script cuts to the rank."""


def main() -> None:
    """Write the adapters, run the methods, and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", type=int, default=224)
    parser.add_argument("--only", nargs="+", default=list(GOALS), metavar="METHOD")
    parser.add_argument("--busy", action="store_true", help="repeat each run with a busy process on each processor")
    parser.add_argument("--peers", action="store_true", help="also time PEFT and mergekit")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "adapterkit-scale")
    chosen = parser.parse_args()
    folders = [written(chosen, task) for task in range(chosen.tasks)]
    print(f"{chosen.tasks} adapters of rank {chosen.rank}, {chosen.targets} targets of {chosen.size} x {chosen.size}")
    print(f"{'method':<16}{'seconds':>9}{'goal':>6}{'wall':>7}{'MB':>6}{'(all)':>8}{'busy':>9}{'times':>7}", flush=True)
    for method in chosen.only:
        run = combined(method, folders, chosen)
        line = f"{method:<16}{run.cpu:>9.1f}{GOALS.get(method, 0):>6}{run.seconds:>7.0f}"
        line += f"{run.anonymous / 1e6:>6.0f}{f'({run.peak / 1e6:.0f})':>8}"
        if chosen.busy:
            with busy():
                beside = combined(method, folders, chosen)
            line += f"{beside.cpu:>9.1f}{beside.cpu / run.cpu:>7.2f}"
        print(line, flush=True)
    if chosen.peers:
        told(chosen)


def written(chosen: Any, task: int) -> Path:
    """Write the folder of one adapter, whose factors have a third in common with the others."""
    from safetensors.numpy import save_file

    folder = Path(chosen.work) / f"{chosen.targets}x{chosen.size}-r{chosen.rank}-{task}"
    if (folder / "adapter_config.json").is_file():
        return folder
    tensors = {}
    for at in range(chosen.targets):
        layer, place = divmod(at, len(MODULES))
        name = list(MODULES)[place]
        path = f"base_model.model.model.layers.{layer}.{MODULES[name]}.{name}"
        shared, own = np.random.default_rng([at]), np.random.default_rng([at, task + 1])
        for factor, shape in {"A": (chosen.rank, chosen.size), "B": (chosen.size, chosen.rank)}.items():
            values = 0.5 * shared.standard_normal(shape) + own.standard_normal(shape)
            tensors[f"{path}.lora_{factor}.weight"] = values.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": chosen.rank, "lora_alpha": chosen.rank, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def combined(method: str, folders: list[Path], chosen: Any) -> Run:
    """Run the command once."""
    cut = ["--rank", str(chosen.rank)] if method in RANKED else []
    out = Path(chosen.work) / "out"
    command = [sys.executable, "-m", "adapterkit", "combine", *map(str, folders), "--method", method, *cut]
    return measure(
        [*command, "-o", str(out), "--overwrite", "-q"], Path(chosen.work) / method, {"PYTHONPATH": str(ROOT)}
    )


@contextmanager
def busy() -> Iterator[None]:
    """Keep every processor busy within the block."""
    several = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in several:
            process.kill()
            process.wait()


def told(chosen: Any) -> None:
    """Print the other tools' times for one target, times the number of targets."""
    import combine as one_target

    adapters = one_target.made(chosen.size, chosen.tasks, chosen.rank, 1)
    for name, contender in one_target.peers(adapters).items():
        if name in ("PEFT ties_svd", "mergekit ties"):
            started = time.process_time()
            contender()
            seconds = (time.process_time() - started) * chosen.targets
            print(f"{name:<16}{seconds:>9.0f}      (one target, times {chosen.targets})", flush=True)


if __name__ == "__main__":
    main()

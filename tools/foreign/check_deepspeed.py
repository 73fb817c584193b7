"""Trains adapters with DeepSpeed's ZeRO in two processes, and compares the losses with a single process.

    DS_BUILD_OPS=0 pip install deepspeed && python tools/foreign/check_deepspeed.py [--stage 3]... [--method lora]...

It runs on the CPU, over gloo; the single process has the joined batch. For stage 3, which partitions every parameter,
it also checks that the handle reads whole tensors, and that operations on the base's weights are refused. It prints one
line per run, and exits with 1 if a loss differs by more than 1e-5 relatively, or if a check fails.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared")]

import training_runs as runs  # noqa: E402 - shared with the tests

import adapterkit as ak  # noqa: E402
from adapterkit.errors import NotMergeable, Unsupported  # noqa: E402

STEPS = 20
LIMIT = 1e-5
METHODS = ("lora", "dora", "vera", "ia3", "oft")


def attached(method: str) -> tuple[Any, Any]:
    """A model with a fresh adapter."""
    model = runs.llama()
    more = {"rank": 4} | ({"alpha": 8} if method in ("lora", "dora") else {})
    made = ak.torch.create(model, method, targets=["q_proj", "v_proj", "up_proj"], **more)
    return model, ak.torch.inject(model, made, trainable=True)


def optimizer_of(model: Any) -> Any:
    """Of what is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=runs.LR, weight_decay=0.0)


def alone(method: str) -> list[float]:
    """The losses of one process."""
    model, _ = attached(method)
    optimizer, losses = optimizer_of(model), []
    for _ in range(STEPS):
        loss = model(input_ids=runs.IDS, labels=runs.IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank: int, file: str, stage: int, method: str) -> None:
    """One of two processes."""
    warnings.simplefilter("ignore")
    os.environ.update(
        DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29655"),
    )  # fmt: skip
    torch.set_num_threads(1)
    import deepspeed

    # It compiles an extension for shared memory, for minutes, and waits for ever where such a build was killed. gloo
    # does without.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model, handle = attached(method)
    settings = {
        "train_micro_batch_size_per_gpu": len(runs.IDS) // 2,
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)
    some, losses = runs.IDS[rank * 4 : rank * 4 + 4], []
    for _ in range(STEPS):
        loss = engine(input_ids=some, labels=some).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / 2)
    wanted = alone(method)
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    assert losses[-1] < losses[0], "it does not learn"
    state = {name: value.clone() for name, value in handle.state_dict().items()}
    assert all(value.numel() for value in state.values())
    adapter = handle.adapter()
    adapter.validate()
    if stage == 3:
        handle.load_state_dict({name: value * 2 for name, value in state.items()})
        again = handle.state_dict()
        assert all(torch.equal(again[name], value * 2) for name, value in state.items())
        for refused, run in ((NotMergeable, handle.merge_), (Unsupported, lambda: attach_late(model))):
            try:
                run()
            except refused:
                continue
            raise AssertionError(f"{refused.__name__} was not raised")
    if rank == 0:
        print(f"stage {stage}, {method}: losses apart by {apart:.1e}", flush=True)
    dist.barrier()
    assert apart <= LIMIT, apart


def attach_late(model: Any) -> None:
    """Make an adapter for weights that are partitioned."""
    ak.torch.create(model, "lora", targets=["q_proj"], rank=2)


def main() -> int:
    """Run what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, action="append")
    parser.add_argument("--method", action="append")
    given = parser.parse_args()
    import tempfile

    failed = 0
    for stage in given.stage or (1, 2, 3):
        for method in given.method or METHODS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    torch.multiprocessing.spawn(work, (f"{folder}/meet", stage, method), nprocs=2)
                except Exception as error:
                    failed += 1
                    print(f"stage {stage}, {method}: {str(error).strip()[-600:]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

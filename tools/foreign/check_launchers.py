"""Trains adapters in two processes over gloo: transformers' Trainer, Accelerate and FSDP2, by two launchers.

    python tools/foreign/check_launchers.py [--method lora]... [--loop trainer]... [--launcher torchrun]...

The two processes split the batch of a single process, so the losses must be the same. A run that is stopped after half
of its steps and resumed by two processes must end with the same bits as an uninterrupted run. The script prints a line
for each method, loop and launcher, and exits with 1 if a loss differs by more than 1e-5 relatively, or if a bit
differs.

`accelerate launch --cpu --num_processes 2` starts only one process, independent of its config (accelerate 1.15):
without a GPU, MPI or TPU, it runs the script directly. With `--multi_gpu` it uses torchrun, and `Accelerator(cpu=True)`
in the script then finds two processes over gloo.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared")]

import training_runs as runs  # noqa: E402 - shared with the tests

import adapterkit as ak  # noqa: E402

STEPS = 20
LIMIT = 1e-5
METHODS = ("lora", "dora", "vera", "prefix", "bottleneck")
Result = dict[str, Any]


def attached(method: str) -> tuple[Any, Any]:
    """A model with a fresh adapter."""
    model = runs.llama()
    targets: Any = {"bottleneck": ["mlp", "self_attn"]}.get(method, ["q_proj", "v_proj", "up_proj"])
    more: dict[str, Any] = {} if method == "prefix" else {"targets": targets}
    return model, ak.torch.inject(model, ak.torch.create(model, method, rank=4, **more), trainable=True)


def by_trainer(method: str, folder: Path, steps: int, resume: bool) -> Result:
    """The losses of all steps so far, and the handle's state."""
    import transformers

    world = int(os.environ.get("WORLD_SIZE", "1"))
    model, handle = attached(method)
    settings = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=8 // world, learning_rate=runs.LR, logging_steps=1,
        lr_scheduler_type="constant", save_steps=STEPS // 2, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    callbacks: Any = [ak.torch.TrainerCallback(handle)]
    trainer = transformers.Trainer(model, settings, train_dataset=runs.DATA, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    return {"losses": losses, "state": handle.state_dict()}


def by_accelerate(method: str, folder: Path, steps: int, resume: bool) -> Result:
    """The same in a loop of one's own, with accumulation over two batches and clipping."""
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    world = accelerator.num_processes
    model, handle = attached(method)
    handle.checkpoint = "adapter"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=runs.LR)
    loader: Any = torch.utils.data.DataLoader(runs.DATA, batch_size=4 // world)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    done, losses = 0, []
    if resume:
        accelerator.load_state(str(folder / "state"))
        held = torch.load(folder / "losses.pt", weights_only=True)
        losses, done = held, len(held)
    for _ in range(done, steps):
        mean = 0.0
        for batch in loader:
            with accelerator.accumulate(wrapped):
                loss = wrapped(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            mean += float(accelerator.reduce(loss.detach().clone(), "mean")) / len(loader)
        losses.append(mean)
    accelerator.save_state(str(folder / "state"))
    if accelerator.is_main_process:
        torch.save(losses, folder / "losses.pt")
    accelerator.wait_for_everyone()
    return {"losses": losses, "state": handle.state_dict()}


def by_fsdp2(method: str, folder: Path, steps: int, resume: bool) -> Result:
    """A plain loop over sharded blocks; torch.distributed.checkpoint saves the adapter and the optimizer."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, handle = attached(method)
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=runs.LR)
    done, losses = 0, []
    if resume:
        state: Any = {"adapter": handle.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / "state")
        handle.load_state_dict(state["adapter"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        losses = torch.load(folder / "losses.pt", weights_only=True)
        done = len(losses)
    some = runs.IDS.chunk(world)[rank]
    for _ in range(done, steps):
        loss = model(input_ids=some, labels=some).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    state = {"adapter": handle.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder / "state")
    if rank == 0:
        torch.save(losses, folder / "losses.pt")
    adapter = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in handle.state_dict().items()}
    dist.barrier()
    return {"losses": losses, "state": adapter}


LOOPS = {"trainer": by_trainer, "accelerate": by_accelerate, "fsdp2": by_fsdp2}
LAUNCHERS: dict[str, Any] = {
    "torchrun": lambda count: ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"],
    "accelerate": lambda count: [
        "accelerate.commands.launch", "--multi_gpu", f"--num_processes={count}", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
    ],
}  # fmt: skip
"""Name -> the module to run and its words, for a number of processes."""


def launched(
    launcher: str, loop: str, method: str, folder: Path, processes: int, steps: int, resume: bool = False
) -> Result:
    """Run a loop under a launcher, and return what the first process found."""
    out = folder / "out.pt"
    if processes == 1:  # accelerate's starts no group of one, which our loops of one process do not need.
        launcher = "torchrun"
    words = [sys.executable, "-m", *LAUNCHERS[launcher](processes)]
    words += [__file__, "--worker", loop, method, str(folder), str(steps), str(int(resume))]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: Result = torch.load(out, weights_only=True)
    assert found["world"] == processes, f"{launcher} started {found['world']} processes"
    return found


def main() -> int:
    """Run what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append")
    parser.add_argument("--loop", action="append", choices=list(LOOPS))
    parser.add_argument("--launcher", action="append", choices=list(LAUNCHERS))
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.worker:
        loop, method, place, steps, resume = given.worker
        found = LOOPS[loop](method, Path(place), int(steps), resume == "1")
        found["world"] = int(os.environ["WORLD_SIZE"])
        if os.environ["RANK"] == "0":
            torch.save({**found, "state": {k: v.clone() for k, v in found["state"].items()}}, Path(place) / "out.pt")
        return 0
    failed = 0
    for method in given.method or METHODS:
        for loop in given.loop or LOOPS:
            with tempfile.TemporaryDirectory() as folder:
                alone = launched("torchrun", loop, method, made(folder, "one"), 1, STEPS)
                for launcher in given.launcher or LAUNCHERS:
                    two, part = made(folder, f"{launcher}.two"), made(folder, f"{launcher}.part")
                    both = launched(launcher, loop, method, two, 2, STEPS)
                    launched(launcher, loop, method, part, 2, STEPS // 2)
                    again = launched(launcher, loop, method, part, 2, STEPS, resume=True)
                    failed += told(f"{method}, {loop}, {launcher}", alone, both, again)
    return int(failed > 0)


def made(folder: str, name: str) -> Path:
    """A folder that is there."""
    path = Path(folder) / name
    path.mkdir()
    return path


def told(label: str, alone: Result, both: Result, again: Result) -> bool:
    """Print how far two processes are from one, and a resumed run from an unbroken one; whether that is too far."""
    pairs = list(zip(both["losses"], alone["losses"], strict=True))
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    equal = all(torch.equal(both["state"][name], value) for name, value in again["state"].items())
    equal = equal and both["losses"] == again["losses"] and both["losses"][-1] < both["losses"][0]
    print(f"{label}: two processes apart from one by {apart:.1e}; resumed bit-equal: {equal}", flush=True)
    return apart > LIMIT or not equal


if __name__ == "__main__":
    sys.exit(main())

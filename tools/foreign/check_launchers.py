"""Trains adapters with transformers' Trainer and with Accelerate under torchrun, in one process and in two over gloo.

    python tools/foreign/check_launchers.py [--method lora]...

The two processes see the one's batch together, so that their losses must be the same; a run that was stopped after half
of its steps and resumed by two processes must end with the same bits as an unbroken one. Prints a line for each method
and loop; exits 1 when a loss is apart by more than 1e-5, relatively, or a bit differs.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

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


LOOPS = {"trainer": by_trainer, "accelerate": by_accelerate}


def launched(loop: str, method: str, folder: Path, processes: int, steps: int, resume: bool = False) -> Result:
    """Run a loop under torchrun, and return what the first process found."""
    out = folder / "out.pt"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += [__file__, "--worker", loop, method, str(folder), str(steps), str(int(resume))]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: Result = torch.load(out, weights_only=True)
    return found


def main() -> int:
    """Run what was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.worker:
        loop, method, place, steps, resume = given.worker
        found = LOOPS[loop](method, Path(place), int(steps), resume == "1")
        if os.environ["RANK"] == "0":
            torch.save({**found, "state": {k: v.clone() for k, v in found["state"].items()}}, Path(place) / "out.pt")
        return 0
    failed = 0
    for method in given.method or METHODS:
        for loop in LOOPS:
            with tempfile.TemporaryDirectory() as folder:
                one, two, part = (Path(folder) / name for name in ("one", "two", "part"))
                for each in (one, two, part):
                    each.mkdir()
                alone = launched(loop, method, one, 1, STEPS)
                both = launched(loop, method, two, 2, STEPS)
                launched(loop, method, part, 2, STEPS // 2)
                again = launched(loop, method, part, 2, STEPS, resume=True)
            pairs = list(zip(both["losses"], alone["losses"], strict=True))
            apart = max(abs(a - b) / abs(b) for a, b in pairs)
            equal = all(torch.equal(both["state"][name], value) for name, value in again["state"].items())
            equal = equal and both["losses"] == again["losses"] and both["losses"][-1] < both["losses"][0]
            failed += apart > LIMIT or not equal
            print(
                f"{method}, {loop}: two processes apart from one by {apart:.1e}; resumed bit-equal: {equal}", flush=True
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

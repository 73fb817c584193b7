"""Trains twelve methods with four loops, compares every loss with a plain loop and PEFT, and resumes each run.

    pip install lightning && python tools/foreign/check_training.py [--steps 20] [--method lora]... [--quiet]

The script prints the largest relative difference of a loss from PEFT's in the same loop, or from the plain loop if PEFT
does not have the method. Then it prints whether a run that was saved after half of its steps and resumed in a new model
ends with the same bits as an uninterrupted run. It exits with 1 if a difference is above 1e-5, if bits differ, or if an
adapter or a base is wrong at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared")]

import training_runs as runs  # noqa: E402 - shared with the tests

import adapterkit as ak  # noqa: E402 - this checkout's own

LIMIT = 1e-5
Run = Callable[[Any, Any, int, int, Path], None]
"""(model, handle, first step, last step, folder): trains, saves after the last step, and loads before a later first."""


def apart(one: list[float], other: list[float]) -> float:
    """The largest relative difference."""
    assert len(one) == len(other)
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def differences(method: str, steps: int, folder: Path) -> dict[str, float]:
    """The differences of one method, by loop."""
    found: dict[str, float] = {}
    ours: dict[str, list[float]] = {}
    for name, loop in runs.LOOPS.items():
        model, handle = runs.attached(method, folder)
        base = {key: value.clone() for key, value in model.state_dict().items()}
        ours[name] = loop(model, steps, folder)
        assert ours[name][-1] < ours[name][0], f"{method} does not learn"
        handle.remove()
        assert all(value.equal(base[key]) for key, value in model.state_dict().items())
        if runs.METHODS[method] is None:
            found[name] = apart(ours[name], ours["plain"])
        else:
            found[name] = apart(ours[name], loop(runs.peft_model(method), steps, folder))
    found["between loops"] = max(apart(losses, ours["plain"]) for losses in ours.values())
    return found


def batch(step: int) -> torch.Tensor:
    """Another part of the data for each step, so that a run that resumes at a wrong step differs."""
    return runs.IDS[step % 4 * 2 : step % 4 * 2 + 2]


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """An optimizer with a state of its own for each tensor."""
    return torch.optim.AdamW(runs.trained(model), lr=runs.LR)


def plain(model: Any, handle: Any, first: int, last: int, folder: Path) -> None:
    """The model's state dict and the optimizer's by torch.save."""
    handle.checkpoint = "adapter"
    optimizer = optimizer_of(model.train())
    if first:
        state = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for step in range(first, last):
        optimizer.zero_grad()
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state.pt")


def trainer(model: Any, handle: Any, first: int, last: int, folder: Path) -> None:
    """transformers' Trainer with our callback, two accumulated batches a step, clipping and a scheduler."""
    import transformers

    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=last, seed=3, report_to=[],
        learning_rate=runs.LR, lr_scheduler_type="constant", logging_steps=1, save_steps=last, use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    callbacks: list[Any] = [ak.torch.TrainerCallback(handle)]
    made = transformers.Trainer(model, settings, train_dataset=runs.DATA, callbacks=callbacks)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{first}") if first else None)


def accelerate(model: Any, handle: Any, first: int, last: int, folder: Path) -> None:
    """Accelerate's save_state and load_state."""
    from accelerate import Accelerator

    handle.checkpoint = "adapter"
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model.train(), optimizer_of(model))
    if first:
        accelerator.load_state(str(folder / "state"))
    for step in range(first, last):
        optimizer.zero_grad()
        accelerator.backward(model(input_ids=batch(step), labels=batch(step)).loss)
        optimizer.step()
    accelerator.save_state(str(folder / "state"))


def lightning(model: Any, handle: Any, first: int, last: int, folder: Path) -> None:
    """Lightning's checkpoints of its own."""
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model.train()

        def training_step(self, *_: Any) -> Any:
            # Lightning starts an epoch that was broken off with its first batch again (2.6).
            ids = batch(self.global_step)
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    handle.checkpoint = "adapter"
    made = Trainer(
        max_steps=last, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    data: Any = torch.utils.data.DataLoader(runs.DATA, batch_size=2)
    made.fit(Module(), data, ckpt_path=str(folder / "lightning.ckpt") if first else None)
    made.save_checkpoint(folder / "lightning.ckpt")


RESUMED: dict[str, Run] = {"plain": plain, "trainer": trainer, "accelerate": accelerate, "lightning": lightning}


def resumes(method: str, steps: int, folder: Path) -> list[str]:
    """The loops whose resumed run does not end with the bits of the unbroken one."""
    wrong = []
    for name, run in RESUMED.items():
        with tempfile.TemporaryDirectory(dir=folder) as whole, tempfile.TemporaryDirectory(dir=folder) as part:
            model, unbroken = runs.attached(method, folder)
            run(model, unbroken, 0, steps, Path(whole))
            model, half = runs.attached(method, folder)
            run(model, half, 0, steps // 2, Path(part))
            model, resumed = runs.attached(method, folder)
            fresh = resumed.adapter().digest()
            with torch.no_grad():  # What is not in the checkpoint shows.
                for parameter in resumed.parameters():
                    parameter.add_(1)
            run(model, resumed, steps // 2, steps, Path(part))
        bits = unbroken.adapter().digest()
        if not resumed.adapter().digest() == bits != half.adapter().digest() != fresh:
            wrong.append(name)
    return wrong


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--method", action="append", choices=list(runs.METHODS))
    parser.add_argument("--quiet", action="store_true", help="hide the output of the frameworks")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = [*runs.LOOPS, "between loops"]
    print("| method | " + " | ".join(columns) + " | resumed |")
    print("|---" * (len(columns) + 2) + "|")
    worst, failed = 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        for method in given.method or runs.METHODS:
            nowhere = io.StringIO()
            with contextlib.redirect_stdout(nowhere) if given.quiet else contextlib.nullcontext():
                found = differences(method, given.steps, Path(folder))
                wrong = resumes(method, given.steps, Path(folder))
            worst, failed = max(worst, *found.values()), failed or bool(wrong)
            name = method if runs.METHODS[method] else f"{method} (not in PEFT)"
            cells = [f"{found[column]:.1e}" for column in columns] + [f"DIFFERS: {wrong}" if wrong else "bit-equal"]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print(f"largest: {worst:.1e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT or failed)


if __name__ == "__main__":
    sys.exit(main())

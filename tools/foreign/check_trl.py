"""Trains a tiny model with TRL's SFTTrainer and GRPOTrainer: an adapter by adapterkit and the same one by PEFT.

    pip install trl datasets && python tools/foreign/check_trl.py [--steps 10]

The script prints the largest relative difference of a loss. It exits with 1 if a difference is above 1e-5, or if a run
from a checkpoint of `TrainerCallback` does not end with the same bits as an uninterrupted run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "shared")]

import training_runs as runs  # noqa: E402 - shared with the tests

import adapterkit as ak  # noqa: E402 - this checkout's own

LIMIT = 1e-5


def tokenizer() -> Any:
    """One token a word, w0 to w28."""
    words = {f"w{i}": i for i in range(29)} | {"<pad>": 29, "<eos>": 30, "<unk>": 31}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """More for more different words."""
    return [float(len(set(text.split()))) for text in completions]


def sft(model: Any, steps: int, folder: Path, callbacks: list[Any], resume: str | None = None) -> list[float]:
    """Losses of supervised fine-tuning."""
    data = datasets.Dataset.from_dict({"text": [" ".join(f"w{n}" for n in row) for row in runs.IDS.tolist()]})
    settings = SFTConfig(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=steps, learning_rate=0.01,
        report_to=[], logging_steps=1, save_steps=steps // 2, use_cpu=True, disable_tqdm=True, seed=4, bf16=False,
        max_length=16, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def grpo(model: Any, steps: int, folder: Path, callbacks: list[Any]) -> list[float]:
    """Losses and rewards of policy optimisation: the completions are drawn from the model itself."""
    data = datasets.Dataset.from_dict({"prompt": [" ".join(f"w{n}" for n in row[:3]) for row in runs.IDS.tolist()]})
    settings = GRPOConfig(
        str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=steps,
        learning_rate=0.01, report_to=[], logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, seed=4,
        bf16=False, gradient_checkpointing=False, loss_type="grpo",
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=settings, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks
    )
    trainer.train()
    told = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return [entry[name] for entry in told for name in ("grad_norm", "reward")]


def main() -> int:
    """Print the differences; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    worst, same = 0.0, True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method in ("lora", "dora", "ia3"):
            for loop in (sft, grpo):
                model, handle = runs.attached(method, folder)
                reference = runs.peft_model(method)
                torch.manual_seed(0)
                ours = loop(
                    model, given.steps, folder / f"{method}.{loop.__name__}", [ak.torch.TrainerCallback(handle)]
                )
                torch.manual_seed(0)
                theirs = loop(reference, given.steps, folder / f"{method}.{loop.__name__}.peft", [])
                apart = max(abs(a - b) / max(abs(b), 1e-6) for a, b in zip(ours, theirs, strict=True))
                worst = max(worst, apart)
                print(
                    f"{method:6} {loop.__name__:5} {len(ours)} numbers, last {ours[-1]:.6f}, apart {apart:.1e}",
                    flush=True,
                )
            half = folder / f"{method}.sft" / f"checkpoint-{given.steps // 2}"
            again, resumed = runs.attached(method, folder)
            torch.manual_seed(9)
            sft(again, given.steps, folder / f"{method}.resumed", [ak.torch.TrainerCallback(resumed)], str(half))
            last = folder / f"{method}.sft" / f"checkpoint-{given.steps}" / "adapter"
            equal = ak.read(last).digest() == resumed.adapter().digest()
            same &= equal
            print(f"{method:6} resumed {'equals' if equal else 'DIFFERS FROM'} the unbroken run", flush=True)
    print(f"largest: {worst:.1e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT or not same)


if __name__ == "__main__":
    sys.exit(main())

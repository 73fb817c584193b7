"""Measures the claims of parameter-efficient fine-tuning side by side on a real task in one run.

Takes a quarter of an hour on one core.

    python tools/bench/claims.py [--task NAME] [--seeds 3] [--epochs 10] [--jobs 2] [--only NAME]

A small transformer of Llama's architecture (1.3 M parameters) learns to read scikit-learn's handwritten digits: 8x8
pixels as 16 tokens. Then the task changes, and the model is adapted to the new task: by full fine-tuning, or by each
method with the base and its head frozen. The tasks are those of the demo. In `relabelled`, the images stay the same and
the answer is the next digit. In the tasks with rotated and negative images, the model must learn new inputs.

The images are in three parts: 1000 for training, 257 for choices, 540 held out. For each contender, the learning rate
is chosen from `RATES`: the best one on the 257 images after one run of `TRIAL` epochs, with a seed that is not used
again. The target modules of LoRA are chosen from `PLACES` in the same way; DoRA, NOLA and QLoRA adapt the same modules
as LoRA. Accuracies are measured on the 540 images, which are not used for any choice. Recovered is (accuracy - before)
/ (accuracy of full - before). Each seed draws different initial values, orders and shifts of the images; the tables
have medians.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import adapterkit as ak
from adapterkit.demo.model import TASKS, accuracy

WIDTH, HIDDEN, LAYERS, HEADS = 256, 512, 2, 4
PATCH, TOKENS = 2, 16
TRAINED, CHOOSING, BATCH, PRETRAINING = 1000, 257, 64, 30
RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
"""Adam's highest learning rates; one of them is chosen for each contender."""
PLACES = ({"targets": ["q_proj", "v_proj"], "rank": 5}, {"targets": ["o_proj", "down_proj"], "rank": 4}, {"rank": 1})
"""Target modules for LoRA, with about the same number of parameters: 0.78 %, 0.78 % and, for all linear layers, 0.66
%."""
CHOOSER, TRIAL = 1000, 4
"""Seed and epochs of the runs for choices."""
NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
    0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
"""The 16 levels of 4-bit NormalFloat, https://arxiv.org/abs/2305.14314."""
BLOCK = 64
"""Weights that share a scale of 32 bits."""


@dataclass(slots=True)
class Contender:
    """A contender: a way to adapt the model.

    Attributes:
        name: the name in the table.
        method: the method, or None for full fine-tuning.
        places: options for `ak.torch.create` to choose from.
        four_bits: the frozen base is rounded to 4 bits first.
        options: the chosen options.
        rate: the chosen learning rate.
        runs: one result for each seed.
    """

    name: str
    method: str | None
    places: tuple[dict[str, Any], ...] = ({},)
    four_bits: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    rate: float = RATES[0]
    runs: list[Result] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    """The accuracies before and after training, the number of trained parameters, bytes and seconds."""

    before: float
    after: float
    trained: int
    training: int
    weights: int
    stored: int
    seconds: float


def contenders() -> list[Contender]:
    """Return full fine-tuning, then methods with about as many parameters as LoRA, if they can have that many."""
    places = tuple({"targets": "all-linear", **place, "alpha": 2 * place["rank"]} for place in PLACES)
    return [
        Contender("full fine-tuning", None),
        Contender("LoRA", "lora", places),
        Contender("QLoRA", "lora", four_bits=True),
        Contender("DoRA", "dora"),
        Contender("bottleneck", "bottleneck", ({"targets": ["o_proj", "down_proj"], "rank": 4},)),
        Contender("IA3", "ia3", ({"targets": ["k_proj", "v_proj", "up_proj"]},)),
        Contender("NOLA", "nola"),
        Contender("prompt tuning", "prompt", ({"rank": 16},)),
        Contender("prefix tuning", "prefix", ({"rank": 8},)),
    ]


class Reader(nn.Module):
    """Images uint8 `[n, 8, 8]` to logits float32 `[n, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": HEADS, "max_position_embeddings": 64}
        self.embed, self.head = nn.Linear(PATCH**2, WIDTH), nn.Linear(WIDTH, 10)
        self.position = nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.body = LlamaModel(LlamaConfig(vocab_size=16, **sizes, **heads))
        # Images do not use the embedding; prompts start with some of its rows.
        self.body.embed_tokens.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.body(inputs_embeds=self.embed(patches(images)) + self.position).last_hidden_state
        logits: Tensor = self.head(seen[:, -TOKENS:].mean(1))
        return logits


def patches(images: Tensor) -> Tensor:
    """Images uint8 `[n, 8, 8]` as float32 `[n, 16, 4]` between -1 (paper) and 1 (ink)."""
    pixels = images.float() / 8 - 1
    return pixels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)


@dataclass(frozen=True, slots=True)
class Digits:
    """Return images, uint8 `[n, 8, 8]`, and labels, `[n]`: for training, for choices, held out."""

    images: Tensor
    labels: Tensor
    choosing_images: Tensor
    choosing_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Return scikit-learn's digits in file order; the held-out images are from writers of no other images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = torch.tensor(data.images).to(torch.uint8), torch.tensor(data.target).long()
    parts = zip(
        *(each.split([TRAINED, CHOOSING, len(each) - TRAINED - CHOOSING]) for each in (images, labels)), strict=True
    )
    return Digits(*(each for part in parts for each in part))


def changed(data: Digits, task: str) -> Digits:
    """Return the images and labels of a task."""
    change = TASKS[task]
    return Digits(
        *change(data.images, data.labels), *change(data.choosing_images, data.choosing_labels),
        *change(data.test_images, data.test_labels),
    )  # fmt: skip


def fit(model: nn.Module, parameters: list[Tensor], images: Tensor, labels: Tensor, epochs: int, rate: float) -> Any:
    """Train with Adam, a one-cycle rate and shifted images; return the optimizer, which has the last gradients."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs * -(-len(images) // BATCH))
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = functional.cross_entropy(model(shifted(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
    return optimizer


def shifted(images: Tensor) -> Tensor:
    """Shift each image by at most one pixel."""
    n = len(images)
    start = torch.randint(0, 3, (n, 2))
    rows, columns = (start[:, axis, None] + torch.arange(8) for axis in (0, 1))
    padded = functional.pad(images, (1, 1, 1, 1))
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def pretrained(data: Digits) -> Reader:
    """Train the base, which reads the digits unchanged."""
    torch.manual_seed(0)
    model = Reader()
    fit(model, [p for p in model.parameters() if p.requires_grad], data.images, data.labels, PRETRAINING, 1e-3)
    return model


def choose(contender: Contender, base: Reader, data: Digits) -> None:
    """Return the best options and learning rate on the images for choices, without the held-out images."""
    blind = replace(data, test_images=data.choosing_images, test_labels=data.choosing_labels)
    scores = []
    for place, rate in itertools.product(contender.places, RATES):
        tried = replace(contender, options=place, rate=rate)
        scores.append((run(tried, base, blind, TRIAL, CHOOSER).after, place, rate))
        say(f"{contender.name}, {place}, rate {rate}: {scores[-1][0]:.1%} of the images for choices")
    _, contender.options, contender.rate = max(scores, key=lambda each: each[0])


def run(contender: Contender, base: Reader, data: Digits, epochs: int, seed: int) -> Result:
    """Adapt a copy of the base to the data of another task."""
    torch.manual_seed(seed)
    model, started = copy.deepcopy(base), time.perf_counter()
    if contender.four_bits:
        rounded_to_four_bits(model.body)
    with adapted(contender, model, seed) as (parameters, file_of):
        before = accuracy(model, data.test_images, data.test_labels)
        optimizer = fit(model, parameters, data.images, data.labels, epochs, contender.rate)
        after = accuracy(model, data.test_images, data.test_labels)
        kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
        training = nbytes(p.grad for p in parameters) + nbytes(kept)
        return Result(
            before, after, sum(p.numel() for p in parameters), training, weights_of(model, contender), file_of(),
            time.perf_counter() - started,
        )  # fmt: skip


@contextlib.contextmanager
def adapted(contender: Contender, model: Reader, seed: int) -> Iterator[tuple[list[Any], Any]]:
    """Return the trained parameters, and a function that returns the size of the file to keep."""
    if contender.method is None:
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        yield parameters, lambda: nbytes(parameters)
        return
    model.requires_grad_(False)
    fresh = ak.torch.create(model.body, contender.method, seed=seed, **contender.options)
    handle = ak.torch.inject(model.body, fresh, trainable=True)
    yield list(handle.parameters()), lambda: file_size(handle.adapter())
    handle.remove()


def file_size(adapter: Any) -> int:
    """Return the size of the adapter's native file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        ak.write(adapter, path)
        return path.stat().st_size


def weights_of(model: Reader, contender: Contender) -> int:
    """Return the bytes of the base during training; for a 4-bit base, the size of a packed file."""
    plain = nbytes(model.parameters())
    if not contender.four_bits:
        return plain
    packed = sum(m.weight.numel() for m in model.body.modules() if isinstance(m, nn.Linear))
    return plain - 4 * packed + packed // 2 + 4 * (packed // BLOCK)


@torch.no_grad()
def rounded_to_four_bits(model: nn.Module) -> None:
    """Round all linear weights to NF4 in blocks with one scale each, like the base of a QLoRA."""
    levels = torch.tensor(NF4)
    middles = (levels[1:] + levels[:-1]) / 2
    for module in model.modules():
        if isinstance(module, nn.Linear):
            blocks = module.weight.reshape(-1, BLOCK)
            scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
            module.weight.copy_((levels[torch.bucketize(blocks / scale, middles)] * scale).reshape(module.weight.shape))


def nbytes(tensors: Iterable[Any]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def show(task: str, seen: list[Contender], total: int, plain: float) -> None:
    """Print the table: medians over the seeds, and the lowest and highest recovered quality."""
    full = {c.name: c for c in seen}["full fine-tuning"].runs
    print(f"\n{task}: {total:,} parameters; {plain:.1%} right before the task changes, {full[0].before:.1%} after that")
    head = ("", "trained", "grads + Adam", "and weights", "to keep", "right", "recovered", "rate", "seconds")
    print("{:<17}{:>9}{:>14}{:>13}{:>10}{:>8}  {:<24}{:>7}{:>8}".format(*head))
    for c in seen:
        one = c.runs[0]
        most = full[0].training
        recovered = [
            (mine.after - whole.before) / (whole.after - whole.before) for mine, whole in zip(c.runs, full, strict=True)
        ]
        print(
            f"{c.name:<17}{one.trained / total:>9.2%}{size(one.training):>14}{size(one.training + one.weights):>13}"
            f"{size(one.stored):>10}{statistics.median(r.after for r in c.runs):>8.1%}  "
            f"{f'{statistics.median(recovered):.0%} ({min(recovered):.0%} to {max(recovered):.0%})':<24}{c.rate:>7}"
            f"{statistics.median(r.seconds for r in c.runs):>8.0f}   {most / one.training:.0f}x less to train"
        )
    chosen = {c.name: c for c in seen}["LoRA"].options
    print(f"LoRA's choices, made on separate images: {chosen}")
    print("QLoRA's base is rounded to NF4 and back, in float32; its bytes are those that NF4 would take.")


def size(count: int) -> str:
    """Return bytes in kB or MB."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--task", choices=TASKS, default="relabelled", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of adapting; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=2, help="contenders at a time; default: %(default)s")
    parser.add_argument("--only", action="append", choices=[c.name for c in contenders()], help="may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    base = pretrained(data)
    plain = accuracy(base, data.test_images, data.test_labels)
    total = sum(p.numel() for p in base.parameters() if p.requires_grad)
    show(options.task, measured(base, changed(data, options.task), options), total, plain)
    return 0


def measured(base: Reader, data: Digits, options: argparse.Namespace) -> list[Contender]:
    """Return all contenders with their choices and runs; several run at a time, each on one thread."""
    known = [c for c in contenders() if c.name in ("full fine-tuning", "LoRA", *(options.only or [c.name]))]
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        task = functools.partial(measure, base=base, data=data, options=options)
        full, lora = pool.map(task, known[:2], chunksize=1)
        for contender in known:
            if contender.name in ("QLoRA", "DoRA", "NOLA"):
                contender.places = (lora.options,)
        return [full, lora, *pool.map(task, known[2:], chunksize=1)]


def measure(contender: Contender, base: Reader, data: Digits, options: argparse.Namespace) -> Contender:
    """Return a contender with its choices and runs."""
    choose(contender, base, data)
    for seed in range(options.seeds):
        contender.runs.append(run(contender, base, data, options.epochs, seed))
        say(f"{contender.name}, rate {contender.rate}, seed {seed}: {contender.runs[-1].after:.1%}")
    return contender


def say(line: str) -> None:
    """Print progress to standard error."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Compares live adapters with PEFT's in one run: a batch of many adapters, one adapter's forward and step, peak memory.

    python tools/bench live [--hidden 256] [--layers 2] [--tokens 128] [--rounds 15] [--threads 1] [--only NAME]

The model is a randomly initialised Llama with LoRA (or DoRA) of rank 8 on all linear layers. The contenders run in turn
in each round, in alternating order. Figures are medians and minima of the processor time of all threads. Peak memory is
what torch allocates on the CPU during one training step, in addition to the model and the optimizer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rig.figures import Figures, arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MIXED = ((50, 64), (8, 16))
"""Adapters, and rows of one token."""

FIGURES = Figures("live")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments(parser, 15)
    for name, value in (("hidden", 256), ("layers", 2), ("tokens", 128), ("threads", 1), ("rows", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", choices=["mixed", "single"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for adapters, rows in MIXED if options.only != "single" else ():
        mixed(adapters, rows, options)
    for method in ("lora", "dora") if options.only != "mixed" else ():
        for dtype in (torch.float32, torch.bfloat16):
            single(method, dtype, options)
    FIGURES.write(options.json)
    return 0


def base(options: Any) -> Any:
    """Return a Llama with random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": options.hidden, "num_hidden_layers": options.layers}
    inner = options.hidden * 8 // 3 // 8 * 8
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, intermediate_size=inner)
    return transformers.LlamaForCausalLM(config).eval()


def mixed(adapters: int, rows: int, options: Any) -> None:
    """Time one token per row, each with its own adapter: adapterkit, PEFT's `adapter_names=`, the base alone."""
    from peft import LoraConfig, get_peft_model

    model = base(options)
    config = LoraConfig(target_modules=TARGETS, r=8, init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(model), config, adapter_name="a0")
    for number in range(1, adapters):
        theirs.add_adapter(f"a{number}", config)
    theirs.eval()
    ours = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        for number in range(adapters):
            ak.torch.inject(ours, ak.read(f"{folder}/a{number}"), name=f"a{number}")
    ids = torch.randint(0, 256, (rows, 1))
    names = [f"a{row % adapters}" for row in range(rows)]

    def routed() -> Any:
        with ak.torch.route(ours, names):
            return ours(ids).logits

    with torch.no_grad():
        apart = float((routed() - theirs(ids, adapter_names=names).logits).abs().max())
        runs = {
            "PEFT": lambda: theirs(ids, adapter_names=names),
            "adapterkit": routed,
            "base alone": lambda: model(ids),
        }
        report(f"{adapters} adapters over {rows} rows at one token (apart by {apart:.1e})", turns(runs, options.rounds))


def single(method: str, dtype: torch.dtype, options: Any) -> None:
    """Measure one adapter's forward without gradients, and its training step with peak memory."""
    from peft import LoraConfig, get_peft_model

    model = base(options).to(dtype)
    config = LoraConfig(target_modules=TARGETS, r=8, lora_alpha=16, use_dora=method == "dora")
    theirs = get_peft_model(copy.deepcopy(model), config)
    ours = copy.deepcopy(model)
    fresh = ak.torch.create(ours, method, targets=TARGETS, rank=8, alpha=16)
    ak.torch.inject(ours, fresh, trainable=True)
    ids = torch.randint(0, 256, (options.rows, options.tokens))
    label = f"{method}, {str(dtype).removeprefix('torch.')}, {options.rows} x {options.tokens} tokens"
    with torch.no_grad():
        runs: dict[str, Callable[[], Any]] = {"PEFT": lambda: theirs(ids), "adapterkit": lambda: ours(ids)}
        report(f"forward of {label}", turns(runs, options.rounds))
    steps = {"PEFT": stepper(theirs, ids), "adapterkit": stepper(ours, ids)}
    report(f"step of {label}", turns(steps, options.rounds))
    peaks = {name: peak(step) for name, step in steps.items()}
    ratio = peaks["adapterkit"] / peaks["PEFT"]
    FIGURES.add(f"{label}: peak memory of a step, ours / PEFT", [ratio], "x")
    print(f"  peak memory of a step  {'  '.join(f'{k} {v / 1e6:.1f} MB' for k, v in peaks.items())}  ratio {ratio:.3f}")


def stepper(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Run one step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def peak(work: Callable[[], object]) -> int:
    """Return the peak memory of torch on the CPU during a call, in addition to the memory before."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events: Any = profile.profiler
    sizes = [(e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(sizes, key=lambda each: each[0]):
        held += size
        most = max(most, held)
    return most


def turns(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the processor times of each contender, run in alternating order; the first two rounds fill caches."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in list(runs.items())[:: 1 if turn % 2 else -1]:
            started = time.process_time()
            run()
            if turn > 1:
                times[name].append(time.process_time() - started)
    return times


def report(label: str, times: dict[str, list[float]]) -> None:
    """Print medians and minima, and the ratios of both; the base's time is a lower bound."""
    FIGURES.ratio(f"{label.partition(' (apart')[0]}: ours / PEFT", times["adapterkit"], times["PEFT"])
    medians = {name: statistics.median(each) for name, each in times.items()}
    least = {name: min(each) for name, each in times.items()}
    figures = "  ".join(f"{name} {1e3 * medians[name]:.1f} ({1e3 * least[name]:.1f}) ms" for name in times)
    of, bound = (medians, least), ""
    ratios = [each["adapterkit"] / each["PEFT"] for each in of]
    if "base alone" in times:
        most = [each["PEFT"] / each["base alone"] for each in of]
        bound = f", PEFT / base {most[0]:.2f} ({most[1]:.2f})"
    print(
        f"{label}\n  median (minimum): {figures}\n  ours / PEFT {ratios[0]:.2f} ({ratios[1]:.2f}), "
        f"PEFT / ours {1 / ratios[0]:.2f} ({1 / ratios[1]:.2f}){bound}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Measures how much of an adapter's effect is left after a requantized merge, with --keep, and with a remainder.

    python tools/bench/remainder.py BASE LORA TEXT [--kinds Q4_0 nf4 ...] [--ranks 8] [--modules q_proj ...]
        [--layers 0 3 ...] [--calibration OTHER_TEXT]

With --calibration, one more model is rounded with activations: those of the exact merge into the unrounded base, on the
paragraphs of another text.

The base's weights are rounded to a quantization scheme. The reference is the exact merge into these rounded weights.
The script compares it with the base alone, with the requantized merge, with rounding that keeps the adapter (--keep),
and with the best LoRA of each rank for the rounding loss. The measure is the mean KL divergence of the next token over
the paragraphs of a text. Kept is 1 - KL / KL of the base alone. Only the weights that the adapter changes are rounded;
all others are exact in every model.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent / "rig")]

from packings import SCHEMES, PackedWeight  # noqa: E402

import adapterkit as ak  # noqa: E402
from adapterkit.io.ggml_blocks import BLOCKS  # noqa: E402
from adapterkit.merging.keeping import directions, kept, swept, weighting  # noqa: E402

LENGTH, PARAGRAPHS = 96, 6
"""Largest number of tokens of a paragraph, and the number of paragraphs; they have 300 characters or more."""

READ, OF = 16, 64
"""Number of paragraphs for calibration, and largest number of tokens of each, as in `adapterkit.gating.calibrate`."""

KINDS = [*SCHEMES, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]


def main() -> None:
    """Measure and print the rows of each scheme."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("lora")
    parser.add_argument("text", type=Path)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=[*SCHEMES, *BLOCKS])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8])
    parser.add_argument("--modules", nargs="+", default=[""], help="the last words of the targets to merge")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the adapter's change")
    parser.add_argument("--paragraphs", type=int, default=PARAGRAPHS)
    parser.add_argument("--length", type=int, default=LENGTH, help="largest number of tokens of a paragraph")
    parser.add_argument("--layers", nargs="+", type=int, help="numbers of the layers to merge; default: all")
    parser.add_argument(
        "--calibration", type=Path, metavar="OTHER_TEXT", help="text whose activations the rounding uses"
    )
    chosen = parser.parse_args()
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.base)
    tokens = paragraphs(tokenizer, chosen.text, chosen.paragraphs, chosen.length)
    adapter = ak.read(chosen.lora)
    paths = [target.path for target in adapter.updates if target.path.endswith(tuple(chosen.modules))]
    if chosen.layers is not None:
        paths = [path for path in paths if set(path.split(".")) & set(map(str, chosen.layers))]
    modules = {path: model.get_submodule(path) for path in paths}
    weights = {path: module.weight.detach().numpy().copy() for path, module in modules.items()}
    changes = {path: chosen.scale * np.asarray(adapter.delta(path)) for path in modules}

    def spoken(held: Mapping[str, Any]) -> Any:
        for path, module in modules.items():
            module.weight.data = torch.from_numpy(np.ascontiguousarray(held[path], "f4"))
        with torch.no_grad():
            return torch.cat([model(each).logits[0].double().log_softmax(-1) for each in tokens])

    inputs = {}
    if chosen.calibration is not None:
        merge_in = {path: W + changes[path] for path, W in weights.items()}
        inputs = read_inputs(modules, merge_in, paragraphs(tokenizer, chosen.calibration, READ, OF), model)
    count, read = sum(map(np.size, weights.values())), sum(each.numel() for each in tokens)
    print(f"{len(paths)} weights, {count:,} numbers, {read} tokens")
    print(f"{'type':<13}{'model':<28}{'KL':>10}{'kept':>9}{'bits':>7}{'seconds':>9}")
    for kind in chosen.kinds:
        rows_of(kind, weights, changes, chosen.ranks, spoken, inputs)


def paragraphs(tokenizer: Any, text: Path, count: int, length: int) -> list[Any]:
    """Return the tokens of the first long paragraphs of a text."""
    long = [part for part in text.read_text("utf-8").split("\n\n") if len(part) >= 300][:count]
    return [tokenizer(part, return_tensors="pt").input_ids[:, :length] for part in long]


def read_inputs(modules: Mapping[str, Any], held: Mapping[str, Any], tokens: list[Any], model: Any) -> dict[str, Any]:
    """Return the inputs of each module on some texts, `[tokens, width]`."""
    import torch

    found: dict[str, list[Any]] = {path: [] for path in modules}
    hooks = []
    for path, module in modules.items():
        module.weight.data = torch.from_numpy(np.ascontiguousarray(held[path], "f4"))
        hooks.append(module.register_forward_pre_hook(lambda _, x, into=found[path]: into.append(x[0][0].numpy())))
    with torch.no_grad():
        for each in tokens:
            model(each)
    for hook in hooks:
        hook.remove()
    return {path: np.concatenate(parts) for path, parts in found.items()}


def rows_of(
    kind: str, weights: Any, changes: Any, ranks: list[int], spoken: Callable[[Any], Any], inputs: Mapping[str, Any]
) -> None:
    """Print the rows of one scheme."""
    packed = {path: PackedWeight(kind, W) for path, W in weights.items()}
    base = {path: each.rows for path, each in packed.items()}
    exact = {path: (W + changes[path]).astype("f4") for path, W in base.items()}
    count, size = sum(W.size for W in base.values()), 8 * sum(each.bytes for each in packed.values())
    wanted, without = spoken(exact), 0.0

    def tell(name: str, held: Any, bits: float, seconds: float) -> None:
        nonlocal without
        said = spoken(held)
        far = float((wanted.exp() * (wanted - said)).sum(-1).mean())
        without = without or far
        print(f"{kind:<13}{name:<28}{far:>10.5f}{1 - far / without:>9.1%}{bits:>7.2f}{seconds:>9.1f}", flush=True)

    tell("the base alone", base, size / count, 0.0)
    started = time.process_time()
    again = {path: packed[path].again(W) for path, W in exact.items()}
    tell("to the nearest", again, size / count, time.process_time() - started)
    started = time.process_time()
    keeping = {path: packed[path].again(shifted(packed[path], W, changes[path])) for path, W in exact.items()}
    tell("keep adapter", keeping, size / count, time.process_time() - started)
    if inputs:
        started = time.process_time()
        by_texts = {path: packed[path].again(calibrated(packed[path], W, changes[path], inputs[path]))
                    for path, W in exact.items()}  # fmt: skip
        tell("keep adapter, calibrated", by_texts, size / count, time.process_time() - started)
    for rank in ranks:
        started = time.process_time()
        added = {path: W + best(exact[path] - W, rank) for path, W in again.items()}
        more = 16 * rank * sum(sum(W.shape) for W in base.values())
        tell(f"nearest, remainder of rank {rank}", added, (size + more) / count, time.process_time() - started)


def shifted(packed: PackedWeight, W: Any, change: Any) -> Any:
    """Return the numbers that `merge --keep adapter` packs."""
    Vh = directions(np.asarray(change, np.float64), 0)[None]
    return kept(lambda M: packed.again(M[0])[None], W[None], Vh)[0]


def calibrated(packed: PackedWeight, W: Any, change: Any, inputs: Any) -> Any:
    """Return the numbers that `merge --keep adapter --calibration` packs."""
    H = weighting(inputs.astype(np.float64), directions(np.asarray(change, np.float64), 0))
    return swept(packed.again, W, H)


def best(lost: Any, rank: int) -> Any:
    """Return the best matrix of a rank; its singular vectors are the eigenvectors of the smaller Gram matrix."""
    if lost.shape[0] > lost.shape[1]:
        return best(lost.T, rank).T
    U = np.linalg.eigh(lost @ lost.T)[1][:, -rank:]
    return U @ (U.T @ lost)


if __name__ == "__main__":
    main()

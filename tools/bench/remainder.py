#!/usr/bin/env python
"""How much of what an adapter does survives a requantized merge, alone and with a remainder beside it.

    python tools/bench/remainder.py BASE LORA TEXT [--kinds Q4_0 Q8_0] [--ranks 8 32] [--scale 1]

The base stands for its weights rounded to a GGUF type. Compared with the exact merge into these, by the mean KL
divergence of the next token over the paragraphs of a text: the base alone, the requantized merge, and that with the
best LoRA of each rank of what rounding lost. Kept is 1 - KL / KL of the base alone. Attention and MLP weights that the
adapter changes are rounded; all others are exact in every model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.io.ggml_blocks import decoded, encoded

LENGTH, PARAGRAPHS = 96, 6
"""Tokens of a paragraph at most, and how many are read; of 300 characters or more."""


def main() -> None:
    """Measures and prints one row a type and rank."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("lora")
    parser.add_argument("text", type=Path)
    parser.add_argument("--kinds", nargs="+", default=["Q4_0", "Q8_0"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--scale", type=float, default=1.0, help="of the adapter's change")
    chosen = parser.parse_args()
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.base, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.base)
    long = [part for part in chosen.text.read_text("utf-8").split("\n\n") if len(part) >= 300][:PARAGRAPHS]
    tokens = [tokenizer(part, return_tensors="pt").input_ids[:, :LENGTH] for part in long]
    adapter = ak.read(chosen.lora)
    modules = {target.path: model.get_submodule(target.path) for target in adapter.updates}
    weights = {path: module.weight.detach().numpy().copy() for path, module in modules.items()}
    changes = {path: chosen.scale * np.asarray(adapter.delta(path)) for path in modules}

    def spoken(held: Mapping[str, Any]) -> Any:
        for path, module in modules.items():
            module.weight.data = torch.from_numpy(held[path].astype("f4"))
        with torch.no_grad():
            return torch.cat([model(each).logits[0].double().log_softmax(-1) for each in tokens])

    print(f"{'type':<8}{'model':<28}{'KL':>10}{'kept':>9}")
    for kind in chosen.kinds:
        row(kind, weights, changes, chosen.ranks, spoken)


def row(kind: str, weights: Any, changes: Any, ranks: list[int], spoken: Callable[[Any], Any]) -> None:
    """Prints the rows of one type."""
    base = {path: rounded(kind, W) for path, W in weights.items()}
    exact = {path: W + changes[path] for path, W in base.items()}
    again = {path: rounded(kind, W) for path, W in exact.items()}
    held = {"the base alone": base, "requantized": again}
    lost = {path: np.linalg.svd(exact[path] - again[path], full_matrices=False) for path in exact}
    for rank in ranks:
        parts = {path: (U[:, :rank] * S[:rank]) @ Vh[:rank] for path, (U, S, Vh) in lost.items()}
        held[f"and a remainder of rank {rank}"] = {path: again[path] + part for path, part in parts.items()}
    wanted, without = spoken(exact), None
    for name, each in held.items():
        said = spoken(each)
        far = float((wanted.exp() * (wanted - said)).sum(-1).mean())
        without = far if without is None else without
        print(f"{kind:<8}{name:<28}{far:>10.5f}{1 - far / without:>9.1%}", flush=True)


def rounded(kind: str, W: Any) -> Any:
    """A weight as a GGUF type stores it."""
    return np.array(decoded(kind, bytes(encoded(kind, np.ascontiguousarray(W, "f4"))))).reshape(W.shape)


if __name__ == "__main__":
    main()

"""Compares exports of a real causal LM with real adapters with the text that PEFT generates.

    python tools/foreign/check_export.py BASE ADAPTERS [--first lora_r16] [--second rslora_patterns]

ADAPTERS is the folder that `make_peft_adapters.py` made from BASE; it includes PEFT's greedy text. The command line
exports the first adapter in every mode, and both adapters as slots. onnxruntime generates 32 tokens with past keys and
values, one token at a time; they must be PEFT's tokens. The model with slots is loaded once, and its adapters are
swapped between the tokens. The script exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from adapterkit.onnx import Session  # noqa: E402 - this checkout's own


def exported(base: Path, adapters: list[Path], mode: str, out: Path) -> Path:
    """Runs the command line; the folder that it wrote."""
    words = [word for adapter in adapters for word in ("--adapter", str(adapter))]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit", "export", str(base), "-o", str(out), "--mode", mode, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    size = sum(file.stat().st_size for file in out.iterdir())
    took = time.perf_counter() - started
    print(f"{mode}: {took:.0f} s, {size / 1e6:.0f} MB; {done.stdout.splitlines()[0].rpartition('; ')[2]}")
    return out


class Writer:
    """Greedy writing by a session, one prompt, with its past."""

    def __init__(self, session: Any, ids: Any, adapter: str | None) -> None:
        self.session, self.adapter, self.tokens = session, adapter, [int(token) for token in ids]
        self.past = {name: np.zeros(self._empty(name), np.float32) for name in session.inputs if "past" in name}
        self.seen = 0

    def _empty(self, name: str) -> tuple[int, ...]:
        entry = self.session._entries[name]
        return (1, entry.shape[1], 0, entry.shape[3])

    def step(self) -> int:
        """One more token."""
        new = np.array([self.tokens[self.seen :]])
        self.seen += new.shape[1]
        feeds = {
            "input_ids": new, "attention_mask": np.ones((1, self.seen), np.int64),
            "position_ids": np.arange(self.seen - new.shape[1], self.seen)[None],
        }  # fmt: skip
        told = self.session.run({**feeds, **self.past}, self.adapter)
        self.past = {name: told[name.replace("past_key_values", "present")] for name in self.past}
        self.tokens.append(int(told["logits"][0, -1].argmax()))
        return self.tokens[-1]


def written(writers: list[Writer], wanted: list[int]) -> list[list[int]]:
    """All writers take turns, token by token, up to as many as were recorded for each."""
    told: list[list[int]] = [[] for _ in writers]
    for step in range(max(wanted)):
        for writer, count, tokens in zip(writers, wanted, told, strict=True):
            if step < count:
                tokens.append(writer.step())
    return told


def same(session: Any, adapters: dict[str | None, results.Results], words: str) -> bool:
    """Whether every adapter's text comes out, all prompts and adapters interleaved."""
    writers, expected = [], []
    for name, record in adapters.items():
        for prompt, text in zip(record.prompts, record.written, strict=True):
            writers.append(Writer(session, prompt, name))
            expected.append(text.tolist())
    told = written(writers, [len(text) for text in expected])
    right = sum(a == b for a, b in zip(told, expected, strict=True))
    print(f"  {words}: {right} of {len(expected)} texts equal, {sum(map(len, expected))} tokens")
    return told == expected


def main() -> int:
    """Runs the command line; 0 all equal, 1 not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("adapters", type=Path, help="the folder that make_peft_adapters.py made from the base")
    parser.add_argument("--first", default="lora_r16")
    parser.add_argument("--second", default="rslora_patterns")
    options = parser.parse_args()
    places = [options.adapters / options.first, options.adapters / options.second]
    first, second = (results.load(place) for place in places)
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32, trust_remote_code=False).eval()
    plain = results.ask(model, AutoTokenizer.from_pretrained(options.base, trust_remote_code=False))
    del model
    differ = not first.same_text(second) and not first.same_text(plain) and not second.same_text(plain)
    print(f"the adapters' texts, and the base's, differ: {differ}")
    good = [differ]
    with tempfile.TemporaryDirectory(prefix="adapterkit-export-") as scratch:
        for mode in ("merged", "attached"):
            folder = exported(options.base, places[:1], mode, Path(scratch, mode))
            good.append(same(Session(folder / "model.onnx"), {None: first}, "PEFT's text"))
        folder = exported(options.base, places, "slots", Path(scratch, "slots"))
        names = {place.name: folder / f"{place.name}.onnx_adapter" for place in places}
        session = Session(folder / "model.onnx", names)
        all_of_them = {None: plain, places[0].name: first, places[1].name: second}
        good.append(same(session, all_of_them, "one session, adapters switched at every token"))
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())

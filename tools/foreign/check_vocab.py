"""Adds three tokens to a real model, trains adapters with PEFT, merges them and compares with PEFT's model.

    python tools/real_model.py MODEL
    python tools/foreign/check_vocab.py MODEL [NAME...]

NAME is one of `KINDS`: whole saved modules, rows of tokens, or a LoRA on the embedding; each runs on a base with tied
and with untied embeddings. The model is loaded in float32, and its vocabulary is extended. PEFT trains a few steps on
text with the new tokens, and saves adapter and tokenizer with default options. A case is `right` if all of this holds.
adapterkit's merge gives PEFT's logits within 1e-4 of the largest; if the file lacks the head's new rows, adapterkit
first refuses and names `--vocab grow`. The tokenizer beside the merge loads and gives the same tokens. Generation from
three prompts gives the same text. The same adapter injected into the extended live model gives the same logits.
Otherwise, the script exits with 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterkit
from adapterkit.errors import AdapterkitError

LIMIT = 1e-4
STEPS = 4
NEW = ["<|note|>", "<|end_note|>", "<|zebra|>"]
TEXTS = [
    "<|note|>The cat sat on the mat.<|end_note|> It was a <|zebra|> day.",
    "Write a <|note|> about the sea.<|end_note|> The <|zebra|> answered slowly, and then it rained.",
]
PROMPTS = [*TEXTS, "<|note|>Once upon a time"]
INNER = ["q_proj", "down_proj"]

KINDS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "modules_to_save": lambda _: {"target_modules": INNER, "modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save, tied": lambda _: {
        "target_modules": INNER, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "trainable tokens": lambda new: {"target_modules": INNER, "trainable_token_indices": [7, *new]},
    "embedding LoRA": lambda _: {"target_modules": [*INNER, "embed_tokens"]},
    "embedding and head LoRA": lambda _: {"target_modules": [*INNER, "embed_tokens", "lm_head"]},
}  # fmt: skip
"""Name -> the new tokens' numbers -> how PEFT trains them."""


def write_base(source: Path, out: Path, tied: bool) -> None:
    """The model in float32, with tied embeddings or with a head of its own that differs from the embedding."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    if not tied:
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        torch.manual_seed(5)
        weight = model.get_input_embeddings().weight.detach()
        head.weight = torch.nn.Parameter(weight + 0.01 * weight.std() * torch.randn_like(weight))
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(out)


def train(base: Path, out: Path, kind: str) -> tuple[Any, Any]:
    """PEFT's model and the tokenizer, after some steps on text with the new tokens; both are saved to `out`."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    tokenizer.add_tokens(NEW)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    settings = KINDS[kind](tokenizer.convert_tokens_to_ids(NEW))
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=2e-3)
    for step in range(STEPS):
        tokens = tokenizer(TEXTS[step % len(TEXTS)], return_tensors="pt").input_ids
        optimizer.zero_grad()
        peft(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    peft.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return peft.eval(), tokenizer


def answers(model: Any, tokenizer: Any) -> list[tuple[torch.Tensor, str]]:
    """For each prompt the logits, and the text that the model goes on with."""
    found = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logits = model(**tokens).logits[0]
            text = model.generate(**tokens, max_new_tokens=16, do_sample=False)
        found.append((logits, tokenizer.decode(text[0])))
    return found


def farthest(one: list[tuple[torch.Tensor, str]], other: list[tuple[torch.Tensor, str]]) -> float:
    """The largest difference of logits over the largest logit; infinite where there are other rows."""
    pairs = [(a, b) for (a, _), (b, _) in zip(one, other, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def check(base: Path, folder: Path, kind: str) -> tuple[str, str]:
    """(verdict, detail) of one way to train the tokens; where a file lacks new rows, they are asked for."""
    peft, tokenizer = train(base, folder / "adapter", kind)
    expected = answers(peft, tokenizer)
    del peft
    asked = ""
    try:
        report = adapterkit.merge(base, folder / "adapter", folder / "merged")
    except AdapterkitError as error:
        if 'vocab="grow"' not in str(error):
            raise
        report = adapterkit.merge(base, folder / "adapter", folder / "merged", vocab="grow")
        asked = ", after a refusal, with --vocab grow"
    again = AutoTokenizer.from_pretrained(folder / "merged", trust_remote_code=False)
    if len(again) != len(tokenizer) or any(again(p).input_ids != tokenizer(p).input_ids for p in PROMPTS):
        return "wrong", f"the tokenizer has {len(again)} tokens, and not the {len(tokenizer)} of the training"
    merged = AutoModelForCausalLM.from_pretrained(
        folder / "merged", dtype=torch.float32, trust_remote_code=False
    ).eval()
    found = answers(merged, again)
    distance = farthest(expected, found)
    same = [text for _, text in expected] == [text for _, text in found]
    live = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).eval()
    plain = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    before = [live(plain(prompt, return_tensors="pt").input_ids).logits for prompt in ("The sea is",)]
    after = [merged(plain(prompt, return_tensors="pt").input_ids).logits for prompt in ("The sea is",)]
    effect = float((before[0] - after[0][..., : before[0].shape[-1]]).abs().max() / before[0].abs().max())
    live.resize_token_embeddings(len(tokenizer))
    adapterkit.torch.inject(live, adapterkit.read(folder / "adapter"))
    injected = farthest(expected, answers(live, tokenizer))
    detail = (
        f"merged {distance:.1e}, {'same text' if same else 'OTHER TEXT'}, injected {injected:.1e}, "
        f"{report.plan.targets} tensors, the adapter's effect {effect:.1e}{asked}"
    )
    right = distance <= LIMIT and same and injected <= LIMIT and effect > LIMIT
    return ("right" if right else "wrong"), detail


def main() -> int:
    """Check every way that was asked for, tied and untied, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("kinds", nargs="*", metavar="NAME")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    failed = 0
    for tied in (True, False):
        with tempfile.TemporaryDirectory() as held:
            write_base(arguments.model, Path(held) / "base", tied)
            for kind in arguments.kinds or KINDS:
                if kind.endswith("tied") and not tied:
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        verdict, detail = check(Path(held) / "base", Path(folder), kind)
                    except AdapterkitError as error:
                        verdict, detail = "refused", f"{type(error).__name__}: {error}"
                failed += verdict != "right"
                print(f"{verdict:8} {'tied' if tied else 'untied':7} {kind:24} {detail}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

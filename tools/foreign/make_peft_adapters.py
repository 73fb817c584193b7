"""Trains real adapters with PEFT on a causal LM, and records the outputs of PEFT's unmerged model.

    python tools/foreign/make_peft_adapters.py BASE DEST

DEST/<name>/ has the files of `save_pretrained`, and `expected.safetensors` and `expected.json` (see results.py). Each
adapter is trained for a few steps on Python's reference manual, from a fixed seed, so that all of A, B, magnitudes,
scales and whole modules change. `check_real.py` compares adapterkit's merges with these records.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import results
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from rig.texts import cut, prose

STEPS, BATCH = 16, 2
"""Steps of training, and pieces of text a step."""

RATES = {"ia3": 1e-2}
"""Adam's step where it is not `RATE`: scales near one need larger ones."""

RATE = 1e-3

CONFIGS: dict[str, PeftConfig] = {
    "lora_r16": LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    "rslora_patterns": LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={r"layers\.[0-4]\.self_attn\.(q|k)_proj": 4, r"mlp\.down_proj": 12, "v_proj": 24},
        alpha_pattern={r"layers\.\d\.mlp\..*": 48, r"(.*\.)?o_proj": 5, "gate_proj": 20},
    ),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, use_dora=True, target_modules="all-linear"),
    "ia3": IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "lora_saved": LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        modules_to_save=["model.norm", "layers.0.input_layernorm", "layers.5.mlp.down_proj"],
    ),
}


def load_base(base: Path) -> Any:
    """The base in float32, ready to answer."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False).eval()


def make(base: Path, dest: Path, name: str, text: list[Tensor]) -> None:
    """Trains the adapter `name` on pieces of text and saves it into the new folder `dest`."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), deepcopy(CONFIGS[name]))
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], RATES.get(name, RATE))
    draw = random.Random(name)
    for _ in range(STEPS):
        batch = torch.stack(draw.sample(text, BATCH))
        adam.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        adam.step()
    # "auto" would ask the hub about a base that is a local folder.
    model.save_pretrained(str(dest), save_embedding_layers=False)


def record(base: Path, folder: Path, plain: results.Results) -> None:
    """Loads the saved adapter afresh, as any user of it would, and records its answers beside it."""
    model = PeftModel.from_pretrained(load_base(base), str(folder)).eval()
    answers = results.ask(model, AutoTokenizer.from_pretrained(base, trust_remote_code=False))
    change = answers.logit_error(plain)
    results.save(
        answers,
        folder,
        versions={library.__name__: library.__version__ for library in (peft, transformers, torch)},
        largest_change_of_a_logit=change,
        text_of_the_base=plain.text,
    )
    print(f"{folder.name}: logits moved by up to {change:.2f}")
    for prompt, text in zip(results.PROMPTS, answers.text, strict=True):
        print(f"  {prompt} |{text!r}")


def make_all(base: Path, dest: Path) -> None:
    """Makes and records every adapter; `dest` appears whole or not at all."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    plain, text = results.ask(load_base(base), tokenizer), cut(tokenizer, prose())
    scratch = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        adapters = scratch / "adapters"
        adapters.mkdir()
        for name in CONFIGS:
            make(base, adapters / name, name, text)
            record(base, adapters / name, plain)
        adapters.rename(dest)
    finally:
        shutil.rmtree(scratch)


def main() -> int:
    """Runs the command line; 2 when DEST is taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of a causal LM that transformers can load")
    parser.add_argument("dest", type=Path, help="the folder to create; it must not exist")
    options = parser.parse_args()
    dest = options.dest.absolute()
    if dest.exists():
        print(f"make_peft_adapters: {dest}: already exists. Remove it or name another folder", file=sys.stderr)
        return 2
    make_all(options.base.absolute(), dest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes real adapters with PEFT on a causal LM, and records what PEFT itself computes with them, unmerged.

    python tools/foreign/make_peft_adapters.py BASE DEST

DEST/<name>/ holds what `save_pretrained` wrote, plus `expected.safetensors` and `expected.json` (see results.py).
The weights are drawn from a fixed seed and scaled to a share of the base's own, so that every logit moves while the
text stays readable. `check_real.py` holds adapterkit's merges against these records.
"""

from __future__ import annotations

import argparse
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
from peft.tuners.lora import LoraLayer
from torch import Generator, Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

STRENGTH = 0.03
"""Frobenius norm of a change over that of the weight it changes."""

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
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def make(base: Path, dest: Path, name: str) -> None:
    """Saves the adapter `name` into the new folder `dest`."""
    model = get_peft_model(load_base(base), deepcopy(CONFIGS[name]))
    generator = Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoraLayer):
                fill_lora(module, generator)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in key and "lora_B" not in key:
                parameter.mul_(1 + STRENGTH * noise(parameter, generator))
    # "auto" would ask the hub about a base that is a local folder.
    model.save_pretrained(str(dest), save_embedding_layers=False)


def fill_lora(layer: Any, generator: Generator) -> None:
    """Draws A and B of `layer`, with scaling * B @ A at `STRENGTH` of the weight."""
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.copy_(noise(A, generator) / A.shape[1] ** 0.5)
    B.copy_(noise(B, generator))
    change = torch.linalg.norm(B @ A) * layer.scaling["default"]
    B.mul_(STRENGTH * torch.linalg.norm(layer.get_base_layer().weight) / change)


def noise(like: Tensor, generator: Generator) -> Tensor:
    """Standard normal values of the shape of `like`."""
    return torch.randn(like.shape, generator=generator)


def record(base: Path, folder: Path, plain: results.Results) -> None:
    """Loads the saved adapter afresh, as any user of it would, and records its answers beside it."""
    model = PeftModel.from_pretrained(load_base(base), str(folder)).eval()
    answers = results.ask(model, AutoTokenizer.from_pretrained(base))
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
    plain = results.ask(load_base(base), AutoTokenizer.from_pretrained(base))
    scratch = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        adapters = scratch / "adapters"
        adapters.mkdir()
        for name in CONFIGS:
            make(base, adapters / name, name)
            record(base, adapters / name, plain)
        adapters.rename(dest)
    finally:
        shutil.rmtree(scratch)


def main() -> int:
    """Runs the command line; 2 when DEST is taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", type=Path, help="folder of a causal LM, as transformers loads it")
    parser.add_argument("dest", type=Path, help="the folder to make; must not exist")
    options = parser.parse_args()
    dest = options.dest.absolute()
    if dest.exists():
        print(f"make_peft_adapters: {dest}: already exists. Remove it or name another folder", file=sys.stderr)
        return 2
    make_all(options.base.absolute(), dest)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tiny random models, adapters with a visible effect, and merges of both by a plain formula."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import adapterkit as ak
from adapterkit.methods.lora import LoRA

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
DRAWN = {"initializer_range": 0.2}
ROPE = {"num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64, **DRAWN}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **ROPE, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **ROPE, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64,
        bos_token_id=1, eos_token_id=2, **DRAWN),
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=64, **DRAWN),
    "clip": lambda: transformers.CLIPConfig(
        text_config={**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "num_hidden_layers": 2,
                     "bos_token_id": 1, "eos_token_id": 2},
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
            "image_size": 8, "patch_size": 4,
        },
        projection_dim=16, initializer_factor=4.0,
    ),
    "vit": lambda: transformers.ViTConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, intermediate_size=48, image_size=8, patch_size=4,
        num_labels=5, **DRAWN,
    ),
    "t5": lambda: transformers.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0,
        initializer_factor=2.0,
    ),
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "mixtral": "MixtralForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel", "bert": "BertForMaskedLM", "clip": "CLIPModel", "vit": "ViTForImageClassification",
}  # fmt: skip
TARGETS = {
    "llama": ["*_proj"], "qwen2": ["*_proj"], "mixtral": ["*.q_proj", "*.v_proj", "*.experts.*_proj"],
    "gpt2": ["*.c_attn", "*.c_proj"], "bert": ["*.query", "*.value", "*.dense"], "clip": ["*.q_proj", "*.fc1"],
    "vit": ["*.q_proj", "*.fc1"], "t5": ["*.q", "*.wo"],
}  # fmt: skip


def make(family: str, folder: Path, seed: int = 0, dtype: str = "float32", **changes: Any) -> Path:
    """Save a random model; biases and norms are random, too, so that a test sees if they are lost."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = getattr(transformers, CLASSES[family])(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def lora(family: str, model: Any, seed: int = 1, rank: int = 4, size: float = 0.15, **options: Any) -> ak.Adapter:
    """Return a LoRA whose change is `size` times as large as the weight, at every target."""
    return drawn(ak.torch.create(model, "lora", targets=TARGETS[family], rank=rank, **options), model, seed, size)


def drawn(adapter: ak.Adapter, model: Any, seed: int, size: float) -> ak.Adapter:
    random = torch.Generator().manual_seed(seed)
    named = dict(model.named_parameters())
    updates = {}
    for target, (update,) in adapter.updates.items():
        W = named.get(f"{target.path}.weight", named.get(target.path))
        A = torch.randn(update.A.shape, generator=random)
        B = torch.randn(update.B.shape, generator=random)
        norm = (B @ A.flatten(2 if target.stacked else 1)).norm()
        updates[target] = (update.replace(A=A, B=B * (size * W.detach().norm() / norm / update.scaling)),)
    return adapter.replace(updates=updates)


def scaled(adapter: ak.Adapter, factor: float) -> ak.Adapter:
    """Return an adapter with every scaling multiplied by a factor."""
    return adapter.replace(
        updates={t: tuple(u.replace(scaling=factor * u.scaling) for u in us) for t, us in adapter.updates.items()}
    )


def only(adapter: ak.Adapter, keep: Callable[[str], bool]) -> ak.Adapter:
    """Return the part of an adapter at some of its targets."""
    return adapter.replace(updates={t: us for t, us in adapter.updates.items() if keep(t.path)})


def model_of(folder: Path, dtype: str = "float32") -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """Copy a folder, and replace some tensors and entries of its config."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    if config:
        told = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(told | config))
    return out


def deltas(adapter: ak.Adapter) -> dict[str, torch.Tensor]:
    """Return the change of each weight by the formula, under the weight's name."""
    found = {}
    for target, updates in adapter.updates.items():
        for update in updates:
            assert isinstance(update, LoRA)
            change = (update.scaling * update.B.double() @ update.A.double()).float()
            found[f"{target.path}.weight"] = change.T if target.layout == "in out *k" else change
    return found


@cache
def world(family: str, root: str, dtype: str = "float32") -> tuple[Path, ak.Adapter]:
    """Return a base and an adapter."""
    folder = make(family, Path(root) / f"{family}-{dtype}", dtype=dtype)
    return folder, lora(family, model_of(folder))

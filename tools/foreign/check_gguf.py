"""Merges PEFT adapters into tiny GGUF models, converts adapters to GGUF, and compares both with llama.cpp.

    python tools/foreign/check_gguf.py LLAMA_CPP [MODEL_TYPE...]
    python tools/foreign/check_gguf.py LLAMA_CPP --fused [MODEL_TYPE...]      queries, keys and values in one tensor
    python tools/foreign/check_gguf.py LLAMA_CPP --vectors tests/data/gguf     write a tiny case of each kind of order

A base is a tiny random model of transformers, which llama.cpp's converter converts to a GGUF file. The adapter is
PEFT's, on every linear layer and every stack of experts. `merge`: adapterkit merges the adapter into the GGUF file.
PEFT merges it into the model, which the converter then converts to GGUF. All tensors must be equal, except for the last
bits of float32. `lora`: if llama.cpp's convert_lora_to_gguf.py accepts the adapter, each of its pairs of factors must
be the pair that adapterkit writes.

Needs transformers 5.24, PEFT 0.21.2 and a checkout of llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "architectures"))
sys.path.insert(0, str(Path(__file__).parent))

import gguf_models
import numpy as np
import torch
import transformers
from families import FAMILIES
from gguf_facts import GROUPED
from pairing import stored
from peft import LoraConfig, get_peft_model
from peft_models import experts_of, linears_of
from tiny import tiny

import adapterkit
from adapterkit.errors import AdapterkitError

LIMIT = 2e-6

FAULTY = dict.fromkeys(
    ("gpt2", "gpt-sw3"), "swaps the factors of Conv1D layers, so that they have the shape of the weight turned"
)
FAULTY["granitemoehybrid"] = "asks transformers 5 for the kinds of layers, does not know its words, and leaves all rows"
"""Model types of which llama.cpp's own converter of adapters makes files that llama.cpp refuses, or reads wrongly."""


SMALL = {
    "num_hidden_layers": 1, "n_layer": 1, "hidden_size": 16, "n_embd": 16, "intermediate_size": 8, "ffn_hidden_size": 8,
    "n_inner": 8, "num_attention_heads": 4, "n_head": 4, "head_dim": 4, "vocab_size": 8, "num_local_experts": 2,
    "num_experts": 2, "moe_intermediate_size": 8, "num_layers": 1, "num_decoder_layers": 1, "d_model": 16, "d_ff": 8,
    "d_kv": 4, "max_position_embeddings": 8, "layer_types": ["full_attention"],
}  # fmt: skip
"""Fields that make a tiny model small enough to be kept; those that its config does not have are left out."""

WIDER: dict[str, dict[str, Any]] = {
    "linear": {"layer_types": ["linear_attention"]},
    "linear_split": {"layer_types": ["linear_attention"]},
    "hybrid": {
        "num_hidden_layers": 2, "mamba_n_heads": 4, "layer_types": ["full_attention", "linear_attention"],
    },
    "dense_hybrid": {
        "mamba_n_heads": 4, "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 8,
    },
    "rotary": {
        "text_config.hidden_size": 32,
        "text_config.rope_parameters": {
            "rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5,
        },
    },
}  # fmt: skip
"""Name of a kind -> fields that it needs. Of 4 rows a head only 2 would be turned, and these stay where they are."""

VECTORS = {
    "rope": "llama", "qkv_by_head": "bloom", "qkv_by_group": "falcon", "turned": "gpt2", "experts": "qwen3_moe",
    "interleaved": "gpt_oss", "stack_in_parts": "granitemoe", "latent": "deepseek_v3", "linear": "qwen3_5_text",
    "linear_split": "qwen3_next", "rotary": "glm4v", "layers_twice": "t5",
    "hybrid": "granitemoehybrid", "dense_hybrid": "granitemoehybrid",
}  # fmt: skip
"""Name of a kind of order -> a model type that has it."""


def write_vectors(conversion: Any, out: Path) -> None:
    """For each kind of order: the base, PEFT's adapter, and the GGUF file of the model that PEFT merged."""
    for name, model_type in VECTORS.items():
        known = tiny(model_type).config
        inner = "text_config." if hasattr(known, "vision_config") else ""
        own = known.get_text_config() if inner else known
        fields = {inner + key: value for key, value in SMALL.items() if hasattr(own, key)}
        fields |= GROUPED.get(model_type, {}) | WIDER.get(name, {})
        model = tiny(model_type, **fields)
        with tempfile.TemporaryDirectory() as held:
            folder, kept = Path(held), out / name
            kept.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder / "base")
            gguf_models.convert(conversion, folder / "base", kept / "base.gguf", model_type)
            shapes = {key: list(tensor.shape) for key, tensor in stored(model).items()}
            (kept / "shapes.json").write_text(json.dumps(shapes, indent=0))
            (kept / "config.json").write_text((folder / "base" / "config.json").read_text())
            peft = adapted(model, experts=True)
            peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (kept / file).write_bytes((folder / "adapter" / file).read_bytes())
            peft.merge_and_unload().save_pretrained(folder / "merged")
            gguf_models.convert(conversion, folder / "merged", kept / "merged.gguf", model_type)
            print(f"{name}: {model_type}, {sum(f.stat().st_size for f in kept.iterdir())} bytes")


def in_language_model(name: str) -> bool:
    """Whether a module is of the part of a model that a GGUF file of a language model has."""
    words = name.split(".")
    return not {
        "visual",
        "vision_tower",
        "vision_model",
        "multi_modal_projector",
        "audio_tower",
        "merger",
        "aligner",
        "generation_aligner",
        "generation_head",
        "projector",
        "vision_adapter",
        "vision_projection",
        "embed_audio",
        "embed_vision",
    } & set(words)


def adapted(model: Any, experts: bool) -> Any:
    """PEFT's model with random factors at the linear layers that GGUF keeps in the language model."""
    torch.manual_seed(1)
    stacks = [name for name in experts_of(model) if experts and in_language_model(name)]
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=[n for n in linears_of(model) if in_language_model(n)],
        target_parameters=stacks or None, init_lora_weights=False,
    )  # fmt: skip
    found = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return found.eval()


def check_merge(conversion: Any, model_type: str, folder: Path, **options: Any) -> str:
    """`right`, with how far the tensors are from each other, or what is wrong; `options` are the converter's."""
    model = tiny(model_type, **GROUPED.get(model_type, {}))
    model.save_pretrained(folder / "base")
    gguf_models.convert(conversion, folder / "base", folder / "base.gguf", model_type, **options)
    peft = adapted(model, experts=True)
    peft.save_pretrained(folder / "adapter", save_embedding_layers=False)
    peft.merge_and_unload().save_pretrained(folder / "merged")
    gguf_models.convert(conversion, folder / "merged", folder / "expected.gguf", model_type, **options)
    report = adapterkit.merge(folder / "base.gguf", folder / "adapter", folder / "out.gguf")
    (_, expected), (_, got) = gguf_models.read(folder / "expected.gguf"), gguf_models.read(folder / "out.gguf")
    _, before = gguf_models.read(folder / "base.gguf")
    if expected.keys() != got.keys():
        return f"wrong: other tensors {sorted(expected.keys() ^ got.keys())[:3]}"
    worst = 0.0
    for name, tensor in expected.items():
        scale = float(np.abs(tensor).max(initial=0)) or 1.0
        distance = float(np.abs(tensor - got[name]).max(initial=0)) / scale
        if not distance <= LIMIT:
            return f"wrong: {name} by {distance:.1e}"
        worst = max(worst, distance)
    changed = sum(not np.array_equal(before[name], tensor) for name, tensor in expected.items())
    return f"right: {report.plan.targets} targets, {changed} tensors changed, {worst:.1e}"


def check_lora(llama_cpp: Path, model_type: str, folder: Path) -> str:
    """`same`, with how many pairs of factors, or how adapterkit's file differs from the converter's."""
    model = tiny(model_type, **GROUPED.get(model_type, {}))
    model.save_pretrained(folder / "base")
    adapted(model, experts=False).save_pretrained(folder / "adapter", save_embedding_layers=False)
    argv, sys.argv = sys.argv, ["convert", "--base", str(folder / "base"), "--outfile", str(folder / "theirs.gguf")]
    sys.argv.append(str(folder / "adapter"))
    try:
        runpy.run_path(str(llama_cpp / "convert_lora_to_gguf.py"), run_name="__main__")
    except (Exception, SystemExit) as error:
        return f"llama.cpp refuses ({type(error).__name__}: {str(error)[:60]})"
    finally:
        sys.argv = argv
    if model_type in FAULTY:
        return f"llama.cpp {FAULTY[model_type]}"
    adapter = adapterkit.read(folder / "adapter")
    adapterkit.write(adapter, folder / "ours.gguf", "gguf", base=folder / "base")
    (_, theirs), (_, ours) = gguf_models.read(folder / "theirs.gguf"), gguf_models.read(folder / "ours.gguf")
    if theirs.keys() != ours.keys():
        return f"wrong: other keys {sorted(theirs.keys() ^ ours.keys())[:4]}"
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape or not np.array_equal(tensor, ours[name]):
            return f"wrong: {name} {tensor.shape} {ours[name].shape}"
    return f"same: {len(theirs) // 2} pairs"


def main() -> int:
    """Check the model types that were asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--vectors", type=Path)
    parser.add_argument("--fused", action="store_true", help="convert with fuse_qkv and fuse_gate_up_exps")
    arguments = parser.parse_args()
    options = {"fuse_qkv": True, "fuse_gate_up_exps": True} if arguments.fused else {}
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    conversion = gguf_models.load(arguments.llama_cpp)
    if arguments.vectors:
        write_vectors(conversion, arguments.vectors)
        return 0
    counts: dict[str, int] = {}
    for model_type in arguments.types or [t for several in FAMILIES.values() for t in several]:
        for kind, check in (
            ("merge", lambda t, f: check_merge(conversion, t, f, **options)),
            ("lora", lambda t, f: check_lora(arguments.llama_cpp, t, f)),
        )[: 1 if arguments.fused else 2]:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    verdict = check(model_type, Path(folder))
                except AdapterkitError as error:
                    verdict = f"refused: {type(error).__name__}: {error}"
                except Exception as error:  # The converter does not know every model type.
                    verdict = f"not run: {type(error).__name__}: {error}"
            word = f"{kind} {verdict.partition(':')[0]}"
            counts[word] = counts.get(word, 0) + 1
            if not verdict.startswith("not run") or arguments.types:
                print(f"{model_type:22} {kind:6} {' '.join(verdict.split())[:220]}", flush=True)
    print(", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 1 if any("wrong" in word for word in counts) else 0


if __name__ == "__main__":
    sys.exit(main())

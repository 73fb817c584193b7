"""Writes the benchmark's inputs: a bfloat16 base of Llama's shapes in five shards, and a PEFT LoRA on all its layers.

The shapes are those of TinyLlama 1.1B. Values are random from fixed seeds; the time of a merge does not depend on them.
Tensors are drawn and written in blocks of rows, so memory stays small.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 2048, 5632, 32, 4, 22, 32000
SHARD_BYTES = 500_000_000
BLOCK_ROWS = 2048
RANK, ALPHA = 16, 32
SCALE_OF_WEIGHTS, SCALE_OF_A, SCALE_OF_B = 0.02, 0.02, 0.005

Shapes = Mapping[str, tuple[int, ...]]


def linears(layers: int) -> dict[str, tuple[int, int]]:
    """Return path and `[out, in]` of the seven linear layers of every block."""
    kv = HIDDEN // HEADS * KV_HEADS
    kinds = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    return {f"model.layers.{n}.{kind}": shape for n in range(layers) for kind, shape in kinds.items()}


def shapes(layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of the base, in the order of the file."""
    weights: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    weights |= {f"{path}.weight": shape for path, shape in linears(layers).items()}
    for n in range(layers):
        weights[f"model.layers.{n}.input_layernorm.weight"] = (HIDDEN,)
        weights[f"model.layers.{n}.post_attention_layernorm.weight"] = (HIDDEN,)
    return weights | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}


def nbytes(shape: tuple[int, ...]) -> int:
    """Return the size of a bfloat16 tensor."""
    return 2 * torch.Size(shape).numel()


def shards(weights: Shapes, limit: int) -> list[dict[str, tuple[int, ...]]]:
    """Split the tensors, in order, into files of at most `limit` bytes."""
    cut: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in weights.items():
        if cut[-1] and sum(map(nbytes, cut[-1].values())) + nbytes(shape) > limit:
            cut.append({})
        cut[-1][name] = shape
    return cut


def header(weights: Shapes) -> bytes:
    """Return the safetensors header of one shard, after its length."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in weights.items():
        start, end = end, end + nbytes(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def values(name: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the bytes of one tensor: ones for a norm, seeded normal values otherwise."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    for start in range(0, shape[0], BLOCK_ROWS):
        rows = (min(BLOCK_ROWS, shape[0] - start), *shape[1:])
        block = torch.ones(rows) if len(shape) == 1 else torch.randn(rows, generator=generator) * SCALE_OF_WEIGHTS
        yield block.bfloat16().view(torch.uint8).numpy().tobytes()


def write_base(dest: Path, layers: int, vocabulary: int, limit: int, *, sparse: bool = False) -> None:
    """Write the base in transformers' layout: config, index and shards; if `sparse`, with zeros as holes."""
    dest.mkdir()
    weights = shapes(layers, vocabulary)
    cut = shards(weights, limit)
    index: dict[str, str] = {}
    for number, shard in enumerate(cut, 1):
        file = f"model-{number:05}-of-{len(cut):05}.safetensors"
        index |= dict.fromkeys(shard, file)
        with open(dest / file, "wb") as out:
            out.write(header(shard))
            if sparse:
                out.truncate(out.tell() + sum(map(nbytes, shard.values())))
                continue
            out.writelines(block for name, shape in shard.items() for block in values(name, shape))
    write_json(
        dest / "model.safetensors.index.json",
        {"metadata": {"total_size": sum(map(nbytes, weights.values()))}, "weight_map": index},
    )
    write_json(dest / "config.json", config(layers, vocabulary))


def config(layers: int, vocabulary: int) -> dict[str, object]:
    """Return the config with which transformers builds the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write_adapter(
    dest: Path, base: Path, layers: int, *, rank: int = RANK, dora: bool = False, number: int = 0
) -> None:
    """Write a LoRA or DoRA, float32, on every linear layer, in PEFT's format."""
    dest.mkdir()
    tensors = {}
    for path, (out, width) in linears(layers).items():
        generator = torch.Generator().manual_seed(crc32(path.encode()) + number)
        key = f"base_model.model.{path}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(rank, width, generator=generator) * SCALE_OF_A
        tensors[f"{key}B.weight"] = torch.randn(out, rank, generator=generator) * SCALE_OF_B
        if dora:
            tensors[f"{key}magnitude_vector"] = torch.rand(out, generator=generator) + 0.5
    save_file(tensors, dest / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({path.rpartition(".")[2] for path in linears(layers)})
    record = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": targets,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    write_json(dest / "adapter_config.json", record)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Write DEST/base and DEST/adapter; DEST appears complete or not at all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dest", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the full size (fewer layers and tokens)")
    options = parser.parse_args()
    layers, vocabulary = max(1, round(LAYERS * options.scale)), max(64, round(VOCABULARY * options.scale))
    scratch = Path(tempfile.mkdtemp(prefix=f".{options.dest.name}.", dir=options.dest.parent))
    try:
        inputs = scratch / "inputs"
        inputs.mkdir()
        write_base(inputs / "base", layers, vocabulary, round(SHARD_BYTES * options.scale))
        write_adapter(inputs / "adapter", options.dest / "base", layers)
        inputs.rename(options.dest)
    finally:
        shutil.rmtree(scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())

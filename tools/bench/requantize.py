"""Times merges that quantize the base again: with the compiled loops, with numpy, and against a plain copy. Linux.

    python tools/bench requantize [--layers 6] [--rounds 3] [--only NAME] [--work FOLDER] [--json FILE]

The bases have a Llama's shapes and random values: GGUF files of Q4_K (with Q6_K for the embedding) and Q8_0, one that
the merge casts to F16, one with an adapter of an embedding of 152,000 rows, and a folder of bitsandbytes' nf4 with
double quantization. The adapter is a LoRA of rank 16 on all linear layers. Each merge is a separate process. The
compiled loops and numpy must write the same bytes. GGUF needs gguf-py.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rig.figures import Figures, arguments
from rig.process import Run, measure, warm
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from adapterkit.io.ggml_blocks import encoded  # noqa: E402
from adapterkit.quant.bnb_4bit import packed_levels  # noqa: E402

RANK, HIDDEN, INNER, HEADS, KV = 16, 2048, 5632, 32, 8
MODULES = {
    "self_attn.q_proj": ("attn_q", HIDDEN, HIDDEN), "self_attn.k_proj": ("attn_k", KV * 64, HIDDEN),
    "self_attn.v_proj": ("attn_v", KV * 64, HIDDEN), "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    "mlp.gate_proj": ("ffn_gate", INNER, HIDDEN), "mlp.up_proj": ("ffn_up", INNER, HIDDEN),
    "mlp.down_proj": ("ffn_down", HIDDEN, INNER),
}  # fmt: skip
NF4 = np.array(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803, 0.1609302,
     0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0], np.float32,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A base, and the options of its merge.

    Attributes:
        name: the name in the table.
        make: a function that writes base and adapter to a folder.
        options: the options of the merge.
    """

    name: str
    make: Callable[[Path, int], None]
    options: tuple[str, ...] = ()


def numbers(rows: int, width: int) -> np.ndarray:
    """Return random numbers; the same 256 rows are repeated."""
    own = (np.random.default_rng(width).standard_normal((min(rows, 256), width)) * 0.02).astype(np.float32)
    return np.resize(own, (rows, width))


def linears(layers: int) -> Iterator[tuple[int, str, str, int, int]]:
    """Yield (layer, module, the module's name in GGUF, rows, width)."""
    for layer in range(layers):
        for module, (stored, rows, width) in MODULES.items():
            yield layer, module, stored, rows, width


def write_adapter(folder: Path, layers: int, embedding: tuple[int, int] | None = None) -> None:
    """Write a PEFT folder with factors for every linear, and for the embedding if its shape is given."""
    folder.mkdir()
    rng, tensors = np.random.default_rng(1), {}
    for layer, module, _, rows, width in linears(layers):
        key = f"base_model.model.model.layers.{layer}.{module}.lora_"
        tensors[f"{key}A.weight"] = (rng.standard_normal((RANK, width)) * 0.02).astype(np.float32)
        tensors[f"{key}B.weight"] = (rng.standard_normal((rows, RANK)) * 0.02).astype(np.float32)
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "task_type": "CAUSAL_LM",
        "target_modules": [name.partition(".")[2] for name in MODULES],
    }  # fmt: skip
    if embedding is not None:
        key, (rows, width) = "base_model.model.model.embed_tokens.lora_embedding_", embedding
        tensors[f"{key}A"] = (rng.standard_normal((RANK, rows)) * 0.02).astype(np.float32)
        tensors[f"{key}B"] = (rng.standard_normal((width, RANK)) * 0.02).astype(np.float32)
        config["target_modules"].append("embed_tokens")
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def gguf_base(kind: str, embedding: str, vocabulary: int, *, adapted: bool = False) -> Callable[[Path, int], None]:
    """Return a function that writes a GGUF base of these types."""

    def make(folder: Path, layers: int) -> None:
        import gguf

        writer = gguf.GGUFWriter(folder / "base.gguf", "llama")
        writer.add_block_count(layers)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV)

        def add(name: str, rows: int, width: int, how: str) -> None:
            own = numbers(min(rows, 256), width)
            data = np.frombuffer(encoded(how, own), np.uint8).reshape(len(own), -1)
            writer.add_tensor(name, np.resize(data, (rows, data.shape[1])), raw_dtype=gguf.GGMLQuantizationType[how])

        add("token_embd.weight", vocabulary, HIDDEN, embedding)
        for layer, _, stored, rows, width in linears(layers):
            add(f"blk.{layer}.{stored}.weight", rows, width, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_adapter(folder / "adapter", layers, (vocabulary, HIDDEN) if adapted else None)

    return make


def nf4_base(folder: Path, layers: int) -> None:
    """Write a folder of nf4 weights with scales that are quantized themselves."""
    base, table, tensors = folder / "base", np.linspace(-1, 1, 256).astype(np.float32), {}
    base.mkdir()
    for layer, module, _, rows, width in linears(layers):
        name = f"model.layers.{layer}.{module}.weight"
        pairs, scales = packed_levels(numbers(rows, width).reshape(-1), NF4, 64)
        offset = float(scales.mean())
        blocks = (scales - np.float32(offset)).reshape(-1, 256)
        largest = np.abs(blocks).max(1)
        nested = np.abs(blocks[..., None] / largest[:, None, None] - table).argmin(-1).astype(np.uint8)
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, width],
            "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset,
        }  # fmt: skip
        tensors |= {
            name: pairs.reshape(-1, 1), f"{name}.quant_map": NF4, f"{name}.absmax": nested.reshape(-1),
            f"{name}.nested_absmax": largest, f"{name}.nested_quant_map": table,
            f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        }  # fmt: skip
    save_file(tensors, base / "model.safetensors")
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "num_attention_heads": HEADS,
              "num_key_value_heads": KV, "hidden_size": HIDDEN,
              "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}  # fmt: skip
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_adapter(folder / "adapter", layers)


CASES = (
    Case("Q4_K", gguf_base("Q4_K", "Q6_K", 32_000)),
    Case("Q8_0", gguf_base("Q8_0", "Q8_0", 32_000)),
    Case("Q8_0 to F16", gguf_base("Q8_0", "Q8_0", 32_000), ("--dtype", "F16")),
    Case("large embedding", gguf_base("Q8_0", "Q8_0", 152_064, adapted=True), ("--tied", "merge")),
    Case("nf4", nf4_base),
)


def make(name: str, folder: Path, layers: int) -> None:
    """Write the inputs of a case."""
    next(case for case in CASES if case.name == name).make(folder, layers)


def once(case: Case, folder: Path, work: Path, loops: str) -> Run:
    """Run one merge; its output stays in `work`, under the name `loops`."""
    out = work / loops
    remove(out)
    warm(folder)
    base = folder / "base"
    command = [
        sys.executable, "-m", "adapterkit", "merge", str(base if base.is_dir() else base.with_suffix(".gguf")),
        str(folder / "adapter"), "-o", str(out), "--quantized", "requantize", "-q", *case.options,
    ]  # fmt: skip
    env = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "ADAPTERKIT_KERNEL": loops}
    done = measure(command, work / "last", env)
    os.sync()
    return done


def same(one: Path, other: Path) -> bool:
    """Whether two outputs have the same weights."""
    if one.is_file():
        return filecmp.cmp(one, other, shallow=False)
    names = [file.name for file in one.glob("*.safetensors")]
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> int:
    """Run the command line; return 1 if the two ways write different bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments(parser, 3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--only", action="append", choices=[case.name for case in CASES], help="may be repeated")
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary folder)")
    options = parser.parse_args()
    figures, wrong = Figures("requantize"), []
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        with tempfile.TemporaryDirectory(dir=options.work) as name:
            folder, work = Path(name, "in"), Path(name)
            folder.mkdir()
            # Write the inputs in a separate process, because the memory of a child includes that of this process.
            making = multiprocessing.get_context("spawn").Process(target=make, args=(case.name, folder, options.layers))
            making.start()
            making.join()
            runs: dict[str, list[Run]] = {"on": [], "off": []}
            for number in range(options.rounds):
                for way in list(runs)[:: 1 if number % 2 else -1]:
                    runs[way].append(once(case, folder, work, way))
            if not same(work / "on", work / "off"):
                wrong.append(case.name)
        ours, theirs = ([run.cpu for run in runs[way]] for way in ("on", "off"))
        figures.add(f"{case.name}, processor time", ours, "s")
        figures.add(f"{case.name}, whole process", [run.seconds for run in runs["on"]], "s")
        figures.add(f"{case.name}, largest memory", [run.peak / 1e6 for run in runs["on"]], "MB")
        figures.ratio(f"{case.name}, processor time by numpy / by the loops", theirs, ours, more=True)
        for figure in figures.found[-4:]:
            print(figure, flush=True)
    figures.write(options.json)
    if wrong:
        print(f"other bytes with and without the loops: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

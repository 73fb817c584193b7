#!/usr/bin/env python
"""Measures the part of `adapterkit convert` that reads the written file back and compares it.

The conversions run as whole processes, in several rounds. The adapters have about 100 MB in bfloat16: a LoRA whose
scaling every format can store, a LoRA whose scaling many formats must fold into the factors, DoRA and LoHa. The base
consists of headers only.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

WIDTH, RANK, LAYERS, HEADS = 3200, 16, 120, 32
MODULES = [f"self_attn.{name}_proj" for name in "qkvo"]
UNET = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q")

INTO = {
    "lora": "adapterkit peft kohya olive onnx_adapter mlx nemo gguf litgpt torchtune loralib minlora tensorrt_llm "
    "tinker",
    "folded": "peft olive mlx nemo gguf litgpt torchtune loralib minlora tensorrt_llm tinker",
    "scaled": "olive tensorrt_llm",
    "dora": "adapterkit peft kohya onnx_adapter mlx",
    "loha": "adapterkit peft lycoris onnx_adapter",
}
"""Kind of adapter -> the formats that it is converted to."""

IMAGE = {"kohya", "lycoris"}
"""Formats for which the adapter is for a U-Net."""

INSIDE = """
import sys, time
from adapterkit.formats import _proof
real, taken = _proof.prove, [0.0, 0.0]
def prove(*arguments):
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        return real(*arguments)
    finally:
        taken[:] = [taken[0] + time.process_time() - cpu, taken[1] + time.perf_counter() - wall]
_proof.prove = prove
from adapterkit.cli import main
start, code = time.perf_counter(), 0
try:
    main()
except SystemExit as error:
    code = error.code or 0
print("TAKEN", *taken, time.process_time(), time.perf_counter() - start, file=sys.stderr)
sys.exit(code)
"""


@dataclass(frozen=True, slots=True)
class Taken:
    """Times of the proof and of the whole process: processor time and wall time."""

    proof_cpu: float
    proof_wall: float
    cpu: float
    wall: float


def names(image: bool) -> list[str]:
    """Paths of the modules."""
    if image:
        return [f"unet.down_blocks.{n // 40}.attentions.{n // 4 % 10}.transformer_blocks.{n % 4}.{x}"
                for n in range(LAYERS) for x in UNET]  # fmt: skip
    return [f"model.layers.{n}.{x}" for n in range(LAYERS) for x in MODULES]


def bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return normal random numbers in bfloat16, as bits."""
    return (rng.normal(size=shape).astype("f4").view("u4") >> 16).astype("u2")


def save(path: Path, shapes: dict[str, tuple[int, ...]], fill: np.random.Generator | None) -> None:
    """Write a safetensors file of bfloat16; without values, it takes no space on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values() if fill is not None else ():
            file.write(bfloat16(fill, shape).tobytes())
        file.truncate(8 + len(text) + end)


def inputs(work: Path, kind: str, image: bool) -> tuple[Path, Path]:
    """Write PEFT's folder and the base."""
    adapter, base = work / "peft", work / "base"
    adapter.mkdir(parents=True)
    base.mkdir()
    modules, rank = names(image), RANK // 2 if kind == "loha" else RANK
    save(base / "model.safetensors", {f"{name}.weight": (WIDTH, WIDTH) for name in modules}, None)
    ends = {"lora_A.weight": (rank, WIDTH), "lora_B.weight": (WIDTH, rank)}
    if kind == "dora":
        ends["lora_magnitude_vector"] = (WIDTH,)
    if kind == "loha":
        ends = {f"hada_w{n}_{x}": (WIDTH, rank) if x == "a" else (rank, WIDTH) for n in (1, 2) for x in "ab"}
    keys = {f"base_model.model.{name}.{end}": shape for name in modules for end, shape in ends.items()}
    save(adapter / "adapter_model.safetensors", keys, np.random.default_rng(0))
    config = {"peft_type": "LOHA" if kind == "loha" else "LORA", "r": rank, "target_modules": modules}
    if kind == "loha":
        config["alpha"] = rank
    else:
        config |= {"lora_alpha": 24 if kind == "scaled" else rank, "use_dora": kind == "dora"}
        if kind == "folded":
            # Give every other layer another scaling, so that formats with a single scaling must fold half of them.
            config["alpha_pattern"] = {r"layers\.\d*[13579]\.self_attn\.\w+_proj": 24}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    sizes = {
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
    }
    if not image:
        (base / "config.json").write_text(
            json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | sizes)
        )
    return adapter, base


def convert(adapter: Path, base: Path, out: Path, to: str) -> Taken:
    """Run one conversion in a separate process."""
    words = ["convert", str(adapter), str(out), "--to", to, "--base", str(base), "--on-loss", "fold"]
    run = subprocess.run([sys.executable, "-c", INSIDE, *words], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(words)}: {run.stderr}")
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("TAKEN")]
    return Taken(*map(float, line.split()[1:]))


def remove(path: Path) -> None:
    """Remove an output and the files beside it."""
    for each in path.parent.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def main() -> int:
    """Measure and print."""
    from adapterkit.formats import FORMATS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", nargs="+", choices=[*INTO], default=[*INTO])
    parser.add_argument("--to", nargs="+", metavar="FORMAT", help="only these formats")
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary folder)")
    chosen = parser.parse_args()
    if chosen.work is not None:
        chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        for kind in chosen.kind:
            formats = [name for name in INTO[kind].split() if not chosen.to or name in chosen.to]
            made: dict[bool, tuple[Path, Path]] = {}
            for name in formats:
                image = name in IMAGE
                if image not in made:
                    made[image] = inputs(Path(folder) / f"{kind}-{image}", kind, image)
                adapter, base = made[image]
                out = Path(folder) / "out" / (FORMATS[name].file or "out")
                out.parent.mkdir(exist_ok=True)
                runs = []
                for _ in range(chosen.rounds):
                    runs.append(convert(adapter, base, out, name))
                    remove(out)
                best = min(runs, key=lambda run: run.cpu)
                cpu, wall = (
                    statistics.median(getattr(r, f"proof_{x}") / getattr(r, x) for r in runs) for x in ("cpu", "wall")
                )
                print(
                    f"{kind:7} {name:13} proof {best.proof_cpu:5.2f} of {best.cpu:5.2f} s of a processor: {cpu:4.0%}; "
                    f"of the wall time {wall:4.0%}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())

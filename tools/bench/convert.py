#!/usr/bin/env python
"""An adapter of thousands of tensors from PEFT's format to kohya's and back, beside `cp` and `sync` of the same bytes.

Whole processes, one after another, several rounds; then a tenth of the adapter, whose peak of memory must be the same.
The adapter is a LoRA of 2,500 linear layers of an image model, bfloat16, 1 GB; the base is its headers alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from rig.process import Run, measure  # noqa: E402

WIDTH, RANK = 6400, 16
LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k")


def modules(count: int) -> list[str]:
    """Paths in an image model's words."""
    block = "unet.down_blocks.{}.attentions.{}.transformer_blocks.{}.{}"
    return [block.format(n // 500, n // 50 % 10, n // 5 % 10, LAYERS[n % 5]) for n in range(count)]


def write(path: Path, shapes: dict[str, tuple[int, int]], *, filled: bool) -> None:
    """A safetensors file of bfloat16; without values it takes no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = bytes(range(60)) * (2 * WIDTH * RANK // 60 + 1)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values() if filled else ():
            file.write(block[: 2 * shape[0] * shape[1]])
        file.truncate(8 + len(text) + end)


def inputs(work: Path, count: int) -> tuple[Path, Path]:
    """PEFT's folder and the base."""
    adapter, base = work / "peft", work / "base.safetensors"
    adapter.mkdir(parents=True)
    names = modules(count)
    write(base, {f"{name}.weight": (WIDTH, WIDTH) for name in names}, filled=False)
    ends = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    keys = {f"base_model.model.{name}.{end}.weight": shape for name in names for end, shape in ends.items()}
    write(adapter / "adapter_model.safetensors", keys, filled=True)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": sorted({n.split(".")[-1] for n in names}),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter, base


def there_and_back(work: Path, adapter: Path, base: Path) -> dict[str, Run]:
    """One round."""
    kohya, again, copy = work / "kohya.safetensors", work / "again", work / "copy"
    convert = [sys.executable, "-m", "adapterkit", "convert", "--base", str(base)]
    runs = {
        "cp and sync": ["sh", "-c", f"cp -r {adapter} {copy} && sync {copy}/*"],
        "PEFT to kohya": [*convert, str(adapter), str(kohya), "--to", "kohya"],
        "kohya to PEFT": [*convert, str(kohya), str(again), "--to", "peft"],
    }
    done = {name: measure(command, work / "log", {}) for name, command in runs.items()}
    file = "adapter_model.safetensors"
    if sorted(values(again / file)) != sorted(values(adapter / file)):
        raise SystemExit("what came back is not what went")
    kohya.unlink()
    shutil.rmtree(again)
    shutil.rmtree(copy)
    return done


def values(path: Path) -> list[str]:
    """The names, types and shapes of a file's tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return [f"{name} {entry['dtype']} {entry['shape']}" for name, entry in header.items() if name != "__metadata__"]


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modules", type=int, default=2500)
    parser.add_argument("--work", type=Path, help="where to write; a temporary folder if absent")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        for count in (chosen.modules, chosen.modules // 10):
            work = Path(folder) / str(count)
            adapter, base = inputs(work, count)
            os.sync()
            rounds = [there_and_back(work, adapter, base) for _ in range(chosen.rounds)]
            size = (adapter / "adapter_model.safetensors").stat().st_size
            print(f"{2 * count} tensors, {size / 1e9:.2f} GB, {chosen.rounds} rounds")
            for name in rounds[0]:
                seconds = [each[name].seconds for each in rounds]
                ratio = statistics.median(each[name].seconds / each["cp and sync"].seconds for each in rounds)
                peak, own = (max(getattr(each[name], what) for each in rounds) for what in ("peak", "anonymous"))
                middle = statistics.median(seconds)
                cpu = statistics.median(each[name].cpu for each in rounds)
                speed = f"{middle:6.2f} s ({cpu:5.2f} of a processor)  {ratio:5.2f} x cp"
                print(f"  {name:14} {speed}  peak {peak / 1e6:4.0f} MB, {own / 1e6:3.0f} of them not of files")
    return 0


if __name__ == "__main__":
    sys.exit(main())

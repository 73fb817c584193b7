"""Writes vectors of the formats for language models: files of real tools, and the weights that the tools merge.

    python tools/foreign/llm_vectors.py make TOOL...     writes spec/vectors/formats/TOOL/CASE
    python tools/foreign/llm_vectors.py check TOOL...    the tools load adapterkit's files, and merge the same

`expected.merged.safetensors` beside a tool's files has the weights that the tool merged.

Run it in an environment with mlx-lm, torchtune, litgpt, loralib, gguf, keras-hub and olive-ai, or with some of them, if
they conflict. Missing tools are listed and skipped.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from llm_tools import base as small
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
DEST = ROOT / "spec" / "vectors" / "formats"
BASES = ROOT / "spec" / "vectors" / "bases"
TOOLS = ("gguf", "keras_hub", "litgpt", "loralib", "mlx", "olive", "torchtune")
MERGED = "expected.merged.safetensors"


def main(verb: str, names: list[str]) -> int:
    """How many cases failed."""
    small.write(BASES / "llama")
    failed = 0
    for name in names or TOOLS:
        try:
            tool = import_module(f"llm_tools.{name}")
        except ImportError as error:
            print(f"{name}: not here ({error})")
            continue
        for case in tool.CASES:
            failed += (make if verb == "make" else check)(name, tool, case)
    return failed


def base_of(name: str, tool: Any) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """The base's folder and weights: the small Llama, but for tools that have layers of their own."""
    if not hasattr(tool, "own_base"):
        return BASES / "llama", small.read(BASES / "llama")
    folder = BASES / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = tool.own_base()
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, folder / "model.safetensors")
    return folder, weights


def make(name: str, tool: Any, case: str) -> int:
    """Writes one vector."""
    folder = DEST / name / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _, weights = base_of(name, tool)
    tool.write(folder, weights, case)
    merged = tool.merged(folder, weights)
    save_file({key: np.ascontiguousarray(value, "f4") for key, value in merged.items()}, folder / MERGED)
    print(f"{name}/{case}: {len(merged)} weights")
    return 0


def check(name: str, tool: Any, case: str) -> int:
    """A vector by way of the native format and back into the tool's own: it must fold it as before."""
    import adapterkit as ak

    if case in getattr(tool, "ONE_WAY", ()):
        return 0
    where, weights = base_of(name, tool)
    with tempfile.TemporaryDirectory() as temporary:
        native, out = Path(temporary, "native.safetensors"), Path(temporary, "out")
        out.mkdir()
        read = ak.read(DEST / name / case / tool.FILE, name, where)
        ak.write(read.replace(foreign=None), native)
        ak.write(ak.read(native), out / tool.FILE if tool.FILE else out, name, where, on_loss="fold")
        before, after = tool.merged(DEST / name / case, weights), tool.merged(out, weights)
    worst = max(float(np.abs(after[key] - value).max() / np.abs(value).max()) for key, value in before.items())
    wrong = before.keys() != after.keys() or not worst < 1e-6
    print(f"{name}/{case}: {'DIFFERS' if wrong else 'the same'}, {worst:.1e}")
    return int(wrong)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("make", "check"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))

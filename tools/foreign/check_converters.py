"""Compares changed graphs of converters with float64 formulas: `python tools/foreign/check_converters.py DIR`.

Needs onnxconverter-common and onnxslim in addition to the development environment. A small base is converted to float16
(completely, with 32-bit inputs and outputs, without some operators or nodes, or by measured precision), slimmed by
onnxslim, and optimized by a session of onnxruntime. LoRA, DoRA and IA3 are injected as constants and as slots, and
merged. DIR/converters.tsv has a row for each case: converter, method, mode, result, difference.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from check_runtimes import IDS, SHAPES, adapters, computed, graph, weights

import adapterkit as ak
from adapterkit.core.adapter import Adapter, Target
from adapterkit.errors import AdapterkitError
from adapterkit.io.lazy import from_numpy
from adapterkit.methods import METHODS

LIMIT, NARROW = 1e-5, 5e-3

MODES = ("constant", "slots", "merge")

Convert = Callable[[onnx.ModelProto, Path], onnx.ModelProto]


def by_common(**options: Any) -> Convert:
    """Convert to float16 by onnxconverter-common."""

    def convert(model: onnx.ModelProto, _: Path) -> onnx.ModelProto:
        from onnxconverter_common import float16

        return float16.convert_float_to_float16(model, **options)

    return convert


def by_onnxruntime(**options: Any) -> Convert:
    """Convert to float16 by onnxruntime's own converter."""

    def convert(model: onnx.ModelProto, _: Path) -> onnx.ModelProto:
        from onnxruntime.transformers import float16

        return float16.convert_float_to_float16(model, **options)

    return convert


def measured(model: onnx.ModelProto, _: Path) -> onnx.ModelProto:
    """Convert the nodes to float16 that keep within a measured error."""
    from onnxconverter_common import auto_mixed_precision

    options = {"rtol": 0.05, "atol": 0.01, "keep_io_types": True}
    return auto_mixed_precision.auto_convert_mixed_precision(model, {"ids": IDS}, **options)


def slimmed(**options: Any) -> Convert:
    """Simplify by onnxslim."""

    def convert(model: onnx.ModelProto, _: Path) -> onnx.ModelProto:
        import onnxslim

        return onnxslim.slim(model, **options)

    return convert


def optimized(level: str) -> Convert:
    """Save what a session of onnxruntime runs."""

    def convert(model: onnx.ModelProto, home: Path) -> onnx.ModelProto:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(home / "session.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(home / "session.onnx")

    return convert


CONVERTERS: dict[str, Convert] = {
    "as it is": lambda model, _: model,
    "onnxconverter-common": by_common(),
    "onnxconverter-common keep_io_types": by_common(keep_io_types=True),
    "onnxconverter-common op_block_list": by_common(keep_io_types=True, op_block_list=["Conv"]),
    "onnxconverter-common node_block_list": by_common(keep_io_types=True, node_block_list=["/up/MatMul"]),
    "onnxconverter-common measured": measured,
    "onnxruntime float16": by_onnxruntime(),
    "onnxruntime float16 keep_io_types": by_onnxruntime(keep_io_types=True),
    "onnxslim": slimmed(),
    "onnxslim fp16": slimmed(dtype="fp16"),
    "session basic": optimized("ORT_ENABLE_BASIC"),
    "session extended": optimized("ORT_ENABLE_EXTENDED"),
}


def dora() -> tuple[Adapter, np.ndarray[Any, Any]]:
    """Return a DoRA at all layers, and the output that it should give."""
    rng, held, updates = np.random.default_rng(9), weights(), dict[Target, Any]()
    for at, (out, *into) in SHAPES.items():
        A, B = rng.normal(size=(3, *into)).astype("f4") / 4, rng.normal(size=(out, 3)).astype("f4") / 4
        magnitude = rng.uniform(0.5, 1.5, out).astype("f4")
        V = held[at] + 2.0 * np.tensordot(B.astype("f8"), A.astype("f8"), 1)
        held[at] = V * (magnitude / np.linalg.norm(V.reshape(out, -1), axis=1)).reshape(-1, *[1] * len(into))
        leaves = {"A": from_numpy(A), "B": from_numpy(B), "magnitude": from_numpy(magnitude)}
        updates[Target(at)] = (METHODS["dora"](**leaves, scaling=2.0),)
    return Adapter(updates), computed(held)


def ran(path: Path, feeds: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the output of a graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    output: np.ndarray[Any, Any] = session.run(None, feeds)[0].astype("f8")
    return output


def changed(path: Path, adapter: Adapter, mode: str, out: Path) -> np.ndarray[Any, Any]:
    """Change a graph, and return its output."""
    if mode == "merge":
        ak.onnx.merge(path, adapter, out)
        return ran(out, {"ids": IDS})
    ak.onnx.inject(path, adapter, out, mode=mode)
    return ran(out, {"ids": IDS, **(ak.onnx.fit(out, adapter) if mode == "slots" else {})})


def main() -> int:
    """Run the command line; 1 if a case is wrong, or a right graph is refused by the check."""
    home = Path(sys.argv[1])
    home.mkdir(parents=True, exist_ok=True)
    graph(home / "base.onnx")
    base = computed(weights())
    known = {method: [*cases.values()][-1] for method, cases in adapters().items()} | {"dora": dora()}
    rows, wrong = ["converter\tmethod\tmode\tresult\tdifference"], 0
    for name, convert in CONVERTERS.items():
        path = home / "converted.onnx"
        with contextlib.redirect_stdout(io.StringIO()):
            onnx.save(convert(onnx.load(home / "base.onnx"), home), path)
        narrow = float(abs(ran(path, {"ids": IDS}) - base).max() / abs(base).max()) > LIMIT
        for method, (adapter, wanted) in known.items():
            for mode in MODES:
                try:
                    got = changed(path, adapter, mode, home / "out.onnx")
                except AdapterkitError as error:
                    alarm = error.code == "check-failed"
                    wrong += alarm
                    said = "false alarm" if alarm else "refused"
                    rows.append(f"{name}\t{method}\t{mode}\t{said}: {error}\t")
                    continue
                difference = float(abs(got - wanted).max() / abs(wanted).max())
                right = difference <= (NARROW if narrow else LIMIT)
                wrong += not right
                rows.append(f"{name}\t{method}\t{mode}\t{'right' if right else 'wrong'}\t{difference:.2g}")
    (home / "converters.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print("\n".join(rows))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

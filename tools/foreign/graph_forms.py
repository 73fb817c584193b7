"""Forms in which graphs are deployed: exported by torch; then slimmed, narrowed, quantized or optimized by others."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

Form = Callable[[Path, Path, Mapping[str, Any]], None]
"""Reads a graph, writes another; knows inputs to run it on."""


def exported(model: nn.Module, inputs: Mapping[str, torch.Tensor], path: Path, dynamo: bool) -> None:
    """Export a model by torch, by the newer exporter or the older one."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(
                model, tuple(inputs.values()), path, dynamo=True, external_data=False, input_names=list(inputs)
            )
            return
        axes = {name: {0: "batch", 1: "length"} for name, value in inputs.items() if value.ndim == 2}
        torch.onnx.export(
            model, tuple(inputs.values()), path, dynamo=False, input_names=list(inputs), opset_version=17,
            dynamic_axes=axes,
        )  # fmt: skip


class _Once:
    """Hands one set of inputs to a calibration."""

    def __init__(self, feeds: Mapping[str, Any]) -> None:
        self.left = [dict(feeds)]

    def get_next(self) -> dict[str, Any] | None:
        return self.left.pop() if self.left else None

    def rewind(self) -> None:
        self.left = []


def _slimmed(source: Path, out: Path, _: Mapping[str, Any]) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)


def _simplified(source: Path, out: Path, _: Mapping[str, Any]) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], out)


def _float16(**options: Any) -> Form:
    def convert(source: Path, out: Path, _: Mapping[str, Any]) -> None:
        from onnxruntime.transformers import float16

        onnx.save(float16.convert_float_to_float16(onnx.load(source), **options), out)

    return convert


def _dynamic(**options: Any) -> Form:
    def convert(source: Path, out: Path, _: Mapping[str, Any]) -> None:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = onnx.load(source)
        # The quantizer transposes weights and keeps the shapes that torch's exporter recorded, and then refuses them.
        del model.graph.value_info[:]
        quantize_dynamic(model, out, weight_type=QuantType.QInt8, **options)

    return convert


def _static(form: str, **options: Any) -> Form:
    def convert(source: Path, out: Path, feeds: Mapping[str, Any]) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        quantize_static(
            source, out, _Once(feeds), quant_format=getattr(QuantFormat, form), weight_type=QuantType.QInt8, **options
        )

    return convert


def _bits(make: Callable[[Any, Any], dict[str, Any]]) -> Form:
    def convert(source: Path, out: Path, _: Mapping[str, Any]) -> None:
        from onnxruntime.quantization import matmul_nbits_quantizer as tool
        from onnxruntime.quantization import quant_utils

        working = tool.MatMulNBitsQuantizer(onnx.load(source), **make(tool, quant_utils.QuantFormat))
        working.process()
        onnx.save(working.model.model, out)

    return convert


def _rtn(bits: int, symmetric: bool, form: str = "QOperator") -> Form:
    return _bits(
        lambda _, formats: {
            "bits": bits, "block_size": 32, "is_symmetric": symmetric, "quant_format": getattr(formats, form),
        }
    )  # fmt: skip


def _kquant(tool: Any, _: Any) -> dict[str, Any]:
    return {"algo_config": tool.KQuantWeightOnlyQuantConfig()}


def _hqq(tool: Any, _: Any) -> dict[str, Any]:
    return {"algo_config": tool.HQQWeightOnlyQuantConfig(block_size=32, bits=4)}


def _session(level: str) -> Form:
    def convert(source: Path, out: Path, _: Mapping[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = str(out)
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])

    return convert


def _fused(source: Path, out: Path, _: Mapping[str, Any]) -> None:
    from onnxruntime.transformers import optimizer

    kind = "bert" if "BERT" in source.parent.name.upper() else "vit"
    optimizer.optimize_model(str(source), model_type=kind, num_heads=4, hidden_size=64).save_model_to_file(str(out))


FORMS: dict[str, Form] = {
    "torch": lambda source, out, _: out.write_bytes(source.read_bytes()) and None,
    "onnxslim": _slimmed,
    "onnxsim": _simplified,
    "float16": _float16(),
    "float16 io 32": _float16(keep_io_types=True),
    "dynamic int8": _dynamic(),
    "dynamic int8 by channel": _dynamic(per_channel=True),
    "static QDQ": _static("QDQ"),
    "static QDQ by channel": _static("QDQ", per_channel=True),
    "static QOperator": _static("QOperator"),
    "4 bits": _rtn(4, True),
    "4 bits, zeros": _rtn(4, False),
    "4 bits QDQ": _rtn(4, True, "QDQ"),
    "8 bits": _rtn(8, True),
    "8 bits, zeros": _rtn(8, False),
    "k-quant": _bits(_kquant),
    "HQQ": _bits(_hqq),
    "session basic": _session("ORT_ENABLE_BASIC"),
    "session extended": _session("ORT_ENABLE_EXTENDED"),
    "session all": _session("ORT_ENABLE_ALL"),
    "session of 4 bits": lambda source, out, feeds: _after(
        _rtn(4, True), _session("ORT_ENABLE_ALL"), source, out, feeds
    ),
    "session of static QDQ": lambda source, out, feeds: _after(
        _static("QDQ"), _session("ORT_ENABLE_EXTENDED"), source, out, feeds
    ),
    "session all of static QDQ": lambda source, out, feeds: _after(
        _static("QDQ"), _session("ORT_ENABLE_ALL"), source, out, feeds
    ),
    "session of dynamic int8": lambda source, out, feeds: _after(
        _dynamic(), _session("ORT_ENABLE_EXTENDED"), source, out, feeds
    ),
    "transformers optimizer": _fused,
}
"""Name of a form -> what writes it."""


def _after(first: Form, second: Form, source: Path, out: Path, feeds: Mapping[str, Any]) -> None:
    between = out.with_name("between.onnx")
    first(source, between, feeds)
    second(between, out, feeds)


def ran(path: Path, feeds: Mapping[str, Any], adapter: Path | None = None) -> Any:
    """Return the first output of a graph, with an adapter file in its slots if one is given; float64."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = {one.name: one.type for one in session.get_inputs()}
    given = {
        name: value.astype(np.float16) if kinds[name] == "tensor(float16)" else value for name, value in feeds.items()
    }
    run = onnxruntime.RunOptions()
    if adapter is not None:
        held = onnxruntime.LoraAdapter()  # Stays alive until the run ends, which reads it.
        held.Load(str(adapter))
        run.add_active_adapter(held)
    return np.asarray(session.run(None, given, run)[0]).astype("f8")

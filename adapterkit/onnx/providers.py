"""What onnxruntime really runs on: it lists providers that it was built with, and takes another without a word."""

from __future__ import annotations

import os
import shutil
from functools import cache
from importlib import import_module
from typing import Any

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

OF_NVIDIA = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
"""Providers whose libraries need a driver; without one onnxruntime would load them, and print what it lacks."""

EXACT = {CUDA: {"use_tf32": "0"}}
"""Options of providers under which float32 is float32."""


@cache
def best_provider() -> str:
    """CUDA where a session really starts on it, else the CPU."""
    return CUDA if runs_on(CUDA) else CPU


@cache
def runs_on(provider: str) -> bool:
    """Whether a session of one node starts on a provider and stays there."""
    onnxruntime: Any = import_module("onnxruntime")
    if provider not in onnxruntime.get_available_providers():
        return False
    if provider in OF_NVIDIA and not _has_driver():
        return False
    if provider in OF_NVIDIA and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(_one_node(), quiet_options(), providers=[provider])
    except Exception:  # onnxruntime's errors have no common class but this.
        return False
    return bool(session.get_providers()[0] == provider)


def with_options(provider: str) -> list[Any]:
    """A provider as a check asks for it, and the CPU behind it for what it has no kernel for."""
    first = (provider, EXACT[provider]) if provider in EXACT else provider
    return [first] if provider == CPU else [first, CPU]


def quiet_options() -> Any:
    """Options of a session that says nothing."""
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def session_of(model: bytes | str, optimized: bool = True) -> Any:
    """A quiet onnxruntime session on the best provider.

    Args:
        model: the bytes of a model, or its path.
        optimized: whether onnxruntime may fuse nodes.
    """
    onnxruntime: Any = import_module("onnxruntime")
    options = quiet_options()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=with_options(best_provider()))


def _has_driver() -> bool:
    return os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi") is not None


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "one", [x], [y])
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8
    ).SerializeToString()
    return model

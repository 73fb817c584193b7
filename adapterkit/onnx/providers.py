"""Find an execution provider that works.

onnxruntime's list of available providers may include providers that do not work on this computer. A session with such
a provider may run on the CPU without an error.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .building import Array

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

OF_NVIDIA = (CUDA, "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
"""Providers that need NVIDIA's driver. Without the driver, onnxruntime prints errors when it loads the libraries of
these providers."""

WORDS = {
    "cpu": CPU, "cuda": CUDA, "tensorrt": "TensorrtExecutionProvider", "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider", "directml": "DmlExecutionProvider", "dml": "DmlExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider", "qnn": "QNNExecutionProvider", "webgpu": "WebGpuExecutionProvider",
}  # fmt: skip
"""A map from short names of providers to onnxruntime's names."""

EXACT = {CUDA: {"use_tf32": "0"}}
"""A map from a provider to the options that make it compute in full float32 precision. By default, CUDA may round
float32 inputs to TF32."""


class OrtInput(Protocol):
    """An input or output of a session.

    Attributes:
        name: its name in the graph.
        type: the element type, such as `tensor(float)`.
        shape: the size of each axis. For a dynamic axis, this is the axis's name, or None if the axis has no name.
    """

    name: str
    type: str
    shape: Sequence[int | str | None]


class OrtValue(Protocol):
    """A tensor of onnxruntime."""

    _ortvalue: object

    def data_type(self) -> str: ...

    def numpy(self) -> Array: ...


class OrtBinding(Protocol):
    """onnxruntime's `IOBinding`, which assigns memory to the named inputs and outputs of a run."""

    def bind_cpu_input(self, name: str, arr_on_cpu: Array) -> None: ...

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: object, shape: Sequence[int], buffer_ptr: int
    ) -> None: ...

    def bind_ortvalue_input(self, name: str, ortvalue: OrtValue) -> None: ...

    def synchronize_inputs(self) -> None: ...

    def bind_output(
        self, name: str, device_type: str = "cpu", device_id: int = 0, element_type: object = None,
        shape: Sequence[int] | None = None, buffer_ptr: int | None = None,
    ) -> None: ...  # fmt: skip

    def bind_ortvalue_output(self, name: str, ortvalue: OrtValue) -> None: ...

    def synchronize_outputs(self) -> None: ...

    def get_outputs(self) -> Sequence[OrtValue]: ...

    def copy_outputs_to_cpu(self) -> list[Array]: ...

    def clear_binding_inputs(self) -> None: ...

    def clear_binding_outputs(self) -> None: ...


class ModelMetadata(Protocol):
    """The metadata of a session's model."""

    custom_metadata_map: Mapping[str, str]


class OrtSession(Protocol):
    """The methods of onnxruntime's `InferenceSession` that this package uses; onnxruntime has no type hints."""

    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Array]) -> list[Array]: ...

    def run_with_ort_values(
        self, output_names: Sequence[str], input_dict_ort_values: Mapping[str, OrtValue]
    ) -> list[OrtValue]: ...

    def run_with_iobinding(self, iobinding: OrtBinding) -> None: ...

    def io_binding(self) -> OrtBinding: ...

    def get_inputs(self) -> list[OrtInput]: ...

    def get_overridable_initializers(self) -> list[OrtInput]: ...

    def get_outputs(self) -> list[OrtInput]: ...

    def get_providers(self) -> list[str]: ...

    def get_modelmeta(self) -> ModelMetadata: ...


def named(provider: str) -> str:
    """Return onnxruntime's name for a provider. Short names such as `openvino` are translated; others are unchanged."""
    return WORDS.get(provider.lower(), provider)


@cache
def best_provider() -> str:
    """Return CUDA if a session starts on it, otherwise the CPU."""
    return CUDA if runs_on(CUDA) else CPU


@cache
def runs_on(provider: str) -> bool:
    """Whether a session can use a provider. This is tested by starting a session with a graph of one node."""
    onnxruntime: Any = import_module("onnxruntime")
    if provider not in onnxruntime.get_available_providers():
        return False
    if provider in OF_NVIDIA and not _has_driver():
        return False
    if provider in OF_NVIDIA and hasattr(onnxruntime, "preload_dlls"):
        # Load the CUDA libraries from pip's nvidia packages, because the system's loader does not find them there.
        onnxruntime.preload_dlls()
    try:
        session = onnxruntime.InferenceSession(_one_node(), quiet_options(), providers=[provider])
    except Exception:  # onnxruntime's errors have no common base class.
        return False
    # Check which provider the session uses, because onnxruntime may fall back to the CPU without an error.
    return bool(session.get_providers()[0] == provider)


def with_options(provider: str) -> list[object]:
    """Return the `providers` argument of a session: the provider with its options, then the CPU.

    onnxruntime runs an operator on the CPU if the provider has no kernel for it.
    """
    first = (provider, EXACT[provider]) if provider in EXACT else provider
    return [first] if provider == CPU else [first, CPU]


def quiet_options() -> object:
    """Return session options with which onnxruntime prints only fatal errors."""
    onnxruntime: Any = import_module("onnxruntime")
    options: Any = onnxruntime.SessionOptions()
    # 4 means fatal. onnxruntime's C++ code prints its messages to stderr, so Python's logging cannot filter them.
    options.log_severity_level = 4
    quiet: object = options
    return quiet


def session_of(model: bytes | str, optimized: bool = True) -> OrtSession:
    """Start a quiet onnxruntime session on the best provider.

    Args:
        model: the bytes of an ONNX model, or the path of its file.
        optimized: False to turn off onnxruntime's graph optimizations, such as fusing nodes.
    """
    onnxruntime: Any = import_module("onnxruntime")
    options: Any = quiet_options()
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session: OrtSession = onnxruntime.InferenceSession(model, options, providers=with_options(best_provider()))
    return session


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

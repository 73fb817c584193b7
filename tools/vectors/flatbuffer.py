"""onnxruntime's adapters by the flatbuffers library. Layout: onnxruntime/lora/adapter_format/adapter_schema.fbs."""

from __future__ import annotations

from typing import Any

from container import Stored

_TYPES = {"F32": 1, "I64": 7, "F16": 10, "F64": 11}


def onnx_adapter(tensors: dict[str, Stored]) -> bytes:
    """A file of version 1, its own versions 3 and 7."""
    import flatbuffers

    builder: Any = flatbuffers.Builder(0)
    tables = [_parameter(builder, name, tensor) for name, tensor in tensors.items()]
    builder.StartVector(4, len(tables), 4)
    for table in reversed(tables):
        builder.PrependUOffsetTRelative(table)
    parameters = builder.EndVector()
    builder.StartObject(4)
    for slot, number in enumerate((1, 3, 7)):
        builder.PrependInt32Slot(slot, number, 0)
    builder.PrependUOffsetTRelativeSlot(3, parameters, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"TORT")
    return bytes(builder.Output())


def _parameter(builder: Any, name: str, tensor: Stored) -> int:
    text = builder.CreateString(name)
    builder.StartVector(8, len(tensor.shape), 8)
    for size in reversed(tensor.shape):
        builder.PrependInt64(size)
    dims = builder.EndVector()
    builder.StartVector(1, len(tensor.data), 8)
    for byte in reversed(tensor.data):
        builder.PrependByte(byte)
    data = builder.EndVector()
    builder.StartObject(4)
    builder.PrependUOffsetTRelativeSlot(0, text, 0)
    builder.PrependUOffsetTRelativeSlot(1, dims, 0)
    builder.PrependInt32Slot(2, _TYPES[tensor.dtype], 0)
    builder.PrependUOffsetTRelativeSlot(3, data, 0)
    return int(builder.EndObject())

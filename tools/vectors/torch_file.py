"""torch files byte by byte, for vectors: the archive and the pickle in it, with no code of torch's or adapterkit's.

Format: torch/serialization.py (`_save`): an archive, not compressed, of data.pkl, data/<n>, byteorder and version.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import Any

from container import Stored

_STORAGES = {"F16": "HalfStorage", "F32": "FloatStorage", "F64": "DoubleStorage", "I64": "LongStorage"}
_SIZES = {"F16": 2, "F32": 4, "F64": 8, "I64": 8}


def torch_file(value: dict[str, Any]) -> bytes:
    """What `torch.save` makes of dicts of tensors and plain values."""
    storages: list[bytes] = []
    pickle = b"\x80\x02" + _pickled(value, storages) + b"."
    members = {"data.pkl": pickle, "byteorder": b"little"}
    members |= {f"data/{number}": data for number, data in enumerate(storages)} | {"version": b"3\n"}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
    return file.getvalue()


def _pickled(value: Any, storages: list[bytes]) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_text(key) + _pickled(inner, storages) for key, inner in value.items()) + b"u"
    if isinstance(value, Stored):
        return _tensor(value, storages)
    if isinstance(value, str):
        return _text(value)
    return b"N" if value is None else _whole(value)


def _tensor(tensor: Stored, storages: list[bytes]) -> bytes:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
    count = len(tensor.data) // _SIZES[tensor.dtype]
    storages.append(tensor.data)
    storage = b"(" + _text("storage") + _global("torch", _STORAGES[tensor.dtype]) + _text(str(len(storages) - 1))
    storage += _text("cpu") + _whole(count) + b"tQ"
    strides = [1]
    for size in tensor.shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    sizes, steps = (b"(" + b"".join(map(_whole, each)) + b"t" for each in (tensor.shape, strides[: len(tensor.shape)]))
    hooks = _global("collections", "OrderedDict") + b")R"
    rebuild = _global("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + storage + _whole(0) + sizes + steps + b"\x89" + hooks + b"tR"


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _whole(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _global(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()

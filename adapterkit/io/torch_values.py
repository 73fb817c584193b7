"""The values that a state dict's pickle may contain, all inert, and the few calls that create them, all defined here.

Format: torch/_utils.py (`_rebuild_*`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from operator import mul
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, Unsupported
from .dtypes import BY_TORCH, DTYPES, DType

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lazy import Shape

_DIMENSIONS = 32
"""Most axes of a numpy 1 array."""
_CONVERT = "Convert the file to safetensors with the tool that wrote it, if you trust it"
_DAMAGED = "The file is damaged, cut short or not what it claims to be; fetch it again or convert it to safetensors"
ALONE = "Save the state dict alone: a dict of names to tensors, with no other entries"


def damaged(why: str, where: str | None = None) -> Malformed:
    """Return the error for a file that breaks the rules of its container."""
    return Malformed(why, where=where, cure=_DAMAGED)


def refused(why: str, where: str | None = None) -> Unsupported:
    """Return the error for a file that uses more than a state dict needs."""
    return Unsupported(why, where=where, cure=_CONVERT)


def short(text: str) -> str:
    """Shorten text from a file, and escape it, to fit one line of a message."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


def kind_of(value: object) -> str:
    """Return the type of a value in words, for a message."""
    return {View: "tensor", Storage: "storage", Global: "global"}.get(type(value), type(value).__name__)


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a global in torch, `module name`. It is never resolved to the object."""

    name: str


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of elements in the file, with its key in the container."""

    key: str
    dtype: DType
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def where(self) -> str:
        return f"storage {short(self.key)}"


@dataclass(frozen=True, slots=True)
class View:
    """A strided tensor: element [i, j, ...] is number `offset + i * stride[0] + j * stride[1] + ...` of its storage."""

    storage: Storage
    dtype: DType
    offset: int
    shape: Shape
    stride: Shape

    @property
    def extent(self) -> int:
        """The number of elements from the first to the last, inclusive."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if all(self.shape) else 0

    @property
    def contiguous(self) -> bool:
        dense = [*accumulate(self.shape[:0:-1], mul, initial=1)][::-1]
        return not all(self.shape) or all(
            n == 1 or s == d for n, s, d in zip(self.shape, self.stride, dense[: len(self.shape)], strict=True)
        )


_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat")
_NAMES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "C64")
STORAGE_TYPES = {
    f"{module} {kind}Storage": DTYPES[name]
    for module in ("torch", "torch.cuda")
    for kind, name in zip(_KINDS, _NAMES, strict=True)
} | {"torch.storage UntypedStorage": DTYPES["U8"], "torch UntypedStorage": DTYPES["U8"]}
_DTYPES = {f"torch {name}": dtype for name, dtype in BY_TORCH.items()}


def counts(value: object) -> bool:
    """Whether a value is a tuple of sizes, of at most as many axes as a tensor can have."""
    return (
        type(value) is tuple and len(value) <= _DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, hooks: Any = None, metadata: Any = None
) -> View:
    """`_rebuild_tensor` and `_rebuild_tensor_v2`."""
    if hooks or metadata:
        raise refused("a tensor with hooks, or a conjugate or negative view")
    if type(storage) is not Storage or not (counts((offset,)) and counts(shape) and counts(stride)):
        raise damaged(f"a tensor without storage, or with sizes that are not up to {_DIMENSIONS} counts")
    return _inside(View(storage, storage.dtype, offset, shape, stride))


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> View:
    if type(dtype) is not Global or dtype.name not in _DTYPES or type(storage) is not Storage:
        raise damaged("a tensor without storage or dtype")
    bare = Storage(storage.key, DTYPES["U8"], storage.nbytes)
    element = _DTYPES[dtype.name]
    return _inside(replace(_tensor(bare, offset, shape, stride, grad, hooks, metadata), dtype=element))


def _inside(view: View) -> View:
    shape, stride, itemsize = list(view.shape), list(view.stride), view.dtype.itemsize
    # `n or 1` also limits the other axes of an empty tensor: numpy computes sizes in 64 bits.
    if len(shape) != len(stride) or prod(n or 1 for n in shape) * itemsize >= 1 << 63:
        raise damaged(f"no tensor has shape {shape}, strides {stride}", view.storage.where)
    if view.extent and (view.offset + view.extent) * itemsize > view.storage.nbytes:
        why = f"a view of shape {shape}, strides {stride}, offset {view.offset} leaves {view.storage.nbytes} bytes"
        raise damaged(why, view.storage.where)
    return view


def _parameter(data: Any, _grad: Any, hooks: Any) -> View:
    if hooks or type(data) is not View:
        raise damaged("a parameter that is not a tensor, or has hooks")
    return data


def _ordered() -> dict[str, Any]:
    return {}


def _set(items: Any = ()) -> object:
    """Return a set as a list, so that nothing is hashed. DeepSpeed saves a set of module names beside the weights."""
    if type(items) is not list and items != ():
        raise damaged("a set that is not made from a list")
    return list(items)


CALLS: dict[str, Callable[..., object]] = {
    "__builtin__ set": _set,
    "builtins set": _set,
    "collections OrderedDict": _ordered,
    "torch Size": lambda shape: shape,
    "torch._utils _rebuild_parameter": _parameter,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_v3,
}
"""The functions that REDUCE may call. All are defined here, and none runs anything from its arguments."""
KNOWN = {*CALLS, *STORAGE_TYPES, *_DTYPES}

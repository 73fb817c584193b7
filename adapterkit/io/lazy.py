"""Lazy tensors, whose shape and dtype are known before their bytes are read; element types; checks for NaN."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, cast

from ..errors import Corrupt, Malformed, ShapeMismatch, Unsupported, UsageError, storage_error
from .inputs import open_input

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]
    """A numpy array of any shape and dtype."""


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the safetensors name, e.g. `BF16`.
        itemsize: bytes per element.
        numpy: the little-endian numpy dtype of the stored bits; an unsigned integer dtype if numpy lacks the type.
        torch: the name of the dtype in `torch`.
        floating: whether the type is floating-point or complex. Arithmetic and casts make sense only for such types.
    """

    name: str
    itemsize: int
    numpy: str
    torch: str
    floating: bool

    def __str__(self) -> str:
        return self.name

    @property
    def array(self) -> np.dtype[Any]:
        """The numpy dtype for arithmetic, from ml_dtypes if numpy lacks the type."""
        import numpy as np

        if self.floating and self.numpy[1] == "u":
            import ml_dtypes

            return np.dtype(getattr(ml_dtypes, self.torch))  # type: ignore[no-any-return]
        return np.dtype(self.numpy)


DTYPES = {
    d.name: d
    for d in (
        DType("BOOL", 1, "|b1", "bool", False),
        DType("U8", 1, "|u1", "uint8", False),
        DType("I8", 1, "|i1", "int8", False),
        DType("F8_E5M2", 1, "|u1", "float8_e5m2", True),
        DType("F8_E4M3", 1, "|u1", "float8_e4m3fn", True),
        DType("F8_E8M0", 1, "|u1", "float8_e8m0fnu", True),
        DType("F8_E4M3FNUZ", 1, "|u1", "float8_e4m3fnuz", True),
        DType("F8_E5M2FNUZ", 1, "|u1", "float8_e5m2fnuz", True),
        DType("I16", 2, "<i2", "int16", False),
        DType("U16", 2, "<u2", "uint16", False),
        DType("F16", 2, "<f2", "float16", True),
        DType("BF16", 2, "<u2", "bfloat16", True),
        DType("I32", 4, "<i4", "int32", False),
        DType("U32", 4, "<u4", "uint32", False),
        DType("F32", 4, "<f4", "float32", True),
        DType("C64", 8, "<c8", "complex64", True),
        DType("F64", 8, "<f8", "float64", True),
        DType("I64", 8, "<i8", "int64", False),
        DType("U64", 8, "<u8", "uint64", False),
    )
}
"""A map from safetensors names to `DType`, in the order in which the safetensors library sorts dtypes."""

BY_TORCH = {d.torch: d for d in DTYPES.values()}
"""A map from names of torch dtypes (`bfloat16`) to `DType`."""

_SHORT = {"fp16": "F16", "half": "F16", "bf16": "BF16", "fp32": "F32", "float": "F32", "fp64": "F64", "double": "F64"}
"""A map from other common names of element types to safetensors names."""


def dtype_named(name: str) -> DType | None:
    """Return the element type for a name such as `BF16`, `bfloat16`, `torch.bfloat16` or `bf16`; None if unknown."""
    word = str(name).strip().lower().removeprefix("torch.")  # The text of a `torch.dtype` is its name.
    return DTYPES.get(word.upper()) or BY_TORCH.get(word) or DTYPES.get(_SHORT.get(word, ""))


# Lazy tensors know their shape and dtype, and read their bytes at each access. They have no cache and no operators.
#
# A leaf of an adapter is a `Lazy` or a `torch.Tensor`. Code that needs only shapes, or only moves bytes, works on
# `Lazy` and does not import torch.


Buffer = bytes | bytearray | memoryview
Shape = tuple[int, ...]


class Span(NamedTuple):
    """The location of a tensor's data in a file. The data is in C order and little-endian.

    This is a tuple and not a frozen dataclass, because adapters of mixture-of-experts models have 10^5 spans. A tuple
    is created in a third of the time, and the garbage collector does not track it.
    """

    path: str
    offset: int
    nbytes: int


ELSEWHERE: dict[str, Callable[[Span], bytearray]] = {}
"""Local sparse files whose data is elsewhere, such as on a hub: path -> function that fetches the bytes of a span."""


@contextmanager
def files_kept_open() -> Iterator[None]:
    """Keep files open in the block, for this thread, so that `read_span` need not open a file for each span.

    Opening and checking a file takes 20 us. Reading 50 kB takes the same time. An adapter of 45,000 targets has 135,000
    spans. The files are closed at the end of the block, so a file that is replaced later is opened again.
    """
    if _OPEN.get() is not None:
        yield
        return
    files: dict[str, io.FileIO] = {}
    token, kept = _OPEN.set(files), _KEPT.set({})
    try:
        yield
    finally:
        _OPEN.reset(token)
        _KEPT.reset(kept)
        for file in files.values():
            file.close()


_OPEN: ContextVar[dict[str, io.FileIO] | None] = ContextVar("_OPEN", default=None)

_KEPT: ContextVar[dict[Lazy, Buffer] | None] = ContextVar("_KEPT", default=None)

MOST_KEPT = 3
"""The largest number of tensors that `fetch_once` caches. It caches tensors such as the scales of a packed weight,
which are needed to read any rows of the weight."""

MOST_OPEN = 16
"""The largest number of files that stay open.

A base can have hundreds of files, and a deleted file still takes disk space while it is open.
"""


def read_span(span: Span) -> bytearray:
    """Read the bytes of a span. Each call opens and closes the file, except inside `files_kept_open`.

    Raises:
        StorageError: the file cannot be read.
        Corrupt: the file has become shorter since its header was read.
    """
    if span.path in ELSEWHERE:
        return ELSEWHERE[span.path](span)
    data = bytearray(span.nbytes)
    files = _OPEN.get()
    try:
        if files is None:
            with cast(io.FileIO, open_input(span.path, buffering=0)) as file:
                done = _read_into(data, file, span.offset)
        else:
            done = _read_into(data, _opened(span.path, files), span.offset)
    except OSError as error:
        raise storage_error(error, span.path) from error
    if done < span.nbytes:
        why = f"the file has become shorter: it has only {done} of the {span.nbytes} bytes of this tensor"
        raise Corrupt(why, path=span.path, where=f"byte {span.offset}", cure="Read the file again: it has changed")
    return data


def fetch_once(tensor: Lazy) -> Buffer:
    """Return the bytes of a tensor. Inside `files_kept_open`, cache the last `MOST_KEPT` tensors.

    Tensors that are neither in a file nor computed in parts are not cached, because their bytes are in memory.
    """
    kept = _KEPT.get()
    if kept is None or (tensor.span is None and tensor.part is None):
        return tensor.fetch()
    data = kept.pop(tensor, None)
    if data is None:
        while len(kept) >= MOST_KEPT:
            del kept[next(iter(kept))]
        data = tensor.fetch()
    kept[tensor] = data
    return data


def _opened(path: str, files: dict[str, io.FileIO]) -> io.FileIO:
    """Return the open file for a path. If too many files are open, close the one that was opened first."""
    file = files.get(path)
    if file is None:
        if len(files) >= MOST_OPEN:
            files.pop(next(iter(files))).close()
        file = files[path] = cast(io.FileIO, open_input(path, buffering=0))
    return file


def _read_into(data: bytearray, file: io.FileIO, offset: int) -> int:
    """Read bytes from an offset of a file into `data`; return the number of bytes read."""
    # An unbuffered read may return fewer bytes than requested (on Linux at most 2 GB), and 0 at the end of the file.
    file.seek(offset)
    done = file.readinto(data)
    # One call is usually enough. The loop is needed only after a short read.
    if done < len(data):
        view = memoryview(data)
        while done < len(data) and (count := file.readinto(view[done:])):
            done += count
    return done


class NotComputed(Exception):
    """Raised when code reads a placeholder: a tensor with a shape and a dtype, but without values."""


class DoesNotFit(ShapeMismatch, ValueError):
    """Raised if a tensor cannot have a requested shape, or if a requested slice is out of range.

    This error is also a ValueError, which numpy raises if it cannot reshape an array. So a caller needs only one
    `except` for both. If no caller catches the error, the user sees a typed error of adapterkit.
    """


TAKE_OUT = "Remove the target of this tensor from the adapter: the tensor's shape fits no layer of the format"


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """A tensor whose bytes are read at each access.

    Attributes:
        shape: its dimensions.
        dtype: its element type.
        source: a function that returns the bytes in C order, little-endian; None to read the bytes from `span`.
        span: the location of the bytes, if they are one run in one file. A writer can copy such a run in the kernel.
        part: a function `part(first, count)` that returns the bytes of `count` elements from element `first`. None if
            such a function would not be faster than `source`.
    """

    shape: Shape
    dtype: DType
    source: Callable[[], Buffer] | None
    span: Span | None = None
    part: Callable[[int, int], Buffer] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Python cannot pickle functions that are defined inside functions, so the bytes themselves are pickled.
        functions = [getattr(f, "func", f) for f in (self.source, self.part)]  # `partial` has its function as `func`.
        if not any("<locals>" in getattr(f, "__qualname__", "") for f in functions):
            return Lazy, (self.shape, self.dtype, self.source, self.span, self.part)
        if self.span is not None:
            return Lazy, (self.shape, self.dtype, None, self.span)
        return _with_bytes, (self.shape, self.dtype, bytes(self.fetch()))

    def __deepcopy__(self, _: object) -> Lazy:
        # A lazy tensor cannot change. Without this method, deepcopy would compute its bytes.
        return self

    def __repr__(self) -> str:
        file = "" if self.file is None else f", {self.file!r}"
        return f"Lazy({self.dtype} {list(self.shape)}{file})"

    def fetch(self) -> Buffer:
        """Return the `nbytes` bytes of the tensor in C order, little-endian."""
        if self.source is not None:
            return self.source()
        if self.span is None:
            raise ValueError("the tensor has no bytes: both source and span are None")
        return read_span(self.span)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def file(self) -> str | None:
        """The path of the tensor's file; None if unknown.

        If this tensor swaps the last two axes of another tensor, this is the file of the other tensor.
        """
        if self.span is not None:
            return self.span.path
        leaf = getattr(self.source, "leaf", None)
        return leaf.file if isinstance(leaf, Lazy) else None

    def read(self, first: int, count: int) -> Buffer:
        """Return the bytes of `count` elements from element `first`, in C order. If possible, read only these bytes."""
        size = self.dtype.itemsize
        if self.part is not None:
            return self.part(first, count)
        if self.span is not None:
            return read_span(Span(self.span.path, self.span.offset + first * size, count * size))
        return memoryview(self.fetch())[first * size : (first + count) * size]

    def numpy(self) -> Array:
        """Return the values as a numpy array of the storage dtype (`uint16` bits for bfloat16)."""
        import numpy as np

        self._check_axes()
        return np.frombuffer(self.fetch(), dtype=self.dtype.numpy).reshape(self.shape)

    def torch(self, device: str | torch.device | None = None) -> torch.Tensor:
        """Return the values as a torch tensor of the same dtype."""
        import torch

        kind = getattr(torch, self.dtype.torch)
        self._check_axes()
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=kind, device=device)
        # torch.frombuffer warns about a read-only buffer, so copy such a buffer. It also refuses an empty buffer.
        data = self.fetch()
        writable = data if isinstance(data, bytearray) else bytearray(data)
        return torch.frombuffer(writable, dtype=kind).reshape(self.shape).to(device or "cpu")

    def _check_axes(self) -> None:
        """Refuse a shape that numpy and torch cannot represent, such as `[0, 2**62, 2**62]`.

        A file may declare such a shape, because an axis of length 0 means that the tensor has no bytes.
        """
        if not self.nbytes and math.prod(n or 1 for n in self.shape) * self.dtype.itemsize >= 1 << 63:
            why = f"arrays cannot have the shape {list(self.shape)}"
            raise Unsupported(why, path=self.file, cure="Remove this tensor: it has no elements")

    def map(self, f: Callable[[Array], Array], shape: Shape) -> Lazy:
        """Return a tensor that applies `f` at each read; `f` reshapes, transposes or slices the array to `shape`."""

        def fetch() -> Buffer:
            return bytes_of(f(self.numpy()))

        return Lazy(tuple(shape), self.dtype, fetch)

    def reshape(self, *shape: int) -> Lazy:
        """Return the same bytes with another shape; as in numpy, one size may be -1."""
        known = math.prod(n for n in shape if n != -1)
        size = math.prod(self.shape)
        full = tuple((size // known if known else 0) if n == -1 else n for n in shape)
        if math.prod(full) != size:
            raise DoesNotFit(f"cannot reshape {list(self.shape)} to {list(shape)}", cure=TAKE_OUT)
        return self if full == self.shape else Lazy(full, self.dtype, self.source, self.span, self.part)


def _with_bytes(shape: Shape, dtype: DType, data: bytes) -> Lazy:
    return Lazy(shape, dtype, partial(bytes, data))


if TYPE_CHECKING:
    Leaf = Lazy | torch.Tensor | Array


def as_lazy(leaf: Leaf) -> Lazy:
    """Return a `Lazy` unchanged. Wrap a torch tensor in a `Lazy`, which copies the values to the CPU at each read.

    A numpy array is also wrapped.
    """
    if isinstance(leaf, Lazy):
        return leaf
    if not _is_torch(leaf):
        return from_numpy(cast("Array", leaf), dtype_of(leaf).name)

    def fetch() -> Buffer:
        import torch

        # Read the bytes through a uint8 view, because numpy cannot represent bfloat16 or float8.
        host = leaf.detach().to("cpu").contiguous()
        return host.reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""

    return Lazy(tuple(leaf.shape), dtype_of(leaf), fetch)


def _is_torch(leaf: Leaf) -> TypeGuard[torch.Tensor]:
    return hasattr(leaf, "detach")  # numpy arrays do not have it. Do not import torch to find out.


def as_torch(leaf: Leaf, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor or array as a torch tensor on `device`. If `dtype` is given, cast floats to this dtype."""
    value = leaf.to(device=device) if _is_torch(leaf) else as_lazy(leaf).torch(device)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def for_formulas(leaf: Leaf, device: str | torch.device | None, dtype: torch.dtype) -> torch.Tensor:
    """Return a lazy or torch tensor as a torch tensor for formulas: cast floats to `dtype`, and integers to int64.

    A file may store positions and seeds in any integer dtype. Sums and products of positions would overflow small
    dtypes, and torch has few operations for uint16 to uint64. A uint64 seed becomes the int64 with
    the same bits.
    """
    value = as_torch(leaf, device, dtype)
    return value if value.is_floating_point() else value.long()


def as_array(leaf: Leaf) -> Array:
    """Return a lazy or torch tensor as a numpy array for arithmetic; bfloat16 and float8 arrays use ml_dtypes."""
    tensor = as_lazy(leaf)
    return tensor.numpy().view(tensor.dtype.array)


def bytes_of(array: Array) -> memoryview:
    """Return the bytes of an array in C order. They are copied only if the array is not contiguous."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view("u1").data


def dtype_of(leaf: Leaf) -> DType:
    """Return the element type of a tensor or array.

    Raises:
        UsageError: the value is no tensor, or no file format has its element type.
    """
    if isinstance(leaf, Lazy):
        return leaf.dtype
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not hasattr(leaf, "shape"):
        why = f"a tensor must be a torch tensor, a numpy array or a Lazy, not {type(leaf).__name__}"
        raise UsageError(why, cure="Convert the value with torch.tensor or numpy.array")
    # A torch dtype has no attribute `name`, so use its text, such as `torch.float32`. The name of a numpy dtype omits
    # the byte order, but `from_numpy` converts big-endian values to little-endian.
    kind = BY_TORCH.get(getattr(dtype, "name", None) or str(dtype).removeprefix("torch."))
    if kind is None:
        cure = "Convert the tensor to float32, or to another element type of safetensors files"
        raise UsageError(f"the element type {dtype} is not supported", cure=cure)
    return kind


def from_numpy(array: Array, dtype: str | None = None) -> Lazy:
    """Wrap an array in a `Lazy`. If the array contains the bits of a type that numpy lacks, pass `dtype` (`BF16`)."""
    kind = DTYPES[dtype] if dtype else _kind(array.dtype)
    # Take the bits of an ml_dtypes array with `view`. A cast to the storage dtype would convert the values to integers.
    is_native = kind.numpy[1] == "u" and array.dtype.name == kind.torch
    numbers = array.view(kind.numpy) if is_native else array
    return Lazy(array.shape, kind, lambda: numbers.astype(kind.numpy, copy=False).tobytes())


@cache
def _kind(dtype: np.dtype[np.generic]) -> DType:
    return BY_TORCH[dtype.name]  # numpy, ml_dtypes and torch use the same names.


# Read and create tensors with a single element. A file may have thousands of such tensors. For most element types, this
# code uses `struct`, which is several times faster than numpy for a single element.


_CODES = {
    "F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U64": "<Q", "U32": "<I",
    "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip


def value_of(leaf: Lazy) -> float:
    """Return the number in a tensor with a single element."""
    data, name = bytes(leaf.fetch()), leaf.dtype.name
    if name == "BF16":
        # A bfloat16 is the upper half of a float32.
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if name in _CODES:
        return float(struct.unpack(_CODES[name], data)[0])
    return float(as_array(leaf).reshape(-1)[0])


@lru_cache(maxsize=1 << 10)
def number_of(text: str) -> Lazy:
    """Return a scalar tensor with the number that `text` contains in the notation of `float.hex`.

    The dtype is float32 if it represents the number exactly, otherwise float64.
    """
    value = float.fromhex(text)
    code = "F32" if _single(value) else "F64"
    data = struct.pack(_CODES[code], value)
    return Lazy((), DTYPES[code], lambda: data)


def _single(value: float) -> bool:
    try:
        return bool(struct.unpack("<f", struct.pack("<f", value))[0] == value)
    except OverflowError:
        return False


def at_once(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Read the single-element tensors that are adjacent in a file, and return all tensors.

    One read fetches a whole run of adjacent tensors. The returned tensors keep these bytes in memory. All other tensors
    are returned unchanged. Files in `ELSEWHERE` are not read.
    """
    single = [leaf for leaf in tensors.values() if leaf.nbytes == leaf.dtype.itemsize]
    spans = sorted((leaf.span for leaf in single if leaf.span), key=lambda span: (span.path, span.offset))
    by_span = {span: data for run in _runs(spans) for span, data in _read(run)}
    return {name: _holding(leaf, by_span) for name, leaf in tensors.items()}


def _holding(leaf: Lazy, by_span: Mapping[Span, bytes]) -> Lazy:
    data = by_span.get(leaf.span) if leaf.span and leaf.nbytes == leaf.dtype.itemsize else None
    return leaf if data is None else Lazy(leaf.shape, leaf.dtype, lambda: data, leaf.span)


def _runs(spans: list[Span]) -> list[list[Span]]:
    runs: list[list[Span]] = []
    for span in spans:
        last = runs[-1][-1] if runs else None
        if last is not None and (last.path, last.offset + last.nbytes) == (span.path, span.offset):
            runs[-1].append(span)
        else:
            runs.append([span])
    return runs


def _read(run: list[Span]) -> list[tuple[Span, bytes]]:
    first, last = run[0], run[-1]
    if len(run) < 2 or first.path in ELSEWHERE:
        return []
    data = bytes(read_span(Span(first.path, first.offset, last.offset + last.nbytes - first.offset)))
    return [(span, data[span.offset - first.offset :][: span.nbytes]) for span in run]


# Find NaNs and infinities in tensors of any element type, without torch. If numpy has the type, use `numpy.isfinite`;
# otherwise, compare bits.


_BITS = {
    "BF16": (0x7F80, 0x7F80),
    "F8_E5M2": (0x7C, 0x7C),
    "F8_E4M3": (0x7F, 0x7F),
    "F8_E8M0": (0xFF, 0xFF),
    "F8_E4M3FNUZ": (0xFF, 0x80),
    "F8_E5M2FNUZ": (0xFF, 0x80),
}
"""For each type that numpy lacks: (mask, value). An element is a NaN or an infinity if `bits & mask` equals `value`.

F8_E4M3, F8_E8M0 and the FNUZ types have no infinity. Each of these types has one or two bit patterns for NaN. Sources:
https://arxiv.org/abs/2209.05433,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""


def check_finite(leaf: Leaf, where: str | None = None, values: Array | None = None) -> None:
    """Refuse a tensor that contains a NaN or an infinity.

    Args:
        leaf: the tensor; an integer tensor is always accepted.
        where: the tensor's name, for the message.
        values: the tensor's values in the storage dtype, if they have been read already.

    Raises:
        Malformed: the tensor contains a NaN or an infinity. The error names the file and the index of the value.
    """
    tensor = as_lazy(leaf)
    # Skip empty tensors: a file may state a shape such as [0, 2**62, 2**62], which numpy refuses.
    if not tensor.dtype.floating or not tensor.nbytes:
        return
    position = first_in(tensor.numpy() if values is None else values, tensor.dtype)
    if position is not None:
        why = f"the tensor holds a NaN or an infinity at {list(position)}"
        cure = "Use an earlier checkpoint: the training diverged, or the file is damaged"
        raise Malformed(why, path=tensor.file, where=where, cure=cure)


def first_not_finite(leaf: Leaf) -> Shape | None:
    """Return the index of the first NaN or infinity in C order; None if all values are finite."""
    tensor = as_lazy(leaf)
    return first_in(tensor.numpy(), tensor.dtype) if tensor.dtype.floating and tensor.nbytes else None


def first_in(values: Array, dtype: DType) -> Shape | None:
    """Return the index of the first NaN or infinity in an array; None if all values are finite.

    The array has the storage type of `dtype`, such as `uint16` for bfloat16.
    """
    bad = _not_finite(values, dtype)
    if not bad.any():
        return None
    import numpy as np

    return tuple(int(i) for i in np.unravel_index(int(bad.argmax()), values.shape))


def _not_finite(values: Array, dtype: DType) -> Array:
    import numpy as np

    if dtype.name not in _BITS:
        return np.asarray(~np.isfinite(values))
    mask, bits = _BITS[dtype.name]
    return np.asarray((values & mask) == bits)

"""Lazy tensors: shape and dtype now, bytes when asked for; no caching, no operators.

A leaf of an adapter is either a `Lazy` or a `torch.Tensor`. Everything that needs only shapes, or only moves bytes,
works on `Lazy` without importing torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import Corrupt, storage_error
from .dtypes import BY_TORCH, DTYPES, DType
from .inputs import open_input

if TYPE_CHECKING:
    import numpy as np
    import torch

Buffer = bytes | bytearray | memoryview
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of bytes in a file: where a tensor's data lies, in C order, little-endian."""

    path: str
    offset: int
    nbytes: int


ELSEWHERE: dict[str, Callable[[Span], bytearray]] = {}
"""Files that have their data elsewhere, holes here: path -> what fetches the bytes of a span."""


def read_span(span: Span) -> bytearray:
    """The bytes of a span; the file is opened for it and closed again, but for files that `files_kept_open` keeps.

    Raises:
        StorageError: the file cannot be read.
        Corrupt: it has become shorter since its header was read.
    """
    if span.path in ELSEWHERE:
        return ELSEWHERE[span.path](span)
    data = bytearray(span.nbytes)
    try:
        with _opened(span.path) as file:
            file.seek(span.offset)
            view, done = memoryview(data), 0
            while done < span.nbytes and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise storage_error(error, span.path) from error
    if done < span.nbytes:
        why = f"{done} bytes where {span.nbytes} were when the file was opened"
        raise Corrupt(why, path=span.path, where=f"byte {span.offset}", cure="It changed while in use; read it anew")
    return data


@contextmanager
def files_kept_open() -> Iterator[None]:
    """Inside the block, `read_span` opens each file once: to open one takes ten times as long as to read 4 KiB of it.

    Nothing may be written inside it: a file that takes another's place would not be seen.
    """
    with ExitStack() as stack:
        token = _OPEN.set(({}, stack))
        try:
            yield
        finally:
            _OPEN.reset(token)


MOST_OPEN = 64
"""Files that are kept open at once: processes may often have 256."""

_OPEN: ContextVar[tuple[dict[str, io.FileIO], ExitStack] | None] = ContextVar("_OPEN", default=None)


def _opened(path: str) -> AbstractContextManager[io.FileIO]:
    known = _OPEN.get()
    if known is None or (path not in known[0] and len(known[0]) >= MOST_OPEN):
        return cast(io.FileIO, open_input(path, buffering=0))
    files, stack = known
    if path not in files:
        files[path] = stack.enter_context(cast(io.FileIO, open_input(path, buffering=0)))
    return nullcontext(files[path])


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """A tensor that is not read yet.

    Attributes:
        shape: its dimensions.
        dtype: its element type.
        fetch: reads the bytes: C order, little-endian, exactly `nbytes` of them.
        span: where those bytes lie, when they are one run of one file; lets a writer copy without looking.
        part: reads the bytes of a run of elements (the first, how many), where that takes less than all of them.
    """

    shape: Shape
    dtype: DType
    fetch: Callable[[], Buffer]
    span: Span | None = None
    part: Callable[[int, int], Buffer] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int, count: int) -> Buffer:
        """The bytes of `count` elements from `first` on, counted in C order; reads no more than it has to."""
        size = self.dtype.itemsize
        if self.part is not None:
            return self.part(first, count)
        if self.span is not None:
            return read_span(Span(self.span.path, self.span.offset + first * size, count * size))
        return memoryview(self.fetch())[first * size : (first + count) * size]

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as a numpy array of the storage dtype (`uint16` bits for bfloat16)."""
        import numpy as np

        return np.frombuffer(self.fetch(), dtype=self.dtype.numpy).reshape(self.shape)

    def torch(self, device: str | torch.device | None = None) -> torch.Tensor:
        """The values as a torch tensor of the same dtype."""
        import torch

        kind = getattr(torch, self.dtype.torch)
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=kind, device=device)
        data = self.fetch()
        writable = data if isinstance(data, bytearray) else bytearray(data)
        return torch.frombuffer(writable, dtype=kind).reshape(self.shape).to(device or "cpu")

    def map(self, f: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]], shape: Shape) -> Lazy:
        """The same numbers rearranged: `f` reshapes, transposes or slices the storage array into `shape`."""

        def fetch() -> Buffer:
            return bytes_of(f(self.numpy()))

        return Lazy(tuple(shape), self.dtype, fetch)

    def reshape(self, *shape: int) -> Lazy:
        """The same bytes under another shape of as many elements; -1 stands for what is left over."""
        known = math.prod(n for n in shape if n != -1)
        size = math.prod(self.shape)
        full = tuple((size // known if known else 0) if n == -1 else n for n in shape)
        if math.prod(full) != size:
            raise ValueError(f"cannot reshape {list(self.shape)} to {list(shape)}")
        return self if full == self.shape else Lazy(full, self.dtype, self.fetch, self.span, self.part)


if TYPE_CHECKING:
    Leaf = Lazy | torch.Tensor


def as_lazy(leaf: Leaf) -> Lazy:
    """Any leaf as a `Lazy`: unchanged, or a view of a torch tensor's values on the host."""
    if isinstance(leaf, Lazy):
        return leaf

    def fetch() -> Buffer:
        import torch

        host = leaf.detach().to("cpu").contiguous()
        return host.reshape(-1).view(torch.uint8).numpy().tobytes() if host.numel() else b""

    return Lazy(tuple(leaf.shape), dtype_of(leaf), fetch)


def as_torch(leaf: Leaf, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Any leaf as a torch tensor on `device`; floating leaves in `dtype` where one is given."""
    value = leaf.torch(device) if isinstance(leaf, Lazy) else leaf.to(device=device)
    return value.to(dtype) if dtype is not None and value.is_floating_point() else value


def as_array(leaf: Leaf) -> np.ndarray[Any, Any]:
    """Any leaf as a numpy array that can be computed with; bfloat16 and float8 in ml_dtypes' types."""
    tensor = as_lazy(leaf)
    return tensor.numpy().view(tensor.dtype.array)


def bytes_of(array: np.ndarray[Any, Any]) -> memoryview:
    """The bytes of an array in C order; copied only where it does not lie so."""
    import numpy as np

    return np.ascontiguousarray(array).reshape(-1).view("u1").data


def dtype_of(leaf: Leaf) -> DType:
    """The element type of any leaf."""
    return leaf.dtype if isinstance(leaf, Lazy) else BY_TORCH[str(leaf.dtype).removeprefix("torch.")]


def from_numpy(array: np.ndarray[Any, Any], dtype: str | None = None) -> Lazy:
    """A `Lazy` over a numpy array; `dtype` names the element type where numpy lacks it (`BF16` held as uint16)."""
    kind = DTYPES[dtype] if dtype else next(d for d in DTYPES.values() if d.numpy == _little(array))
    return Lazy(array.shape, kind, lambda: array.astype(kind.numpy, copy=False).tobytes())


def _little(array: np.ndarray[Any, Any]) -> str:
    return str(array.dtype.newbyteorder("<").str)

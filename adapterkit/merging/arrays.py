"""The two array libraries that compute merges: numpy on the CPU (without importing torch), and torch.

Formulas use only operations that both libraries have. The libraries handle memory, casts and devices in different ways,
so this module defines one interface, `Arrays`, for both.
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from ..errors import UsageError
from ..io.lazy import DType, as_array, as_lazy, first_in, for_formulas
from ..linalg.namespace import Numbers

if TYPE_CHECKING:
    import torch

    from ..io.lazy import Array, Leaf


CAST_AT_A_TIME = 1024

KEPT = 31 << 20
"""The size in bytes of an array that is allocated and freed once, to raise glibc's mmap threshold to about this size.

The largest possible threshold is 32 MiB; freeing a larger array would not change the threshold.
"""


class Arrays(Protocol):
    """The operations that a merge needs from an array library."""

    def load(self, leaf: Leaf) -> Numbers:
        """Load a tensor onto the device: floating-point values as float64, all others as int64."""
        ...

    def over(self, buffer: memoryview, dtype: DType) -> Numbers:
        """View bytes in host memory as a flat array of dtype `dtype`, without copying them."""
        ...

    def empty(self, count: int) -> Numbers:
        """Return a flat, uninitialised float64 array on the device."""
        ...

    def assign(self, target: Numbers, values: Numbers) -> None:
        """Copy `values` into `target`, rounded to the nearest values that `target`'s dtype can represent.

        Both arrays have the same shape; they may be on different devices.
        """

    def add(self, raw: Numbers, change: Numbers, out: Numbers) -> None:
        """Compute `raw + change` in float64, and write it into `out`, rounded to nearest.

        `change` (float64) may be overwritten.
        """

    def finite(self, values: Numbers, dtype: DType) -> bool:
        """Whether `values`, which have the dtype `dtype`, contain neither a NaN nor an infinity."""
        ...

    def quiet(self) -> AbstractContextManager[None]:
        """Return a context manager that a worker thread enters before it computes.

        The context suppresses overflow warnings, because results are checked later. With torch, it also limits the
        worker to one thread.
        """
        ...


class Workspace:
    """The memory of one worker, reused for all blocks of all tensors, because the first write to a new page is slow."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self._buffers: dict[str, Numbers] = {}
        self._kept: Array | None = None

    def take(self, count: int, use: str = "block") -> Numbers:
        """Return an uninitialised float64 array of `count` elements on the device.

        The next call with the same `use` may return the same memory; different values of `use` get separate memory.
        """
        buffer = self._buffers.get(use)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[use] = self.arrays.empty(count)
        return buffer[:count]

    def keep(self, count: int, dtype: DType) -> Array:
        """Return an uninitialised numpy array of `count` elements in host memory.

        The next call of `keep` may return the same memory. `take` uses separate memory.
        """
        import numpy as np

        nbytes = count * dtype.itemsize
        if self._kept is None or len(self._kept) < nbytes:
            self._kept = np.empty(nbytes, np.uint8)
        kept: Array = self._kept[:nbytes].view(dtype.array)
        return kept


def arrays_for(device: str) -> Arrays:
    """Return the array library for a device: `auto` (CUDA if torch finds it), `cpu`, `cuda:N` or another torch device.

    Raises:
        UsageError: the device does not exist.
    """
    if device == "cpu" or (device == "auto" and not _has_cuda()):
        return NumpyArrays()
    try:
        arrays = TorchArrays("cuda" if device == "auto" else device)
        arrays.empty(0)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        cure = "Pass --device (device=) auto, cpu, cuda:N, or several devices, such as cuda:0,cuda:1"
        raise UsageError(f"the device {device!r} does not exist ({first})", cure=cure) from None
    return arrays


def devices_for(device: str) -> list[Arrays]:
    """Return one array library per device; `device` is one device, or several such as `cuda:0,cuda:1`.

    Raises:
        UsageError: one of the devices does not exist.
    """
    return [arrays_for(name.strip()) for name in device.split(",")]


def _has_cuda() -> bool:
    """Whether torch finds a CUDA device. Except on Windows, torch is imported only if there is a CUDA driver."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")) and sys.platform != "win32":
        return False
    import torch

    return torch.cuda.is_available()


class NumpyArrays:
    """Computes with numpy. The package ml_dtypes provides the dtypes that numpy lacks."""

    def __init__(self) -> None:
        import numpy as np  # Import before the workers start: only a loaded BLAS can be limited to one thread.

        self.np = np
        # Allocate and free one large array. This raises glibc's mmap threshold, so that the memory of smaller freed
        # arrays is reused instead of unmapped. Otherwise formulas, which allocate an array at each step, would mostly
        # wait for new pages.
        np.empty(KEPT, np.uint8)

    def load(self, leaf: Leaf) -> Numbers:
        values = as_array(leaf)
        return cast(Numbers, values.astype("<f8" if as_lazy(leaf).dtype.floating else "<i8"))

    def over(self, buffer: memoryview, dtype: DType) -> Numbers:
        return cast(Numbers, self.np.frombuffer(buffer, dtype=dtype.array))

    def empty(self, count: int) -> Numbers:
        return cast(Numbers, self.np.empty(count))

    def assign(self, target: Numbers, values: Numbers) -> None:
        self.np.copyto(cast("Array", target), cast("Array", values), casting="unsafe")

    def add(self, raw: Numbers, change: Numbers, out: Numbers) -> None:
        # The ufunc casts its inputs and its output in small buffers. A cast before the call would instead write a
        # float64 copy of the whole array `raw` to memory.
        one, other, into = cast("tuple[Array, Array, Array]", (raw, change, out))
        self.np.add(one, other, out=into, dtype=self.np.float64, casting="unsafe")

    def finite(self, values: Numbers, dtype: DType) -> bool:
        return not dtype.floating or first_in(cast("Array", values).view(dtype.numpy), dtype) is None

    def quiet(self) -> AbstractContextManager[None]:
        return _Quiet(self.np)


class _Quiet:
    """A context in which numpy gives no warnings, and uses a cast buffer that is small enough for the L1 cache."""

    def __init__(self, np: ModuleType) -> None:
        self.np, self.errors = np, np.errstate(all="ignore")

    def __enter__(self) -> None:
        self.errors.__enter__()
        self.before = self.np.setbufsize(CAST_AT_A_TIME)

    def __exit__(self, *raised: object) -> None:
        self.np.setbufsize(self.before)
        self.errors.__exit__(*raised)


class TorchArrays:
    """Computes with torch on one device.

    Args:
        device: the device that computes. Blocks are always read into host memory and written from host memory.
    """

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, torch.device(device)

    def load(self, leaf: Leaf) -> Numbers:
        return cast(Numbers, for_formulas(leaf, self.device, self.torch.float64))

    def over(self, buffer: memoryview, dtype: DType) -> Numbers:
        return cast(Numbers, self.torch.frombuffer(buffer, dtype=getattr(self.torch, dtype.torch)))

    def empty(self, count: int) -> Numbers:
        return cast(Numbers, self.torch.empty(count, dtype=self.torch.float64, device=self.device))

    def assign(self, target: Numbers, values: Numbers) -> None:
        into, given = cast("tuple[torch.Tensor, torch.Tensor]", (target, values))
        into.copy_(self._once(given, into))

    def add(self, raw: Numbers, change: Numbers, out: Numbers) -> None:
        base, total, into = cast("tuple[torch.Tensor, torch.Tensor, torch.Tensor]", (raw, change, out))
        wide = base.to(total.device)
        # Cast 8-bit floats before the addition, because torch does not promote them.
        total += wide.to(total.dtype) if base.itemsize == 1 else wide
        into.copy_(self._once(total, into))

    def _once(self, values: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Prepare float64 values for a cast to float16, so that torch gets the correct float16.

        torch casts float64 to float16 through float32. It rounds to nearest twice, and the result may be wrong.
        Therefore this method casts to float32 itself, and rounds to odd: a value that is not exact in float32 becomes
        the neighbouring float32 whose last bit is odd. This float32 never lies halfway between two float16 numbers, and
        it lies on the same side of each float16 number as the float64 value. So the second rounding, which torch does,
        gives the correct float16. For other dtypes, return `values` as given.
        Boldo and Melquiond 2008, https://doi.org/10.1109/TC.2007.70819
        """
        if target.dtype != self.torch.float16 or values.dtype != self.torch.float64:
            return values
        near = values.float()
        wide = near.double()
        # If the cast rounded away from zero, subtract one from the bit pattern, which gives the next smaller magnitude.
        bits = near.view(self.torch.int32) - (wide.abs() > values.abs()).int()
        odd = (bits | (wide != values).int()).view(self.torch.float32)
        return self.torch.where(wide.isfinite(), odd, near)

    def finite(self, values: Numbers, dtype: DType) -> bool:
        if not dtype.floating:
            return True
        given = cast("torch.Tensor", values)
        wide = given.float() if given.itemsize == 1 else given  # isfinite does not accept 8-bit floats.
        return bool(self.torch.isfinite(wide).all())

    def quiet(self) -> AbstractContextManager[None]:
        return _OneThread(self.torch)


class _OneThread:
    """A context in which torch uses one thread per worker.

    When the context ends in the main thread, the main thread gets back the number of threads that it had before.
    """

    def __init__(self, torch: ModuleType) -> None:
        self.torch = torch

    def __enter__(self) -> None:
        self.before = self.torch.get_num_threads()
        self.torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        # torch stores the number of threads separately for each calling thread. Restore the number only in the main
        # thread, because a worker thread ends after this context.
        if threading.current_thread() is threading.main_thread():
            self.torch.set_num_threads(self.before)

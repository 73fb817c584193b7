"""The two array libraries a merge computes with: numpy on the CPU, where torch need not be imported, and torch.

Formulas are written in what both have in common; what differs (memory, casts, devices) is here.
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UsageError
from ..io.lazy import DType, as_array, as_lazy, first_in, for_formulas

if TYPE_CHECKING:
    from ..io.lazy import Leaf


CAST_AT_A_TIME = 1024

KEPT = 31 << 20
"""Bytes; glibc takes no more than 32 MiB for its threshold."""


class Arrays(Protocol):
    """What the merge asks of an array library; `Any` is its array type."""

    def load(self, leaf: Leaf) -> Any:
        """A leaf where the library computes: real numbers in float64, whole numbers in int64."""

    def over(self, buffer: memoryview, dtype: DType) -> Any:
        """A flat array over bytes on the host; no copy."""

    def empty(self, count: int) -> Any:
        """A flat float64 array where the library computes."""

    def assign(self, target: Any, values: Any) -> None:
        """Writes values into an array of the same shape, cast to its dtype, to the nearest, wherever either lies."""

    def add(self, raw: Any, change: Any, out: Any) -> None:
        """Writes raw + change, summed in float64, into `out`, to the nearest; may use up `change`, a float64 array."""

    def finite(self, values: Any, dtype: DType) -> bool:
        """Whether there is no NaN and no infinity among values of a dtype."""

    def quiet(self) -> AbstractContextManager[Any]:
        """A context for a worker: no warnings on overflow, which is checked for, and one thread each."""


class Workspace:
    """One worker's memory, used again for every block of every tensor: fresh memory is slow to touch."""

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self._held: dict[str, Any] = {}
        self._kept: Any = None

    def take(self, count: int, use: str = "block") -> Any:
        """Memory for `count` float64 numbers, as the last use of that name left it, where the library computes."""
        held = self._held.get(use)
        if held is None or len(held) < count:
            held = self._held[use] = self.arrays.empty(count)
        return held[:count]

    def keep(self, count: int, dtype: DType) -> Any:
        """Other memory, on the host, as numpy sees it."""
        import numpy as np

        nbytes = count * dtype.itemsize
        if self._kept is None or len(self._kept) < nbytes:
            self._kept = np.empty(nbytes, np.uint8)
        return self._kept[:nbytes].view(dtype.array)


def arrays_for(device: str) -> Arrays:
    """The library for a device: `auto` (CUDA where torch finds one), `cpu`, `cuda:N` or any other that torch knows.

    Raises:
        UsageError: there is no such device.
    """
    if device == "cpu" or (device == "auto" and not _has_cuda()):
        return NumpyArrays()
    try:
        arrays = TorchArrays("cuda" if device == "auto" else device)
        arrays.empty(0)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        cure = "Use auto, cpu, cuda:N, or several: cuda:0,cuda:1"
        raise UsageError(f"no device {device!r} ({first})", cure=cure) from None
    return arrays


def devices_for(device: str) -> list[Arrays]:
    """The libraries for one device or several, `cuda:0,cuda:1`.

    Raises:
        UsageError: one of them is not there.
    """
    return [arrays_for(name) for name in device.split(",")]


def _has_cuda() -> bool:
    """Whether torch could find a CUDA device; asked of the driver first, which costs no import of torch."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")) and sys.platform != "win32":
        return False
    import torch

    return torch.cuda.is_available()


class NumpyArrays:
    """numpy with ml_dtypes' element types."""

    def __init__(self) -> None:
        import numpy as np  # before the workers start, so that its BLAS can be held to one thread each

        self.np = np
        # Freed at once, it tells glibc to keep what is freed below this size instead of giving the pages back: formulas
        # make an array of a block's size at each step, and most of their time would go into fresh pages.
        np.empty(KEPT, np.uint8)

    def load(self, leaf: Leaf) -> Any:
        values = as_array(leaf)
        return values.astype("<f8" if as_lazy(leaf).dtype.floating else "<i8")

    def over(self, buffer: memoryview, dtype: DType) -> Any:
        return self.np.frombuffer(buffer, dtype=dtype.array)

    def empty(self, count: int) -> Any:
        return self.np.empty(count)

    def assign(self, target: Any, values: Any) -> None:
        self.np.copyto(target, values, casting="unsafe")

    def add(self, raw: Any, change: Any, out: Any) -> None:
        self.np.add(raw, change, out=out, dtype=self.np.float64, casting="unsafe")

    def finite(self, values: Any, dtype: DType) -> bool:
        return not dtype.floating or first_in(values.view(dtype.numpy), dtype) is None

    def quiet(self) -> AbstractContextManager[Any]:
        return _Quiet(self.np)


class _Quiet:
    """numpy without warnings, casting a few hundred numbers at a time: they stay in a core's nearest cache."""

    def __init__(self, np: Any) -> None:
        self.np, self.errors = np, np.errstate(all="ignore")

    def __enter__(self) -> None:
        self.errors.__enter__()
        self.before = self.np.setbufsize(CAST_AT_A_TIME)

    def __exit__(self, *raised: object) -> None:
        self.np.setbufsize(self.before)
        self.errors.__exit__(*raised)


class TorchArrays:
    """torch on any device.

    Args:
        device: where to compute; blocks come from the host and go back there.
    """

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, torch.device(device)

    def load(self, leaf: Leaf) -> Any:
        return for_formulas(leaf, self.device, self.torch.float64)

    def over(self, buffer: memoryview, dtype: DType) -> Any:
        return self.torch.frombuffer(buffer, dtype=getattr(self.torch, dtype.torch))

    def empty(self, count: int) -> Any:
        return self.torch.empty(count, dtype=self.torch.float64, device=self.device)

    def assign(self, target: Any, values: Any) -> None:
        target.copy_(self._once(values, target))

    def add(self, raw: Any, change: Any, out: Any) -> None:
        wide = raw.to(change.device)
        change += wide.to(change.dtype) if raw.itemsize == 1 else wide
        out.copy_(self._once(change, out))

    def _once(self, values: Any, target: Any) -> Any:
        """float64 on its way to float16, which torch rounds twice and numpy once: made float32 with an odd last bit.

        What is not exact then lies on the same side of every float16, and halfway between two it never does.
        Boldo and Melquiond 2008, https://doi.org/10.1109/TC.2007.70819
        """
        if target.dtype != self.torch.float16 or values.dtype != self.torch.float64:
            return values
        near = values.float()
        wide = near.double()
        bits = near.view(self.torch.int32) - (wide.abs() > values.abs()).int()
        odd = (bits | (wide != values).int()).view(self.torch.float32)
        return self.torch.where(wide.isfinite(), odd, near)

    def finite(self, values: Any, dtype: DType) -> bool:
        if not dtype.floating:
            return True
        wide = values.float() if values.itemsize == 1 else values
        return bool(self.torch.isfinite(wide).all())

    def quiet(self) -> AbstractContextManager[Any]:
        return _OneThread(self.torch)


class _OneThread:
    """torch with one thread in this thread; the number of the thread that asked is put back."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch

    def __enter__(self) -> None:
        self.before = self.torch.get_num_threads()
        self.torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            self.torch.set_num_threads(self.before)

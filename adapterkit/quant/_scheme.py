"""What a scheme is: how to know its bases, and how to find their packed weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import Malformed, ShapeMismatch, Unsupported
from ..tensors.dtypes import BY_TORCH, DTYPES, DType
from ..tensors.lazy import Lazy, Shape

if TYPE_CHECKING:
    import numpy as np

    from ..tensors.checkpoint import Checkpoint
    from ..tensors.lazy import Buffer

    Array = np.ndarray[Any, Any]
    Merged = Callable[[int, int], Array]

DAMAGED = "The file is damaged, or not of this scheme: fetch it again"

NO_PACKING = "Merge with quantized=/--quantized dequantize, and quantize the result with the scheme's own tool"

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The sixteen numbers of a float of four bits: a sign, two bits of exponent, one of mantissa."""


@dataclass(frozen=True, eq=False)
class Packed(ABC):
    """One weight as a scheme stores it. A scheme's subclass says what its rows are.

    Attributes:
        name: of the weight in a base that is not quantized.
        shape: likewise.
        dtype: of the numbers that its library makes of it.
        members: the stored tensors that it is made of; in place of the first the weight stands.
    """

    name: str
    shape: Shape
    dtype: DType
    members: tuple[str, ...]

    @property
    def merged(self) -> str:
        """The dtype in which `pack` takes its numbers."""
        return "F32"

    @property
    def changes(self) -> bool:
        """Whether it is written in another form than it is stored in, merged into or not."""
        return False

    @property
    def written(self) -> Lazy:
        """Its one member as it will be written, if it `changes`: a size alone.

        Raises:
            Unsupported: the scheme has one form.
        """
        raise Unsupported("its scheme has no other form to write it in", where=self.name, cure=NO_PACKING)

    @property
    def share(self) -> Lazy | None:
        """Its run of bytes in a member that several weights lie in, in order, as it will be written; else None."""
        return None

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed | None:
        """The weight with other parts, where that takes no look at the base; None where the scheme has to find it."""
        return None

    @abstractmethod
    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Rows of the weight seen as `[rows, width]`, width being its last axis; of `dtype`'s numpy type.

        Raises:
            Malformed: a scale is a NaN or an infinity.
        """

    def pack(self, merged: Merged) -> dict[str, Array]:
        """Quantizes other numbers in this weight's place, by the scheme's own formula.

        Args:
            merged: gives rows `start` to `stop` of them, float32 `[rows, width]`; it may be asked again.

        Returns:
            the members that change, in their stored dtypes; their shapes are as before.

        Raises:
            Unsupported: the scheme's quantization is not known here.
        """
        raise Unsupported("nothing here quantizes to this scheme", where=self.name, cure=NO_PACKING)

    def lazy(self) -> Lazy:
        """The weight as a lazy tensor, which reads no more than the rows it is asked for."""
        return Lazy(self.shape, self.dtype, lambda: self._part(0, math.prod(self.shape)), part=self._part)

    def _part(self, first: int, count: int) -> Buffer:
        import numpy as np

        width = self.shape[-1] if self.shape else 1
        if not count or not width:
            return b""
        start, stop = first // width, -(-(first + count) // width)
        with np.errstate(all="ignore"):
            values = np.ascontiguousarray(self.rows(start, stop), dtype=self.dtype.array)
        flat = values.reshape(-1)[first - start * width :][:count]
        return flat.view("u1").tobytes()


class Scheme:
    """A way to pack weights, in whole numbers or 8-bit floats: a base with neither, and a silent config, is not packed.

    Subclass it in a module of its own; the module's name is the scheme's name.

    Class attributes:
        url: where the layout is described.
        description: one line for tables.
        oracle: what computes with it, and what its dequantization is compared with.
    """

    url: ClassVar[str] = ""
    description: ClassVar[str] = ""
    oracle: ClassVar[str] = ""

    def detect(self, base: Checkpoint) -> bool:
        """Whether the base is packed so, by its headers and config alone."""
        raise Unsupported(f"{type(self).__name__} cannot be detected")

    def config(self, base: Checkpoint) -> Mapping[str, Any] | None:
        """The config by which adapters' names are resolved against the packed weights' names."""
        return base.config

    def find(self, base: Checkpoint) -> Iterator[Packed]:
        """The packed weights.

        Raises:
            Malformed, ShapeMismatch: their parts are missing, damaged or do not fit together.
        """
        raise Unsupported(f"{type(self).__name__} cannot be read")


def settings(base: Checkpoint) -> dict[str, Any]:
    """What the base's config says about quantization; empty where it is silent."""
    found = (base.config or {}).get("quantization_config")
    return found if isinstance(found, dict) else {}


def sixteen_bits(base: Checkpoint, scale: Lazy | None = None) -> DType:
    """The dtype that a weight comes out in: of 16-bit scales, else of a 16-bit model, else bfloat16."""
    if scale is not None and scale.dtype.name in ("F16", "BF16"):
        return scale.dtype
    config = base.config or {}
    said = BY_TORCH.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."))
    return said if said is not None and said.name == "F16" else DTYPES["BF16"]


def part_of(base: Checkpoint, weight: str, name: str, dtypes: tuple[str, ...]) -> Lazy:
    """A stored tensor that a packed weight needs.

    Raises:
        Malformed: it is not there.
        ShapeMismatch: it is of another dtype.
    """
    found = base.tensors.get(name)
    if found is None:
        raise Malformed(f"is quantized, and {name} is not there", path=base.root, where=weight, cure=DAMAGED)
    if found.dtype.name not in dtypes:
        why = f"of dtype {found.dtype}, not {' or '.join(dtypes)}"
        raise ShapeMismatch(why, path=base.root, where=name, cure=DAMAGED)
    return found


def expect(shape: Shape, wanted: Shape, name: str) -> None:
    """Checks the shape of a part of a packed weight.

    Raises:
        ShapeMismatch: it is another one.
    """
    if shape != wanted:
        raise ShapeMismatch(f"of shape {list(shape)}, not {list(wanted)}", where=name, cure=DAMAGED)


def numbers(tensor: Lazy, first: int = 0, count: int | None = None) -> np.ndarray[Any, Any]:
    """A run of a stored tensor's elements, flat, in a dtype that can be computed with."""
    import numpy as np

    size = math.prod(tensor.shape) - first if count is None else count
    return np.frombuffer(tensor.read(first, size), dtype=tensor.dtype.array)


def rows_of(tensor: Lazy, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Rows `start` to `stop` of a stored tensor seen as `[rows, width]`."""
    width = tensor.shape[-1]
    return numbers(tensor, start * width, (stop - start) * width).reshape(stop - start, width)


def finite(scales: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
    """The scales in float32 where they are not wider.

    Raises:
        Malformed: one is a NaN or an infinity.
    """
    import numpy as np

    wide = scales if scales.dtype == np.float64 else scales.astype(np.float32)
    if not np.isfinite(wide).all():
        raise Malformed("a scale is not a finite number", where=name, cure=DAMAGED)
    return wide


def nibbles(packed: np.ndarray[Any, Any], *, high_first: bool = False) -> np.ndarray[Any, Any]:
    """The halves of bytes, along the last axis, which becomes twice as long."""
    import numpy as np

    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return np.stack(halves, axis=-1).reshape(*packed.shape[:-1], -1)


STEP = 1 << 17
"""Numbers quantized at a time: few enough that they stay in a core's cache."""


def steps(shape: Shape, granule: int = 1) -> Iterator[tuple[int, int]]:
    """Runs of rows to quantize at a time: a multiple of `granule` each, but for the last."""
    rows = math.prod(shape[:-1])
    step = max(1, STEP // (max(shape[-1], 1) * granule)) * granule
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def divided(values: Array, scale: Array | float) -> Array:
    """values / scale, and 0 where the scale is 0."""
    import numpy as np

    wide = np.broadcast_to(np.asarray(scale, np.float32), values.shape)
    return np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)


def nearest_e2m1(values: Array) -> Array:
    """The numbers of four bits whose E2M1 is nearest, of two the one with the even mantissa; uint8."""
    import numpy as np

    levels = np.array(E2M1[:8], np.float32)
    middles, sizes = (levels[1:] + levels[:-1]) / 2, np.abs(values)
    low, high = (np.searchsorted(middles, sizes, side) for side in ("left", "right"))
    q = np.where(low % 2 == 0, low, high).astype(np.uint8)
    return np.asarray(q | np.signbit(values).astype(np.uint8) << 3)


def halves(q: Array, *, high_first: bool = False) -> Array:
    """Numbers of four bits in bytes, in pairs along the last axis, of even length: what `nibbles` undoes."""
    first, second = q[..., 0::2], q[..., 1::2]
    return (first << 4 | second) if high_first else (first | second << 4)


def joined(pieces: Sequence[Sequence[Array]], axes: Sequence[int]) -> list[Array]:
    """Pieces of several parts, run by run, joined each along its axis."""
    import numpy as np

    return [np.concatenate(parts, axis) for parts, axis in zip(zip(*pieces, strict=True), axes, strict=True)]

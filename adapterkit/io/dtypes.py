"""Element types: their safetensors names, and the numpy and torch types that store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: the safetensors name, e.g. `BF16`.
        itemsize: bytes per element.
        numpy: the little-endian numpy dtype that stores the bits; an unsigned integer if numpy lacks the type.
        torch: the name of the dtype in `torch`.
        floating: True for real and complex numbers, for which arithmetic and casts make sense.
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
        """The numpy dtype for arithmetic; ml_dtypes provides those that numpy lacks."""
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
"""safetensors name -> `DType`, in the order in which the safetensors library sorts a file (largest last)."""

BY_TORCH = {d.torch: d for d in DTYPES.values()}
"""torch dtype name (`bfloat16`) -> `DType`."""

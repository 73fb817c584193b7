"""A weight whose rows a GGUF file keeps in two tensors, such as DeepSeek's `kv_b_proj` and Qwen3-Next's `in_proj_qkvz`.

Both tensors are read and written in the types that they have: `--dtype` does not change them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ..io.ggml_blocks import BLOCKS, decoded, encoded
from ..io.gguf_file import raw_size
from ..io.lazy import DTYPES
from ._scheme import Packed, numbers, steps

if TYPE_CHECKING:
    import numpy as np

    from ..io.lazy import Lazy
    from ._scheme import Array, Merged


def read_rows(stored: Lazy, kind: str, width: int, start: int, stop: int) -> Array:
    """Return rows `start` to `stop` of a tensor of ggml's type `kind` as float32 [rows, width]."""
    row = raw_size(kind, (width,))
    data = numbers(stored, start * row, (stop - start) * row)
    if kind in BLOCKS:
        return decoded(kind, data).reshape(-1, width)
    return cast("Array", data.view(DTYPES[kind].array).astype("f4").reshape(-1, width))


def write_rows(kind: str, rows: Array) -> bytes:
    """Return the bytes of rows in ggml's type `kind`; numbers of a plain type come in that type or in float32."""
    return encoded(kind, rows) if kind in BLOCKS else bytes(rows.astype(DTYPES[kind].array).tobytes())


@dataclass(frozen=True, eq=False)
class Piece:
    """One of the two tensors.

    Attributes:
        member: its name in the file.
        stored: its bytes, with what fills them up to the next tensor.
        kind: ggml's type.
        shape: [rows, width]; [heads, width, rows of a head] if it is `turned`.
        places: for each of its rows, the weight's; of a turned one, head by head.
        turned: each head's matrix is transposed, as llama.cpp multiplies with MLA's keys.
    """

    member: str
    stored: Lazy
    kind: str
    shape: tuple[int, ...]
    places: Array
    turned: bool = False

    def read(self, wanted: Array) -> Array:
        """Return some of its rows, by their ascending numbers, as float32 [rows, width]."""
        import numpy as np

        if not self.turned:
            first, last = int(wanted[0]), int(wanted[-1]) + 1
            return cast("Array", read_rows(self.stored, self.kind, self.shape[-1], first, last)[wanted - first])
        _, width, each = self.shape
        heads = np.arange(wanted[0] // each, wanted[-1] // each + 1)
        whole = [read_rows(self.stored, self.kind, each, head * width, (head + 1) * width).T for head in heads.tolist()]
        return cast("Array", np.concatenate(whole)[wanted - int(heads[0]) * each])

    def pack(self, merged: Merged) -> Array:
        """Return its bytes with the numbers that `merged` gives for the weight's rows."""
        import numpy as np

        data = bytearray()
        width = self.shape[1] if self.turned else self.shape[-1]
        runs = steps((len(self.places), width))
        if self.turned:
            each = self.shape[2]
            runs = ((start, start + each) for start in range(0, len(self.places), each))
        for start, stop in runs:
            places = self.places[start:stop]
            first, last = int(places.min()), int(places.max()) + 1
            rows = merged(first, last)[places - first]
            data += write_rows(self.kind, np.ascontiguousarray(rows.T if self.turned else rows))
        data += bytes(self.stored.nbytes - len(data))
        return np.frombuffer(data, np.uint8)


@dataclass(frozen=True, eq=False)
class Split(Packed):
    """A weight in two tensors; `pieces` have all of its rows, each once."""

    pieces: tuple[Piece, ...]

    @property
    def merged(self) -> str:
        # Numbers that are computed in float32 and rounded to another type of both tensors would be rounded twice.
        (kind, *others) = {piece.kind for piece in self.pieces}
        return "F32" if others or kind in BLOCKS else kind

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed:
        pieces = tuple(replace(piece, stored=parts.get(piece.member, piece.stored)) for piece in self.pieces)
        return replace(self, pieces=pieces)

    def rows(self, start: int, stop: int) -> np.ndarray[Any, Any]:
        import numpy as np

        out = np.empty((stop - start, self.shape[-1]), np.float32)
        for piece in self.pieces:
            inside = np.flatnonzero((piece.places >= start) & (piece.places < stop))
            if len(inside):
                out[piece.places[inside] - start] = piece.read(inside)
        return out

    def pack(self, merged: Merged) -> dict[str, Array]:
        return {piece.member: piece.pack(merged) for piece in self.pieces}

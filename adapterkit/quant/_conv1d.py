"""Quantized weights of GPT-2's `Conv1D`. A base has these weights as [in, out], and libraries pack [out, in].

transformers' bitsandbytes integration and GPTQ's tools transpose these weights before they quantize them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..naming.moves import IN_OUT, part_config, stored_in_out
from . import Packed

if TYPE_CHECKING:
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Lazy
    from . import Array, Merged


def as_in_base(base: Checkpoint, weight: Packed) -> Packed:
    """Return the packed weight in the layout that it has in the unquantized base."""
    path, config = part_config(weight.name.removesuffix(".weight"), base.config)
    listed = str((config or {}).get("model_type")) in IN_OUT and len(weight.shape) == 2
    if not listed or not stored_in_out(path, config):
        return weight
    return _TransposedPacked(weight.name, weight.shape[::-1], weight.dtype, weight.members, weight)


@dataclass(frozen=True, eq=False)
class _TransposedPacked(Packed):
    """The transpose of the packed weight `turned`."""

    turned: Packed

    def with_parts(self, parts: Mapping[str, Lazy]) -> Packed | None:
        again = self.turned.with_parts(parts)
        return None if again is None else _TransposedPacked(self.name, self.shape, self.dtype, self.members, again)

    def rows(self, start: int, stop: int) -> Array:
        import numpy as np

        return np.ascontiguousarray(self.turned.rows(0, self.shape[1])[:, start:stop].T)

    def pack(self, merged: Merged) -> dict[str, Array]:
        import numpy as np

        whole = merged(0, math.prod(self.shape[:-1])).T
        return self.turned.pack(lambda start, stop: np.ascontiguousarray(whole[start:stop]))

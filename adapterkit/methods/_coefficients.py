"""Laws of some coefficients of a transform of the change, at positions that were drawn at random. No methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import Malformed
from ..shapes import Dims
from ..tensors.positions import random_positions
from ..updates import Additive, tensor

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random

SEED = 777
"""Of the positions of a fresh update: PEFT's own, so that its files can say them."""
LARGEST = 1 << 34
"""Elements of a weight that is believed: the size of a law's own is no more than two numbers in a file."""


class Coefficients(Additive):
    """W' = W + scaling * inverse(F), F[index[0], index[1]] = spectrum and 0 elsewhere, of `[outputs, inputs]`."""

    linear_only = True
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})

    index: Tensor = tensor("2 n", integer=True, below="out in", distinct=True)
    spectrum: Tensor = tensor("n")
    outputs: int
    inputs: int
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        out, in_ = W.shape
        flat = random_positions(SEED, out * in_, rank)
        index = flat.new_tensor([(flat // in_).tolist(), (flat % in_).tolist()])
        return cls(outputs=out, inputs=in_, **{"index": index, "spectrum": W.new_zeros(len(flat)), **attributes})

    def dims(self, stack: bool = False) -> Dims:
        return super().dims(stack) | {"out": self.outputs, "in": self.inputs}

    def check(self) -> None:
        super().check()
        if self.outputs < 1 or self.inputs < 1 or self.outputs * self.inputs > LARGEST:
            why = f"no weight is {self.outputs} x {self.inputs}"
            raise Malformed(why, where="outputs, inputs", cure="Write the adapter again")

"""Base class of methods that store a few coefficients at random positions, and transform them to a change of W."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Additive, Rule, attribute, tensor
from ..linalg.positions import random_positions

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random

SEED = 777
"""The seed for the random positions of a new update. PEFT's files store a seed, by default 777, but no positions."""


class Coefficients(Additive):
    """W' = W + scaling * transform(F); F `[outputs, inputs]` has `spectrum` at `index`, and 0 elsewhere."""

    linear_only = True
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})
    rules: ClassVar[tuple[Rule, ...]] = (
        # Limit the size of F, because it depends only on two integers in the file. Without the limit, a damaged file
        # could require any amount of memory.
        Rule(
            require="outputs * inputs <= 2 ** 34",
            where="outputs, inputs",
            error="Malformed",
            meaning="the sizes exceed the limit of 2 ** 34 elements",
        ),
        Rule(define="out", value="outputs"),
        Rule(define="in", value="inputs"),
    )

    index: Tensor = tensor("2 n", integer=True, below="out in", distinct=True)
    spectrum: Tensor = tensor("n")
    outputs: int = attribute(least=1)
    inputs: int = attribute(least=1)
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        out, in_ = W.shape
        flat = random_positions(SEED, out * in_, rank)
        index = flat.new_tensor([(flat // in_).tolist(), (flat % in_).tolist()])
        return cls.from_fields(
            outputs=out, inputs=in_, **{"index": index, "spectrum": W.new_zeros(len(flat)), **attributes}
        )

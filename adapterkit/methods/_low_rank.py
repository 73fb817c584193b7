"""Base class of methods whose change is a low-rank product B @ A, computed from the fields and the weight's shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, cast

from ..core.updates import Additive, OutputUpdate, Rule, of_pair, tensor
from ..errors import USE_ITS_BASE, NotMergeable, ShapeMismatch, UsageError
from ..linalg.namespace import namespace
from ..linalg.products import product

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class LowRank(Additive):
    """W' = W + B @ A. Subclasses compute both factors in `pair`."""

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return B `[out, r]` and A `[r, in * k]`, including all scales, for a weight of `shape` = `[out, in, *k]`."""
        raise NotMergeable(f"{self.method} has no formula")

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        B, A = self.pair(shape)
        return (B @ A).reshape(shape)

    def delta_into(self, D: Tensor, weight: float) -> None:
        if D.ndim == 2:
            B, A = self.pair(tuple(D.shape))
            product(D, weight * B, A)
        else:
            super().delta_into(D, weight)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        B, A = self.pair(shape)
        return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))

    @of_pair
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        B, A = self.pair(layer.shape)
        return layer(x) + layer.mix(layer.op(x, A.reshape(len(A), *layer.shape[1:])), B)


def block_diagonal(blocks: Tensor) -> Tensor:
    """Place blocks `[n, rows, columns]` on the diagonal of a matrix `[n * rows, n * columns]`."""
    n, rows, columns = blocks.shape
    identity = namespace(blocks).eye(n, dtype=blocks.dtype, device=getattr(blocks, "device", None))
    return (blocks[:, :, None, :] * identity[:, None, :, None]).reshape(n * rows, n * columns)


# Base class of PEFT's LoRA for grouped convolutions. A reads the channels of all groups, and B mixes only channels of
# the same group.


class AcrossGroups(OutputUpdate):
    """A is a convolution over all `inputs` channels; B is a 1x1 convolution with `r / share` groups."""

    acts_on = "the output, from the channels of all groups"
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="share >= 1 and r % share == 0 and out % (r // share) == 0",
            where="B",
            meaning="the rank and the outputs do not divide into groups",
        ),
    )
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="inputs == in * (r // share) and axes(A) == kernel + 2",
            meaning="the adapter was made for another number of channels, groups or kernel axes",
        ),
    )

    A: Tensor = tensor("r inputs *k")
    B: Tensor = tensor("out share")
    scaling: float = 1.0
    zero_padded: bool = False

    @property
    def groups(self) -> int:
        """The number of groups of the layer."""
        return int(self.A.shape[0] // self.B.shape[1])

    @property
    def channels(self) -> int:
        return cast(int, self.dims()["out"])

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        kernel = tuple(self.A.shape[2:])
        if kernel != tuple(shape[2:]):
            why = f"the adapter was made for a kernel of {list(kernel)}; the weight has the shape {list(shape)}"
            raise ShapeMismatch(why, cure=USE_ITS_BASE)

    def read(self, x: Tensor, layer: Layer) -> Tensor:
        """Return scaling * B @ A(x), which is added to the layer's output."""
        h = layer.zero_padded(x, self.A) if self.zero_padded else layer.op(x, self.A)
        return layer.mix(h, self.across()) * self.scaling

    def across(self) -> Tensor:
        """Return B as a matrix `[out, r]`, in which all elements that would mix different groups are 0."""
        out, share = self.B.shape
        return block_diagonal(self.B.reshape(self.groups, out // self.groups, share))


def fresh_pair(W: Tensor, rank: int, groups: int, random: Random) -> dict[str, Tensor]:
    """Return a random A and a B of zeros for a weight `[out, in / groups, *k]`.

    Raises:
        UsageError: the rank is not a multiple of the number of groups.
    """
    if groups < 1 or rank % groups:
        why = f"rank {rank} is not a multiple of {groups} groups"
        raise UsageError(why, where="groups", cure="Pass a rank that is a multiple of groups=")
    A = random((rank, groups * W.shape[1], *W.shape[2:])) / (groups * math.prod(W.shape[1:])) ** 0.5
    return {"A": A, "B": W.new_zeros(len(W), rank // groups)}

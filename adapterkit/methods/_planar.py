"""What methods of plain weights `[out, in]`, of linear layers and embeddings, have in common. No methods themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import Malformed, ShapeMismatch
from ..shapes import Dims
from ..tensors.lazy import as_lazy
from ..tensors.positions import outside
from ..updates import Additive
from ._low_rank import LowRank as Thin

if TYPE_CHECKING:
    from torch import Tensor


LARGEST = 1 << 34
"""Elements of a weight that is believed: the size of a law's own is no more than two numbers in a file."""


class Planar(Additive):
    """W' = W + D for W `[out, in]`; its whole numbers are positions, checked against the axes they are on."""

    def check_values(self) -> None:
        super().check_values()
        worst = self._outside({})
        if worst is not None:
            raise Malformed(worst[1], where=worst[0], cure="Write the adapter again")

    def check_against(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise ShapeMismatch(f"{self.method} changes linear layers and embeddings only", cure="Take this target out")
        worst = self._outside({"out": shape[0], "in": shape[1]})
        if worst is not None:
            raise ShapeMismatch(f"{worst[0]}: {worst[1]}", cure="The adapter is not of this base")

    def _outside(self, sizes: Dims) -> tuple[str, str] | None:
        """The first field with a position that is not on its axis, and what is wrong with it."""
        sizes = {**self.dims(self._stacked), **sizes}
        for name, leaf in self.tensors.items():
            below = self.tensor_fields()[name].metadata["below"]
            bounds: Any = tuple(sizes.get(axis) for axis in below)
            worst = outside(leaf, bounds) if bounds else None
            if worst is not None:
                said = " and ".join(
                    f"{axis}={size}" if size else axis for axis, size in zip(below, bounds, strict=True)
                )
                return name, f"position {worst} is not on {said}"
        return None

    @property
    def _stacked(self) -> bool:
        fields = self.tensor_fields()
        return any(len(leaf.shape) > len(fields[name].metadata["axes"].axes) for name, leaf in self.tensors.items())


class Sized(Planar):
    """A law that is of one size of weight: coefficients of a transform of `[outputs, inputs]`."""

    outputs: int
    inputs: int

    def dims(self, stack: bool = False) -> Dims:
        return super().dims(stack) | {"out": self.outputs, "in": self.inputs}

    def check(self) -> None:
        super().check()
        if self.outputs < 1 or self.inputs < 1 or self.outputs * self.inputs > LARGEST:
            why = f"no weight is {self.outputs} x {self.inputs}"
            raise Malformed(why, where="outputs, inputs", cure="Write the adapter again")


class Sparse(Planar):
    """A law with a list of positions, none of which comes twice."""

    def check_values(self) -> None:
        super().check_values()
        index = as_lazy(self.tensors["index"]).numpy().astype("int64")
        if len(self.tensor_fields()["index"].metadata["below"]) == 2:
            columns = index[..., 1, :]
            index = index[..., 0, :] * (int(columns.max(initial=0)) + 1) + columns
        ordered = index.copy()
        ordered.sort(-1)
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise Malformed("the same position twice", where="index", cure="Write the adapter again")


class LowRank(Planar, Thin):
    """D = B @ A for factors that the method computes."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[r, in]` and B `[out, r]`."""
        raise AssertionError("each method has its own")

    def pair(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        A, B = self.factors()
        return B, A

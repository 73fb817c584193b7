"""What methods of plain weights `[out, in]`, of linear layers and embeddings, have in common. No methods themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import Malformed, ShapeMismatch
from ..shapes import Dims
from ..tensors.lazy import as_lazy
from ..tensors.positions import outside
from ..tensors.products import product
from ..updates import Additive

if TYPE_CHECKING:
    from torch import Tensor


class Planar(Additive):
    """W' = W + D for W `[out, in]`; its whole numbers are positions, checked against the axes they are on."""

    def check_values(self) -> None:
        super().check_values()
        self._check_positions({})

    def check_against(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise ShapeMismatch(f"{self.method} changes linear layers and embeddings only", cure="Take this target out")
        self._check_positions({"out": shape[0], "in": shape[1]})

    def _check_positions(self, sizes: Dims) -> None:
        sizes = {**self.dims(self._stacked), **sizes}
        for name, leaf in self.tensors.items():
            below = self.tensor_fields()[name].metadata["below"]
            bounds: Any = tuple(sizes.get(axis) for axis in below)
            worst = outside(leaf, bounds) if bounds else None
            if worst is not None:
                said = " and ".join(f"{axis} {size or ''}".rstrip() for axis, size in zip(below, bounds, strict=True))
                raise Malformed(f"position {worst} is not on {said}", where=name, cure="It is not of this base")

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
        if self.outputs < 1 or self.inputs < 1:
            raise Malformed("a weight without elements", where="outputs, inputs", cure="Write the adapter again")


class Sparse(Planar):
    """A law with a list of positions, none of which comes twice."""

    def check_values(self) -> None:
        super().check_values()
        index = as_lazy(self.tensors["index"]).numpy()
        pairs = index if len(self.tensor_fields()["index"].metadata["below"]) == 2 else index[..., None, :]
        for one in pairs.reshape(-1, *pairs.shape[-2:]):
            if len(set(map(tuple, one.T.tolist()))) < one.shape[1]:
                raise Malformed("the same position twice", where="index", cure="Write the adapter again")


class LowRank(Planar):
    """D = B @ A for factors that the method computes."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[r, in]` and B `[out, r]`."""
        raise AssertionError("each method has its own")

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        A, B = self.factors()
        return (B @ A).reshape(shape)

    def delta_into(self, D: Tensor, weight: float) -> None:
        A, B = self.factors()
        product(D, weight * B, A)

    def delta_norm(self, shape: tuple[int, ...]) -> float:
        A, B = self.factors()
        return math.sqrt(max(float(((B.mT @ B) * (A @ A.mT)).sum()), 0.0))

    def forward(self, x: Any, layer: Any) -> Any:
        A, B = self.factors()
        return layer(x) + layer.mix(layer.op(x, A), B)

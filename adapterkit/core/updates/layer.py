"""The interface of a layer that a formula may use, in any backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Layer(Protocol):
    """A backend's view of one target; `OutputUpdate` explains each name.

    As in all formulas, the type `Tensor` also covers numpy arrays and symbolic values of a graph.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight, `[out, in, *k]`."""
        ...

    @property
    def channel(self) -> int:
        """The axis of the output's channels."""
        ...

    @property
    def weight(self) -> Tensor:
        """The current weight, `[out, in, *k]`."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The current bias, `[out]`."""

    @property
    def call(self) -> Mapping[str, Any]:
        """The arguments of the model's own call, by name."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Return the complete output."""
        ...

    def op(self, x: Tensor, w: Tensor) -> Tensor:
        """Apply another weight with the same geometry (stride, padding, lookup)."""
        ...

    def zero_padded(self, x: Tensor, w: Tensor) -> Tensor:
        """Apply `op` with zeros around the input and without dilation."""
        ...

    def mix(self, h: Tensor, w: Tensor) -> Tensor:
        """Mix channels by a matrix `[out, r]`, as a 1x1 convolution does."""
        ...

    def per_channel(self, v: Tensor) -> Tensor:
        """Reshape a vector `[out]` so that it can be added to the output."""
        ...

    def hidden(self, x: Tensor) -> Tensor:
        """Return the output before a residual is added and the sum is normalised."""
        ...

    def residual(self, x: Tensor) -> Tensor | None:
        """Return the value that is added to the output, or None."""

    def norm(self, h: Tensor) -> Tensor:
        """Return the normalised sum; h itself if the layer does not normalise."""
        ...

    def close(self, h: Tensor, x: Tensor, whole: bool = True) -> Tensor:
        """Return the layer's output if `hidden(x)` were h. If `whole` is false, add neither residual nor norm."""
        ...

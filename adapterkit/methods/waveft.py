"""WaveFT: W' = W + scaling * idwt2(F), F sparse.  Bilican et al. 2025, https://arxiv.org/abs/2505.12532

The adapter stores some coefficients of a one-level wavelet transform of the change. Without a filter, the coefficients
are the elements of the change themselves. With a filter of L taps, the transform pads an axis of n elements at both
ends. The padded axis has N elements: `n + L - 2`, or one more if this number is odd. With a filter, the value 0 in
`index` means the position `(N - n) // 2` of the padded axis, the value 1 means the next position, and so on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import Rule, tensor
from ..linalg.namespace import namespace
from ..linalg.positions import counting, scattered
from ._coefficients import Coefficients

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random


class WaveFT(Coefficients):
    """W' = W + scaling * (inverse transform of F), where F[index[0], index[1]] = spectrum, and F is 0 elsewhere."""

    paper = "https://arxiv.org/abs/2505.12532"
    frozen: ClassVar[frozenset[str]] = frozenset({"index", "low_pass"})
    rules: ClassVar[tuple[Rule, ...]] = (
        *Coefficients.rules,
        Rule(
            require="taps >= 2 and taps % 2 == 0",
            when="has(low_pass)",
            where="low_pass",
            error="Malformed",
            meaning="the filter must have an even number of taps, at least 2",
        ),
    )

    low_pass: Tensor | None = tensor("taps", optional=True)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: object) -> Self:
        return super().initial(W, b, rank, random, **{"low_pass": W.new_tensor([0.5**0.5] * 2), **attributes})

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        rows, columns = self.index[0], self.index[1]
        if self.low_pass is None:
            return self.scaling * scattered(self.spectrum, rows * shape[1] + columns, shape)
        taps = self.low_pass.shape[0]
        lower, down = _band(rows, shape[0], taps)
        right, across = _band(columns, shape[1], taps)
        # PEFT swaps the axes: a coefficient's column selects the filter along the outputs, and its row selects the
        # filter along the inputs. A coefficient in the right half has the high-pass filter along the outputs. A
        # coefficient in the lower half has the high-pass filter along the inputs.
        patches = _taps(self.low_pass, right)[:, :, None] * _taps(self.low_pass, lower)[:, None, :]
        inside = _on(down, shape[0])[:, :, None] & _on(across, shape[1])[:, None, :]
        flat = (down[:, :, None] * shape[1] + across[:, None, :]) * inside
        return self.scaling * scattered(self.spectrum[:, None, None] * patches * inside, flat, shape)


def _band(positions: Tensor, size: int, taps: int) -> tuple[Tensor, Tensor]:
    """For one axis, return the half that contains each coefficient, and the positions that its filter covers.

    The first tensor, `[n]`, is True for a coefficient in the second half of the padded axis. Row i of the second
    tensor, `[n, taps]`, contains the positions that the filter of coefficient i covers on the axis of the change.
    """
    padded = size + taps - 2 + size % 2
    at = positions + (padded - size) // 2
    half = padded // 2
    steps = counting(taps, positions)
    return at >= half, (2 * (at % half) - (taps - 2))[:, None] + steps[None, :]


def _taps(low: Tensor, high: Tensor) -> Tensor:
    """Return the filter of each coefficient, `[n, taps]`.

    For coefficient i, this is the high-pass filter if `high[i]` is True, else `low`. The high-pass filter is `low` in
    reverse order with alternating signs.
    """
    mirrored = namespace(low).flip(low) * (1 - 2 * (counting(low.shape[0], low) % 2))
    return high[:, None] * mirrored[None, :] + ~high[:, None] * low[None, :]


def _on(positions: Tensor, size: int) -> Tensor:
    return (positions >= 0) & (positions < size)

"""Arcee Fusion: keep only the most important entries of a change.

The importance of an entry is I = |D| KL(softmax(W + D) || softmax(W)), where the softmax and the KL divergence are
computed over the entry's row. An entry is kept if its I is at least the median of I over the tensor plus 1.5
interquartile ranges. The formula contains W, so it needs the base.

Source: https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md. mergekit estimates the quartiles of large
tensors from a million random entries; this module computes exact quartiles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ._entrywise import Entrywise

if TYPE_CHECKING:
    from ...io.computed import Array
    from ..blocks import Blocks
    from ..context import FormulaContext
    from ._entrywise import Formula


class ArceeFusion(Entrywise):
    """lambda * D [I >= median + 1.5 (q3 - q1)]."""

    title = "Arcee Fusion"
    paper = "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md"
    takes = (1, 1)
    based: ClassVar[bool] = True
    compat: ClassVar = {"mergekit": {}}

    def formula(self, blocks: Blocks, weights: Array, at: FormulaContext) -> Formula:
        import numpy as np

        W = at.base().reshape(blocks.shape)

        def importance(changes: Array, rows: slice) -> tuple[Array, Array]:
            D = weights[0] * changes[0]
            return D, np.abs(D) * _divergence(W[rows] + D, W[rows])

        least = _threshold(np.concatenate([importance(each, rows)[1].reshape(-1) for rows, each in blocks]))

        def formula(changes: Array, rows: slice) -> Array:
            D, sizes = importance(changes, rows)
            result: Array = self.scale * D * (sizes >= least)
            return result

        return formula


def _divergence(one: Array, other: Array) -> Array:
    """Return KL(softmax(one) || softmax(other)) for each row, `[..., 1]`."""
    import numpy as np

    p, q = _softmax(one) + LEAST, _softmax(other) + LEAST
    result: Array = (p * np.log(p / q)).sum(-1, keepdims=True)
    return result


def _softmax(X: Array) -> Array:
    import numpy as np

    # Subtracting the maximum keeps exp from overflowing, and does not change the softmax.
    powers = np.exp(X - X.max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def _threshold(importance: Array) -> float:
    """Return the median of the importances plus 1.5 interquartile ranges.

    If a quartile or the median lies between two values, the smaller value is used.
    """
    import numpy as np

    places = [int(quartile * (len(importance) - 1)) for quartile in (0.25, 0.5, 0.75)]
    first, median, third = np.partition(importance, places)[places]
    return float(median + 1.5 * (third - first))


LEAST = 1e-8
"""The number that is added to each probability, so that its logarithm is finite."""

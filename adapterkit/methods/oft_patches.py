"""OFT on patches of a convolution's input, as PEFT trains it: y' = conv(rotated(x)).

Qiu et al. 2023, https://arxiv.org/abs/2306.07280. PEFT splits x into all patches of the kernel's size that lie inside
the image. It rotates each patch by OFT's rotations, and adds up overlapping patches. Before this sum, PEFT stores the
values of each channel ordered by patch, but reads them as if they were ordered by position within the patch. This mixes
up the values. PEFT's merge rotates the weight, not the patches. If the image has two or more patches, the merged layer
computes a different function: the function of the method `oft`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..core.updates import OutputUpdate, Rule, attribute, tensor
from ..errors import Unsupported
from ..linalg.namespace import namespace, summed
from ..linalg.rotations import shortened_blocks, skew, turned
from ._low_rank import block_diagonal

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates.update import Layer


class OFTPatches(OutputUpdate):
    """Rotates each patch of the layer's input by blockdiag(R), and adds up the overlapping patches."""

    paper = "https://arxiv.org/abs/2306.07280"
    acts_on = "the input (in overlapping patches)"
    moves_input = True
    since: ClassVar[tuple[str, ...]] = ("1.1",)
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(require="block(p) > 0", where="pairs", meaning="its length is not b * (b - 1) / 2 for any block size b"),
        Rule(define="b", value="block(p)"),
    )
    fits: ClassVar[tuple[Rule, ...]] = (
        Rule(
            require="in > 0 and (kernel == 0 or kernel == 2)",
            meaning="the layer is neither linear nor a two-dimensional convolution",
        ),
        Rule(require="columns % b == 0 and (n == 1 or n * b == columns)", meaning="the blocks do not fill a patch"),
    )

    pairs: Tensor = tensor("n p")
    terms: int = attribute(0, least=0, most=100)
    doubled: bool = False
    coft: bool = False
    eps: float = 6e-5

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """Run the layer on the rotated input.

        Raises:
            Unsupported: the layer is a transposed convolution or a convolution with groups, or it has no weight matrix.
        """
        if len(layer.shape) < 2:
            cure = "Target a linear layer or a convolution that is not transposed"
            raise Unsupported("the target is neither a linear layer nor a convolution", cure=cure)
        channels, high, wide = (*layer.shape[1:], 1, 1)[:3]
        given = x.shape[-3] if len(layer.shape) > 2 else channels
        # In an exported graph, the number of channels may be unknown. Then it is not an int, so skip the check.
        if isinstance(given, int) and given != channels:
            cure = "Convert the update to oft and merge the result, as PEFT's merge does, or remove this layer"
            why = f"each patch has {given} channels, but each group of the convolution has {channels}"
            raise Unsupported(why, cure=cure)
        if high * wide == 1:
            return layer(layer.mix(x, self._mix(channels, 1)))
        places = [(i, j) for i in range(high) for j in range(wide)]
        patches = namespace(x).concat([x[(..., *_within(i, j, high, wide))] for i, j in places], axis=-3)
        patches = layer.mix(patches, self._mix(channels, len(places)))
        rows, columns = x.shape[-2] + 1 - high, x.shape[-1] + 1 - wide
        by_patch = patches.reshape(-1, len(places), channels, rows * columns).swapaxes(1, 2).swapaxes(2, 3)
        by_place = by_patch.reshape(-1, channels, len(places), rows * columns).swapaxes(1, 2)
        patches = by_place.reshape(-1, len(places) * channels, rows, columns)
        parts = (patches[..., n * channels : (n + 1) * channels, :, :] for n in range(len(places)))
        return layer(summed(_bordered(x, part, *place, high, wide) for part, place in zip(parts, places, strict=True)))

    def _mix(self, channels: int, places: int) -> Tensor:
        """Return blockdiag(R)^T for patches whose values are ordered by position, then by channel.

        The adapter's blocks expect values ordered by channel, then by position. So the rows and columns of
        blockdiag(R)^T are reordered.
        """
        Q = skew(self.pairs)
        R = turned(shortened_blocks(Q, self.eps) if self.coft else Q, self.terms, self.doubled)
        count = channels * places // R.shape[-1]
        M = block_diagonal(R if len(R) > 1 else R[[0] * count]).mT
        order = [channel * places + place for place in range(places) for channel in range(channels)]
        return M[order][:, order]


def _within(i: int, j: int, high: int, wide: int) -> tuple[slice, slice]:
    """Return a slice of rows and a slice of columns that select the pixel (i, j) of every patch of an image.

    A patch has `high` rows and `wide` columns.
    """
    return slice(i, i + 1 - high or None), slice(j, j + 1 - wide or None)


def _bordered(x: Tensor, part: Tensor, i: int, j: int, high: int, wide: int) -> Tensor:
    """Pad `part` with zeros to the size of the image `x`. The slices from `_within` select `part` in the result."""
    rows, _ = _within(i, j, high, wide)
    for axis, before, behind, strip in ((-1, j, wide - 1 - j, x[..., rows, :]), (-2, i, high - 1 - i, x)):
        whole: tuple[Any, ...] = (slice(None),) * (-1 - axis)
        sides = [strip[(..., slice(0, before), *whole)] * 0] if before else []
        other = [strip[(..., slice(-behind, None), *whole)] * 0] if behind else []
        part = namespace(x).concat([*sides, part, *other], axis=axis) if sides or other else part
    return part

"""FourierFT: W' = W + scaling * Re(ifft2(F)), F sparse.  Gao et al. 2024, https://arxiv.org/abs/2405.03003

Some coefficients of a two-dimensional discrete Fourier transform of the change, at positions that were drawn at random
and are kept with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..tensors.namespace import namespace
from ..tensors.positions import random_positions, scattered
from ..updates import tensor
from ._planar import Sized, Sparse

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random

SEED = 777
"""Of the positions of a fresh update: PEFT's own, so that its files can say them."""


class FourierFT(Sized, Sparse):
    """W' = W + scaling * Re(ifft2(F)), F[index[0], index[1]] = spectrum and 0 elsewhere, of `[outputs, inputs]`."""

    paper = "https://arxiv.org/abs/2405.03003"
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})

    index: Tensor = tensor("2 n", integer=True, below="out in")
    spectrum: Tensor = tensor("n")
    scaling: float = 1.0

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        out, in_ = W.shape
        flat = random_positions(SEED, out * in_, rank)
        index = flat.new_tensor([(flat // in_).tolist(), (flat % in_).tolist()])
        return cls(outputs=out, inputs=in_, **{"index": index, "spectrum": W.new_zeros(len(flat)), **attributes})

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        xp = namespace(self.spectrum)
        # A transform is not to be had in 16 bits.
        spectrum = xp.astype(self.spectrum, xp.result_type(self.spectrum.dtype, xp.float32))
        dense = scattered(spectrum, self.index[0] * shape[1] + self.index[1], shape)
        D: Tensor = self.scaling * xp.fft.ifftn(dense, axes=(0, 1)).real
        return xp.astype(D, self.spectrum.dtype)  # type: ignore[no-any-return]

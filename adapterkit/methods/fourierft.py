"""FourierFT: W' = W + scaling * Re(ifft2(F)) for a sparse F.  Gao et al. 2024, https://arxiv.org/abs/2405.03003

The adapter stores some coefficients of the two-dimensional discrete Fourier transform of the change. It also stores
their positions, which were drawn at random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..linalg.namespace import namespace
from ..linalg.positions import scattered
from ._coefficients import Coefficients

if TYPE_CHECKING:
    from torch import Tensor


class FourierFT(Coefficients):
    """W' = W + scaling * Re(ifft2(F)), where F `[outputs, inputs]` has `spectrum` at `index`, else 0."""

    paper = "https://arxiv.org/abs/2405.03003"

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        xp = namespace(self.spectrum)
        # Transform in float32 or wider, because no library has a 16-bit Fourier transform on the CPU.
        spectrum = xp.astype(self.spectrum, xp.result_type(self.spectrum.dtype, xp.float32))
        dense = scattered(spectrum, self.index[0] * shape[1] + self.index[1], shape)
        D: Tensor = self.scaling * xp.fft.ifftn(dense, axes=(0, 1)).real
        return xp.astype(D, self.spectrum.dtype)

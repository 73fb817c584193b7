"""Halves: half of the weighted sum, an example of a combiner in a package of its own."""

from __future__ import annotations

from typing import Any

from adapterkit.ops.combiners._combiner import Mixture


class Halves(Mixture):
    """Half of the weighted sum of the changes."""

    title = "Halves"
    paper = "https://example.org/halves"

    def coefficients(self, gram: Any, weights: Any) -> Any:
        """The factor of each change."""
        return weights / 2

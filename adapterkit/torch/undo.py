"""What `merge_` keeps of the weights that it changes, so that `unmerge_` gives their exact bits back.

`copy` keeps the weights themselves. `recompute` keeps the adapter, which the handle has anyway, and where subtracting
its change from the merged weight does not round to the bits that were there, what these were: a few numbers in a
hundred where the change is small beside the weight. The subtraction is the merge itself with the adapter's weight
negated, so it gives the same bits each time; a checksum of the result refuses any others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

KEEPS = ("copy", "recompute")
"""What `merge_` may keep."""

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Merged:
    """A parameter that a merge changed, and what gives its bits from before.

    Attributes:
        parameter: it.
        before: its bits from before; None where they are computed again.
        places: flat positions where computing again gives other bits.
        values: the bits there.
        checksum: of the bits from before.
        version: torch's count of the parameter's changes after the merge.
    """

    parameter: Tensor
    before: Tensor | None
    places: Tensor | None = None
    values: Tensor | None = None
    checksum: tuple[int, int] = (0, 0)
    version: int = -1

    @property
    def is_last(self) -> bool:
        """Whether nothing changed the parameter since."""
        return _MERGES[self.parameter][-1] is self and self.parameter._version == self.version

    def push(self) -> None:
        """Note the merge as the last change of the parameter."""
        self.version = self.parameter._version
        _MERGES.setdefault(self.parameter, []).append(self)

    def pop(self) -> None:
        """Note that the merge is undone; the merge before this one is then the parameter's last change."""
        merges = _MERGES[self.parameter]
        merges.pop()
        if merges:
            merges[-1].version = self.parameter._version

    def slim(self, again: Tensor) -> None:
        """Keep only the places where the bits computed again differ, if that takes less memory.

        Args:
            again: what subtracting the change gave.
        """
        assert self.before is not None
        was, now = _bits(self.before), _bits(again)
        places = (was != now).nonzero().flatten()
        if len(places) * (8 + was.element_size()) < was.numel() * was.element_size():
            self.places, self.values, self.checksum, self.before = places, was[places], _checksum(was), None

    def restored(self, again: Tensor) -> Tensor | None:
        """Return the bits from before, as a tensor; None where the checksum is another.

        Args:
            again: what subtracting the change gave.
        """
        if self.before is not None:
            return self.before
        assert self.places is not None
        assert self.values is not None
        found = again.detach().clone(memory_format=torch.contiguous_format)
        bits = _bits(found)
        bits[self.places] = self.values
        return found if _checksum(bits) == self.checksum else None


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_WHOLE[flat.element_size()])


def _checksum(bits: Tensor) -> tuple[int, int]:
    return int(torch.hash_tensor(bits).view(torch.int64)), int(bits.sum(dtype=torch.int64))


_MERGES: Any = WeakIdKeyDictionary()
"""Parameter -> the merges that can be undone, in their order."""

"""DoRA for a grouped convolution, as in PEFT: y' = b + magnitude / n * (y - b + scaling * B @ A(x)).

Liu et al. 2024, https://arxiv.org/abs/2402.09353; https://github.com/huggingface/peft/pull/2403. A and B are as in
`grouped_lora`: A reads the channels of all groups. W `[out, in / groups, *k]` has no entries for channels of other
groups, so the change cannot be merged. For each output, n is the norm of W + scaling * B @ A over all channels; W
counts as zero for channels of other groups. With `regrouped`, n is PEFT's divisor instead: the norm of
W + scaling * B' @ A in the shape of W, where B' is B reshaped to `[out / groups, r]`. If there is only one
group, both norms equal DoRA's norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..linalg.namespace import constant, lengths, namespace
from ._low_rank import AcrossGroups, fresh_pair

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class GroupedDoRA(AcrossGroups):
    """A reads all `inputs` channels; B has r / share groups; each output is multiplied by magnitude / n."""

    paper = "https://arxiv.org/abs/2402.09353"
    since: ClassVar[tuple[str, ...]] = ("1.1",)
    sizes: ClassVar[Mapping[str, int]] = {"groups": 1}

    magnitude: Tensor = tensor("out")
    regrouped: bool = False

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, groups: int | None = None, **attributes: object
    ) -> Self:
        groups = cls.sizes["groups"] if groups is None else groups
        norm = (W * W).reshape(len(W), -1).sum(1) ** 0.5
        return cls.from_fields(**fresh_pair(W, rank, groups, random), magnitude=norm, **attributes)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        factor, y, b = layer.per_channel(self.magnitude / self._norm(layer.weight)), layer(x), layer.bias
        if b is None:
            return (y + self.read(x, layer)) * factor
        b = layer.per_channel(b)
        return (y - b + self.read(x, layer)) * factor + b

    def _norm(self, W: Tensor) -> Tensor:
        """Return the norm n `[out]` of each output, for W `[out, in / groups, *k]`."""
        (r, *_), (out, _), groups = self.A.shape, self.B.shape, self.groups
        A, W = self.A.reshape(r, -1), W.reshape(out, -1)
        if self.regrouped:
            V = W + self.scaling * (self.B.reshape(-1, r) @ A).reshape(out, -1)
        else:
            diagonal = namespace(W).eye(groups, dtype=W.dtype, device=getattr(W, "device", None))
            D = (self.scaling * self.across() @ A).reshape(groups, out // groups, groups, -1)
            V = (D + diagonal[:, None, :, None] * W.reshape(groups, out // groups, 1, -1)).reshape(out, -1)
        return constant(lengths((V * V).sum(1)))

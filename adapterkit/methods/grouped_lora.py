"""LoRA across the groups of a convolution, as in PEFT: y' = y + scaling * (B @ A(x) + bias).

Hu et al. 2021, https://arxiv.org/abs/2106.09685; https://github.com/huggingface/peft/pull/2403. A is a convolution
without groups: it reads all channels. B mixes within groups: its rows for the first group of outputs read the first
`share` channels of A(x), and so on. So each output depends on channels of other groups, for which
W `[out, in / groups, *k]` has no entries. A LoRA that stays within the groups is the method `lora`, which can be
merged. With `zero_padded`, A pads its input with zeros and has no dilation, even if the layer has another padding mode
or a dilation, because PEFT copies only the layer's kernel size, stride and amount of padding to A.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import attribute, tensor
from ._low_rank import AcrossGroups, fresh_pair

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class GroupedLoRA(AcrossGroups):
    """A reads all `inputs` channels; B has r / share groups."""

    paper = "https://arxiv.org/abs/2106.09685"
    sizes: ClassVar[Mapping[str, int]] = {"groups": 1}
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")

    bias: Tensor | None = tensor("out", optional=True)
    zero_padded: bool = attribute(False, since=2)

    @classmethod
    def initial(
        cls, W: Tensor, b: Tensor | None, rank: int, random: Random, *, groups: int | None = None, **attributes: object
    ) -> Self:
        groups = cls.sizes["groups"] if groups is None else groups
        return cls.from_fields(**fresh_pair(W, rank, groups, random), **attributes)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y = layer(x) + self.read(x, layer)
        return y if self.bias is None else y + layer.per_channel(self.scaling * self.bias)

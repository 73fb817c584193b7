"""LoRA across the groups of a convolution, as PEFT has it: y' = y + scaling * (B @ A(x) + bias).

Hu et al. 2021, https://arxiv.org/abs/2106.09685; https://github.com/huggingface/peft/pull/2403.
A is a convolution without groups: it reads all channels. B mixes within groups: its first rows read the first channels
of A(x), and so on. So each output depends on channels of other groups, for which W `[out, in / groups, *k]` has no
place. A LoRA that keeps to the groups is `lora`, and merges. With `zero_padded` A reads zeros around the input and is
not dilated, whatever the layer does: PEFT makes A with the layer's kernel, stride and padding alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from ..errors import ShapeMismatch, UsageError
from ..updates import OutputUpdate, Rule, attribute, tensor
from ._low_rank import block_diagonal

if TYPE_CHECKING:
    from torch import Tensor

    from ..updates import Random


class GroupedLoRA(OutputUpdate):
    """A over all `inputs`, B in r / share groups."""

    paper = "https://arxiv.org/abs/2106.09685"
    acts_on = "the output by channels of all groups"
    sizes: ClassVar[Mapping[str, int]] = {"groups": 1}
    since: ClassVar[tuple[str, ...]] = ("1.0", "1.1")
    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(require="share >= 1 and r % share == 0 and out % (r // share) == 0", where="B"),
    )

    A: Tensor = tensor("r inputs *k")
    B: Tensor = tensor("out share")
    bias: Tensor | None = tensor("out", optional=True)
    scaling: float = 1.0
    zero_padded: bool = attribute(False, since=2)

    @classmethod
    def initial(cls, W: Tensor, b: Tensor | None, rank: int, random: Random, **attributes: Any) -> Self:
        groups = attributes.pop("groups", cls.sizes["groups"])
        if groups < 1 or rank % groups:
            raise UsageError(f"rank {rank} in {groups} groups", where="groups", cure="Choose numbers that divide")
        A = random((rank, groups * W.shape[1], *W.shape[2:])) / (groups * math.prod(W.shape[1:])) ** 0.5
        return cls(A=A, B=W.new_zeros(len(W), rank // groups), **attributes)

    @property
    def channels(self) -> int:
        return cast(int, self.dims()["out"])

    def check_against(self, shape: tuple[int, ...]) -> None:
        super().check_against(shape)
        (_, inputs, *kernel), groups = self.A.shape, self.A.shape[0] // self.B.shape[1]
        if (inputs, *kernel) != (groups * shape[1], *shape[2:]):
            why = f"made for {inputs} channels in {groups} groups and a kernel of {kernel}; the weight is {list(shape)}"
            raise ShapeMismatch(why, cure="Is this the base that the adapter was trained on?")

    def forward(self, x: Any, layer: Any) -> Any:
        (out, share), groups = self.B.shape, len(self.A) // self.B.shape[1]
        B = block_diagonal(self.B.reshape(groups, out // groups, share))
        read = layer.zero_padded(x, self.A) if self.zero_padded else layer.op(x, self.A)
        y = layer(x) + layer.mix(read, B) * self.scaling
        return y if self.bias is None else y + layer.per_channel(self.scaling * self.bias)

"""Poly: y' = y + B @ A x / r, where A and B are mixtures of skills; the shares are learned for each task.

Ponti et al. 2022, https://arxiv.org/abs/2202.13914. With several splits, Poly is the multi-head routing of Caccia et
al. 2023, https://arxiv.org/abs/2211.03831. In training, both papers draw the shares at random, around their
learned values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

from ..core.updates import tensor
from ..errors import ShapeMismatch
from ..linalg.activations import sigmoid
from ._routed import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.updates import Random
    from ..core.updates.update import Layer


class Poly(Routed):
    """A skill's share is s / (sum of s over the skills), with s = sigmoid(logits[task]); x is `[rows, ..., in]`."""

    paper = "https://arxiv.org/abs/2202.13914"
    acts_on = "each row's output (depending on the row's task)"
    asks = ("task_ids",)
    sizes: ClassVar[Mapping[str, int]] = {"tasks": 1, "skills": 4, "splits": 1}

    A: Tensor = tensor("splits skills in/splits r")
    B: Tensor = tensor("splits skills r out/splits")
    logits: Tensor = tensor("tasks splits*skills")

    @classmethod
    def initial(
        cls,
        W: Tensor,
        b: Tensor | None,
        rank: int,
        random: Random,
        *,
        tasks: int | None = None,
        skills: int | None = None,
        splits: int | None = None,
        **attributes: object,
    ) -> Self:
        given = {"tasks": tasks, "skills": skills, "splits": splits}
        tasks, skills, splits = (cls.sizes[name] if size is None else size for name, size in given.items())
        for size in W.shape:
            if size % splits:
                raise ShapeMismatch(
                    f"{size} channels cannot be divided into {splits} equal splits",
                    cure="Pass splits= with a divisor of the number of channels",
                )
        out, inputs = (size // splits for size in W.shape)
        A = random((splits, skills, inputs, rank)) / inputs**0.5
        logits = 1e-3 * random((tasks, splits * skills))
        return cls.from_fields(A=A, B=W.new_zeros(splits, skills, rank, out), logits=logits, **attributes)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        tasks = layer.call["task_ids"]
        if tasks.shape != x.shape[:1]:
            why = f"task_ids has the shape {list(tasks.shape)}, but the input has the shape {list(x.shape)}"
            raise ShapeMismatch(why, cure="Pass one task number for each row")
        splits, skills, part, r = self.A.shape
        shares = sigmoid(self.logits[tasks]).reshape(-1, splits, skills)
        shares = (shares / (shares.sum(-1)[..., None] + 1e-12))[..., None, None]
        if not r:
            return layer(x)  # Rank 0 adds nothing: B @ A x / r counts as 0, not as 0 / 0.
        A: Tensor = (shares * self.A).sum(2).reshape(-1, splits * part, r)
        B: Tensor = (shares * self.B).sum(2).swapaxes(1, 2).reshape(-1, r, splits * self.B.shape[-1])
        if x.ndim == 2:
            return layer(x) + (x[:, None] @ A @ B)[:, 0] / r
        rows = (slice(None), *[None] * (x.ndim - 3))
        return layer(x) + x @ A[rows] @ B[rows] / r

"""Updates of what a model reads beside its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import NotMergeable
from .update import Update

if TYPE_CHECKING:
    import torch


class ContextUpdate(Update):
    """More context than the model's input: tokens in front of it, keys and values before it, prompts to attend to.

    Its target is the whole model, `Target("")`, or the part of it that the update speaks to: an attention, an
    embedding. There is no weight to see, so the target has no layout, rows or experts. Updates of one place add up in
    the order in which they are attached, the first in front.

    Class attributes:
        place: which of the words below is the method's formula; the others add nothing.
    """

    kind = "context"
    acts_on = "the context of the model"
    place: ClassVar[str] = ""

    def embeddings(self, task: Any = None) -> torch.Tensor | None:
        """What stands in front of the embeddings of the input, an encoder's where there is one: `[n, dim]`.

        Args:
            task: for prompts of several tasks, the number of one, or numbers `[batch]`: then `[batch, n, dim]`.
        """
        return None

    def decoder_embeddings(self, task: Any = None) -> torch.Tensor | None:
        """The same for the input of a decoder that has an encoder beside it."""
        return None

    def past(self) -> torch.Tensor | None:
        """Keys and values that come before those of the input, `[layers, 2, heads, n, d]`; a decoder's."""
        return None

    def prefix(self, x: torch.Tensor) -> torch.Tensor | None:
        """Keys and values that come before those of one attention, the update's target: `[batch or 1, 2, heads, n, d]`.

        Args:
            x: what enters the attention, `[batch, m, width]`.
        """
        return self.past()

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What is added to the heads' outputs of an attention, before they are mixed: `[batch, heads, m, d]`.

        Methods of this place hold the prompt as `P`, `[n, dim]`; without their `projected` it is added after mixing.

        Args:
            q: queries of the input, `[batch, heads, m, d]`, positions already in them.
            k: keys of the prompt, `[heads, n, d]`, without positions.
            v: values of the prompt, `[heads, n, d]`.
        """
        raise NotMergeable(f"{self.method} has no formula of attention")

    def vocabulary(self) -> torch.Tensor | None:
        """Embeddings of new tokens, numbered behind the last one of the base, `[n, dim]`."""
        return None

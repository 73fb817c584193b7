"""Updates of what a model reads besides its input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from ...errors import NotMergeable
from .update import Update

if TYPE_CHECKING:
    import torch


class ContextUpdate(Update):
    """Extra context for the model: tokens before its input, keys and values before the computed ones, or prompts.

    The target is the whole model, `Target("")`, or the module that the update changes: an attention or an embedding.
    There is no weight, so the target has no layout, rows or experts. Several updates at one place are concatenated in
    the order in which they are attached, the first one in front.

    Class attributes:
        place: which of the methods below has the formula; the others add nothing.
    """

    kind = "context"
    acts_on = "the context of the model"
    place: ClassVar[str] = ""

    def embeddings(self, task: Any = None) -> torch.Tensor | None:
        """Return the vectors before the input's embeddings (the encoder's if there is one), `[n, dim]`.

        Args:
            task: for prompts of several tasks, one task number, or numbers `[batch]`; these give `[batch, n, dim]`.
        """
        return None

    def decoder_embeddings(self, task: Any = None) -> torch.Tensor | None:
        """Like `embeddings`, for the input of a decoder beside an encoder."""
        return None

    def past(self) -> torch.Tensor | None:
        """Return a decoder's keys and values before those of the input, `[layers, 2, heads, n, d]`."""
        return None

    def prefix(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return keys and values before those of one attention, the target: `[batch or 1, 2, heads, n, d]`.

        Args:
            x: the attention's input, `[batch, m, width]`.
        """
        return self.past()

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what to add to the outputs of an attention's heads, before they are mixed: `[batch, heads, m, d]`.

        Methods of this place store the prompt as `P`, `[n, dim]`. Without their `projected`, it is added after mixing.

        Args:
            q: queries of the input, `[batch, heads, m, d]`, with positions applied.
            k: keys of the prompt, `[heads, n, d]`, without positions.
            v: values of the prompt, `[heads, n, d]`.
        """
        raise NotMergeable(f"{self.method} has no formula of attention")

    def vocabulary(self) -> torch.Tensor | None:
        """Return embeddings of new tokens, numbered after the base's last token, `[n, dim]`."""
        return None

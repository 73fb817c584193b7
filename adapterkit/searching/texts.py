"""Score combined adapters by the loss of a live base on texts."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..gating.inputs import inputs_for, texts_of
from ..gating.models import device_of, load
from ..io.checkpoint import opened

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..ops.lowering import Base

COUNT, LENGTH = 64, 256
"""The largest number of texts, and of tokens in each text, so that a trial with a small model takes seconds."""


class TextScore:
    """A function that returns the loss of an adapter: the mean over all tokens except the first of each text, in nats.

    Args:
        base: a folder with a transformers language model and its tokenizer; it is loaded once.
        data: a file of texts.
        device: the device to run on.
        seed: the seed that selects texts if the file has more than `COUNT`.

    Raises:
        UsageError: the model does not predict tokens, or the file contains no texts.
        StorageError, Malformed: a file cannot be read.
    """

    def __init__(self, base: Base, data: str | PathLike[str], device: str, seed: int) -> None:
        from ..torch.pretrained import check_transformers

        checkpoint = opened(base)
        check_transformers(checkpoint.root, "scoring texts")
        texts = texts_of(data)
        self.checkpoint, self.device = checkpoint, device_of(device)
        self.model: Any = load(checkpoint, "float32", self.device)
        if not hasattr(self.model, "lm_head") and self.model.get_output_embeddings() is None:
            why = "the model does not predict tokens, so texts have no loss"
            raise UsageError(why, path=checkpoint.root, cure="Pass a function as data= that returns a loss")
        self.inputs = inputs_for(self.model, checkpoint.root, texts, count=COUNT, length=LENGTH, seed=seed)

    def __call__(self, adapter: Adapter) -> float:
        """Return the loss of the base with the adapter attached."""
        import torch

        from ..torch.inject import inject

        handle = inject(self.model, adapter.load(self.device), name="trial")
        total, count = 0.0, 0
        try:
            with torch.no_grad():
                for feed in self.inputs.feeds:
                    ids = feed["input_ids"].to(self.device)
                    logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                    total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                    count += ids.shape[1] - 1
        finally:
            handle.remove()
        return total / count

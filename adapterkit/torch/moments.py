"""What data looks like at the inputs of layers: the moments from which CorDA and EVA begin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError


class Moments:
    """Sums over the inputs `[tokens, in]` of one layer; the values themselves are not kept."""

    def __init__(self) -> None:
        self.batches, self.tokens = 0, 0
        self.total: Any = 0
        self.square: Any = 0
        self.scaled: Any = 0

    def add(self, x: Tensor, kept: Tensor | None) -> None:
        """Take in the inputs of one call.

        Args:
            x: `[*, in]`.
            kept: which of them count for EVA, `[*]`; None: all.

        Raises:
            UsageError: a value is not finite.
        """
        flat = x.detach().to("cpu", torch.float32).flatten(0, -2)
        largest = flat.max().abs()
        if not torch.isfinite(flat).all() or largest == 0:
            raise UsageError("inputs that are all zero, or not finite", where="data", cure="Check the data")
        scaled = flat / largest  # As PEFT does: every batch counts alike.
        self.scaled = self.scaled + scaled.T @ scaled
        self.batches += 1
        flat = (flat if kept is None else flat[kept.flatten().to("cpu")]).double()
        self.total, self.square = self.total + flat.sum(0), self.square + flat.T @ flat
        self.tokens += len(flat)

    def covariance(self) -> Tensor:
        """The mean over batches of x^T x, each batch divided by its largest value: CorDA's covariance, `[in, in]`."""
        out: Tensor = self.scaled / self.batches
        return out

    def components(self) -> tuple[Tensor, Tensor]:
        """The shares of the variance, falling, and the principal components `[in, in]`, one a row."""
        mean = self.total / self.tokens
        spread = self.square / self.tokens - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(spread)
        values = values.flip(0).clamp_min(0)
        return (values / values.sum().clamp_min(1e-30)).float(), vectors.T.flip(0).float().contiguous()


@torch.no_grad()
def moments_of(model: nn.Module, paths: Sequence[str], data: Iterable[Any]) -> dict[str, Moments]:
    """Run a model over data, and return the moments of the inputs of some of its modules.

    Args:
        model: is put into evaluation mode for that time.
        paths: of the modules.
        data: batches: a mapping is passed as keyword arguments, a list or tuple as arguments, anything else as the one
            argument. `attention_mask` and `labels` of -100 leave tokens out.

    Raises:
        UsageError: there is no data, or a module was never called.
    """
    found = {path: Moments() for path in paths}
    mask: list[Tensor | None] = [None]

    def hook_of(moments: Moments) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            fits = mask[0] is not None and mask[0].shape == x.shape[:-1]
            moments.add(x, mask[0] if fits else None)

        return hook

    modes = {module: module.training for module in model.modules()}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(hook_of(moments), with_kwargs=True)
        for path, moments in found.items()
    ]
    try:
        model.eval()
        for batch in data:
            mask[0] = _mask(batch)
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, list | tuple):
                model(*batch)
            else:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    idle = next((path for path, moments in found.items() if not moments.tokens), None)
    if idle is not None:
        cure = "Pass batches for which the model calls this module, or exclude it"
        raise UsageError("the data never reached this module", where=idle, cure=cure)
    return found


def _mask(batch: Any) -> Tensor | None:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return None
    kept = batch.get("attention_mask")
    kept = torch.ones_like(batch["input_ids"]) if kept is None else kept
    labels = batch.get("labels")
    out: Tensor = kept.bool() if labels is None else kept.bool() & (labels != -100)
    return out

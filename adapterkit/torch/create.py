"""Fresh adapters for a live model, to be trained through `inject`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..adapter import Adapter, Target
from ..errors import TargetNotFound, UsageError, nearest
from ..methods import METHODS
from ..updates import ContextUpdate
from .create_context import create_context
from .layers import Conv1D, stored_layout


def create(
    model: nn.Module, method: str, *, targets: str | type[nn.Module] | Sequence[str] = "all-linear", rank: int = 16,
    alpha: float | None = None, seed: int = 0, **attributes: Any,
) -> Adapter:  # fmt: skip
    """A fresh adapter.

    Args:
        model: the model it is for.
        method: the method's name.
        targets: globs over dotted module names, a class of modules, or "all-linear"; context has its own place, but for
            attentions, all of those that can take it unless globs say which.
        rank: the inner size, for methods that have one; the number of virtual tokens, for those of context.
        alpha: scaling times rank; without it the scaling is 1, or what `scaling=` says.
        seed: of the numbers drawn.
        attributes: the method's own plain values.

    Raises:
        TargetNotFound: no module matches.
        Unsupported: unknown method, or one without an initial value.
        UsageError: both alpha and scaling, an attribute that the method lacks, or a rank below 1.
    """
    cls = METHODS[method]
    if rank < 1 or (alpha is not None and "scaling" in attributes):
        raise UsageError("rank is below 1, or both alpha and scaling are given", cure="Correct the arguments")
    if alpha is not None:
        attributes["scaling"] = alpha / rank
    if issubclass(cls, ContextUpdate):
        return create_context(model, cls, targets, rank, seed, attributes)
    unknown = [name for name in attributes if name not in {*cls.attribute_fields(), *cls.tensor_fields()}]
    if unknown:
        raise UsageError(f"{method} has no {unknown[0]}", cure=f"It has {', '.join(cls.attribute_fields())}")
    generator = torch.Generator().manual_seed(seed)
    updates = {}
    for path, module in _matching(model, targets):
        layout = stored_layout(module) or "out *in"
        stored: Any = module.weight
        W = stored.detach().to("cpu", torch.promote_types(stored.dtype, torch.float32))
        b: Any = getattr(module, "bias", None)
        b = None if b is None else b.detach().to(W)

        def random(shape: tuple[int, ...], dtype: torch.dtype = W.dtype) -> torch.Tensor:
            return torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1

        made = cls.initial(W.mT if layout == "in out *k" else W, b, rank, random, **attributes)
        updates[Target(path, layout)] = (made.map(lambda leaf: torch.as_tensor(leaf).clone()),)
    adapter = Adapter(updates)
    adapter.validate()
    return adapter


def _matching(model: nn.Module, targets: str | type[nn.Module] | Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    weighted = {n: m for n, m in model.named_modules() if n and isinstance(getattr(m, "weight", None), nn.Parameter)}
    found = {name: module for name, module in weighted.items() if _matches(name, module, targets)}
    if not found:
        cure = nearest(str(targets), weighted) or "Globs are matched against the names of model.named_modules()"
        raise TargetNotFound("no module with a weight matches", where=str(targets), cure=cure)
    return iter(found.items())


def _matches(name: str, module: nn.Module, targets: str | type[nn.Module] | Sequence[str]) -> bool:
    if isinstance(targets, type):
        return isinstance(module, targets)
    if targets == "all-linear":
        return isinstance(module, nn.Linear) or Conv1D.takes(module)
    globs = [targets] if isinstance(targets, str) else targets
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs)

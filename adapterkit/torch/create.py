"""Fresh adapters for a live model, to be trained through `inject`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapter import Adapter, Target
from ..errors import TargetNotFound, UsageError, nearest
from ..methods import METHODS
from .layers import Conv1D, stored_layout

if TYPE_CHECKING:
    from ..updates import Random


def create(
    model: nn.Module, method: str, *, targets: str | type[nn.Module] | Sequence[str] = "all-linear", rank: int = 16,
    alpha: float | None = None, seed: int = 0, **attributes: Any,
) -> Adapter:  # fmt: skip
    """A fresh adapter.

    Args:
        model: the model it is for.
        method: the method's name.
        targets: globs over dotted module names, a class of modules, or "all-linear".
        rank: the inner size, for methods that have one.
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
    unknown = [name for name in attributes if name not in {*cls.attribute_fields(), *cls.tensor_fields()}]
    if unknown:
        raise UsageError(f"{method} has no {unknown[0]}", cure=f"It has {', '.join(cls.attribute_fields())}")
    generator = torch.Generator().manual_seed(seed)
    places = list(_targets(model, targets))
    shapes = [_view_shape(module, target) for target, module in places]
    given = cls.shared(shapes, rank, _random(generator, torch.float32)) | attributes
    made = {}
    for target, module in places:
        W, b = _viewed(module, target)
        made[target] = (cls.initial(W, b, rank, _random(generator, W.dtype), **given),)
    adapter = Adapter(made).map(lambda leaf: torch.as_tensor(leaf).clone())
    adapter.validate()
    return adapter


def _targets(model: nn.Module, targets: Any) -> Iterator[tuple[Target, nn.Module]]:
    for path, module in _matching(model, targets):
        yield Target(path, stored_layout(module) or "out *in"), module


def _view_shape(module: nn.Module, target: Target) -> tuple[int, ...]:
    shape: Any = module.weight.shape
    return (shape[1], shape[0], *shape[2:]) if target.layout == "in out *k" else tuple(shape)


def _viewed(module: nn.Module, target: Target) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The module's weight `[out, in, *k]` and bias on the CPU, in float32 or wider."""
    stored: Any = module.weight
    W = stored.detach().to("cpu", torch.promote_types(stored.dtype, torch.float32))
    b: Any = getattr(module, "bias", None)
    return W.mT if target.layout == "in out *k" else W, None if b is None else b.detach().to(W)


def _random(generator: torch.Generator, dtype: torch.dtype) -> Random:
    return lambda shape: torch.rand(shape, generator=generator, dtype=dtype) * 2 - 1


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

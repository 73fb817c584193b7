"""Fresh context for a live model, to be trained through `inject`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..core.adapter import Adapter, Target
from ..core.updates import ContextUpdate
from ..errors import TargetNotFound, Unsupported, UsageError
from .attention import heads_of
from .prefixes import is_attention
from .sharding import whole
from .sizes import embedding_of, sizes_of


def create_context(
    model: nn.Module, cls: type[ContextUpdate], targets: Any, tokens: int, seed: int, attributes: dict[str, Any]
) -> Adapter:
    """A fresh adapter of the model's context; sizes come from the model and its config.

    Args:
        model: the model it is for.
        cls: the method.
        targets: globs over names of attentions, for methods that speak to those.
        tokens: how many virtual tokens; a list `index=` in `attributes` says whose embeddings they begin with.
        seed: of the numbers drawn.
        attributes: the method's own plain values.

    Raises:
        TargetNotFound: no attention matches.
        UsageError: the method has no such attribute.
        Unsupported: the model does not tell its sizes.
    """
    embedding: Any = embedding_of(model)
    W = whole(embedding.weight.detach()).to("cpu", torch.promote_types(embedding.weight.dtype, torch.float32)).mT
    generator = torch.Generator().manual_seed(seed)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=W.dtype) * 2 - 1

    given = dict(attributes)
    if cls.place in ("past", "prefix"):
        given.setdefault("sizes", sizes_of(model))
        if given["sizes"].keys() != {"layers", "heads", "d"}:
            raise Unsupported("the config does not tell layers and heads", cure="Pass sizes=dict(layers=, heads=, d=)")

    def made() -> ContextUpdate:
        try:
            return cls.initial(W, None, tokens, random, **given).map(_own)
        except TypeError as error:
            known = ", ".join(("index", *cls.attribute_fields()))
            raise UsageError(str(error).rpartition("() ")[2], where=cls.__name__, cure=f"It has {known}") from None

    paths = _paths(model, cls, targets, embedding)
    # New tokens are the same ones in every module that shares the embedding's weight.
    same = made() if cls.place == "vocabulary" else None
    adapter = Adapter({Target(path): (same or made(),) for path in paths})
    adapter.validate()
    return adapter


def _own(leaf: Any) -> torch.Tensor:
    return torch.as_tensor(leaf).detach().clone(memory_format=torch.contiguous_format)


def _paths(model: nn.Module, cls: type[ContextUpdate], targets: Any, embedding: Any) -> list[str]:
    if cls.place == "vocabulary":
        alike = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
        return [name for name, module in alike if module.weight is embedding.weight]
    if cls.place not in ("attention", "prefix"):
        return [""]
    globs = ["*"] if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    takes = is_attention if cls.place == "prefix" else _has_heads
    found = [name for name, module in model.named_modules() if takes(module) and _matches(name, globs)]
    if not found:
        cure = "Globs are matched against the names of model.named_modules()"
        kind = "transformers'" if cls.place == "prefix" else "Llama's kind or GPT-2's"
        raise TargetNotFound(f"no attention of {kind} matches", where=str(targets), cure=cure)
    return found


def _matches(name: str, globs: list[str]) -> bool:
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs)


def _has_heads(module: nn.Module) -> bool:
    try:
        heads_of(module)
    except Unsupported:
        return False
    return True

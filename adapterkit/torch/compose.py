"""Composition: several adapters in one model, in the blocks of AdapterHub's, https://docs.adapterhub.ml.

`stack`, `average`, `split` and `fuse` make one adapter of several, to be injected, weighed, switched and trained like
any other; blocks nest. `batch_split` and `parallel` send rows through adapters that are attached already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..core.adapter import Adapter, Target
from ..core.updates import Update
from ..errors import ShapeMismatch, TargetNotFound, Unsupported, UsageError
from ..formats import FORMATS
from ..formats.adapterhub.fusion import read_fusion
from ..formats.adapterhub.setup import Setup, read_setup
from ..io.checkpoint import Checkpoint, open_checkpoint
from .blocks import Average, Block, Chain, Fuse, Split
from .routing import route

__all__ = ["average", "batch_split", "fuse", "load", "parallel", "split", "stack"]


def stack(*adapters: Adapter) -> Adapter:
    """One after the other: at each target a later adapter sees the layer as the earlier ones leave it.

    Updates of weights that meet there add up; virtual tokens follow each other.
    """
    updates: dict[Target, tuple[Update, ...]] = {}
    for adapter in _some(adapters):
        for target, found in adapter.updates.items():
            updates[target] = (*updates.get(target, ()), *found)
    return _composed("stack", updates)


def average(*adapters: Adapter, weights: Sequence[float] | None = None) -> Adapter:
    """The weighted mean of what the adapters make of each layer, before its residual and norm where they stand there.

    Where an adapter has no update at a target, the layer as it is counts in its place.

    Args:
        adapters: of additive and output updates.
        weights: one each; equal shares of 1 if not given. They are used as they are.

    Raises:
        UsageError: another number of weights.
        Unsupported: raised by `inject`, for updates of other kinds.
    """
    count = len(_some(adapters))
    shares = tuple(1 / count for _ in adapters) if weights is None else tuple(map(float, weights))
    if len(shares) != count:
        raise UsageError(f"{len(shares)} weights for {count} adapters", where="weights", cure="Pass one each")
    return _blocks("average", adapters, lambda children, _: Average(children=children, weights=shares))


def split(*adapters: Adapter, sizes: Sequence[int]) -> Adapter:
    """Each adapter changes positions of its own: the first `sizes[0]` tokens, the next `sizes[1]`, and so on.

    Raises:
        UsageError: another number of sizes.
        ShapeMismatch: raised by a call with another number of tokens.
    """
    if len(sizes) != len(_some(adapters)):
        raise UsageError(f"{len(sizes)} sizes for {len(adapters)} adapters", where="sizes", cure="Pass one each")
    return _blocks("split", adapters, lambda children, _: Split(children=children, lengths=tuple(sizes)))


def fuse(*adapters: Adapter, fusion: str | PathLike[str]) -> Adapter:
    """AdapterFusion: at each layer an attention over what the adapters' bottlenecks change.

    Args:
        adapters: in the order of the fusion.
        fusion: the folder of AdapterHub's with the attentions' weights.

    Raises:
        TargetNotFound: the fusion has no weights at a target of the adapters'.
        Unsupported: raised by `inject`, for updates other than bottlenecks in sequence.
    """
    settings, weights = read_fusion(fusion)

    def made(children: tuple[Any, ...], target: Target) -> Block:
        own: Any = next((held for path, held in weights.items() if _alike(path, target.path)), None)
        if own is None:
            raise TargetNotFound(
                "no weights of a fusion there", where=str(target), cure="Pass the adapters' own fusion"
            )
        return Fuse(children=children, **own, **settings)

    return _blocks("fuse", adapters, made)


def load(folder: str | PathLike[str], *, base: Any = None) -> Adapter:
    """One adapter of the composition that AdapterHub's `save_adapter_setup` wrote: its blocks are those of this module.

    Args:
        folder: with `adapter_setup.json`, and a folder for each adapter and fusion.
        base: for adapters that need it to be read, see `ak.read`.

    Raises:
        Unsupported: a block is one of rows, which is a matter of calls and not of an adapter.
    """
    return _loaded(read_setup(folder), Path(folder), base)


def _loaded(setup: Setup | str, folder: Path, base: Any) -> Adapter:
    if isinstance(setup, str):
        checkpoint = base if base is None or isinstance(base, Checkpoint) else open_checkpoint(base)
        return FORMATS["adapterhub"]().read(folder / setup, base=checkpoint)
    if setup.kind not in ("Average", "Fuse", "Split", "Stack"):
        why, cure = (
            f"{setup.kind} sends rows through several adapters",
            "Inject them by names; see batch_split, parallel",
        )
        raise Unsupported(why, path=folder, cure=cure)
    children = [_loaded(child, folder, base) for child in setup.children]
    if setup.kind == "Average":
        return average(*children, weights=setup.numbers)
    if setup.kind == "Split":
        return split(*children, sizes=[int(size) for size in setup.numbers])
    return stack(*children) if setup.kind == "Stack" else fuse(*children, fusion=folder / setup.fusion)


def batch_split(model: nn.Module, names: Sequence[str | None], sizes: Sequence[int]) -> AbstractContextManager[None]:
    """Inside the `with`, the first `sizes[0]` rows go through the adapter `names[0]`, and so on; see `route`."""
    if len(sizes) != len(names):
        raise UsageError(f"{len(sizes)} sizes for {len(names)} adapters", where="sizes", cure="Pass one each")
    return route(model, [name for name, size in zip(names, sizes, strict=True) for _ in range(size)])


def parallel(model: nn.Module, names: Sequence[str | None]) -> Callable[..., Any]:
    """The model with its input repeated once an adapter: what comes out has all rows of the first, then of the next.

    Args:
        model: with the adapters attached.
        names: their names; None for the base.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        if not tensors:
            raise ShapeMismatch("a call without rows", where="(model)", cure="Call it with tensors, rows first")
        rows = len(tensors[0])

        def repeated(leaf: Any) -> Any:
            fits = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows
            return torch.cat([leaf] * len(names)) if fits else leaf

        some, named = pytree.tree_map(repeated, (args, kwargs))
        with route(model, [name for name in names for _ in range(rows)]):
            return model(*some, **named)

    return run


def _blocks(name: str, adapters: Sequence[Adapter], made: Callable[[tuple[Any, ...], Target], Block]) -> Adapter:
    """An adapter of blocks, one at each target of any of them."""
    targets = dict.fromkeys(target for adapter in adapters for target in adapter.updates)
    updates: dict[Target, tuple[Update, ...]] = {}
    for target in targets:
        found = [adapter.updates.get(target, ()) for adapter in adapters]
        if any(update.kind == "context" for each in found for update in each):
            raise Unsupported(f"context in a block {name!r}", where=str(target), cure="Stack those adapters")
        updates[target] = (made(tuple(map(_one, found)), target),)
    return _composed(name, updates)


def _one(updates: Sequence[Update]) -> Update | None:
    if len(updates) < 2:
        return updates[0] if updates else None
    return Chain(children=tuple(updates))


def _composed(name: str, updates: Mapping[Target, tuple[Update, ...]]) -> Adapter:
    adapter = Adapter(updates).step(name)
    adapter.validate()
    return adapter


def _some(adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    if not adapters:
        raise UsageError("nothing to compose", where="adapters", cure="Pass adapters")
    return adapters


def _alike(path: str, other: str) -> bool:
    """Whether two paths differ by a prefix at most."""
    return path == other or path.endswith(f".{other}") or other.endswith(f".{path}")

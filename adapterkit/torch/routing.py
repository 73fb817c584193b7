"""Routing: a different adapter for each row of a batch, in one forward pass of the whole model.

A module with adapters runs once a group of rows, under its own forward or its layer's formula; everything else runs
once. Rows are the first axis of a module's tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ShapeMismatch, Unsupported, UsageError, nearest
from .scopes import routed


@dataclass(frozen=True)
class Route:
    """Which adapter each row goes through, and whether rows may come flattened with what follows them."""

    names: tuple[str | None, ...]
    flattened: bool

    def groups(self) -> dict[str | None, list[int]]:
        """Name -> its rows."""
        return {name: [row for row, other in enumerate(self.names) if other == name] for name in self.names}


@contextmanager
def route(model: nn.Module, names: Sequence[str | None], *, flattened: bool = False) -> Iterator[None]:
    """A different adapter for each row of a batch: inside the `with`, row i goes through `names[i]`, or the base.

    Rows are the first axis of what each module reads and writes; an argument whose first axis has another length is
    the same for all rows. The route holds for this thread (and this task of asyncio) alone.

    Args:
        model: the model, with adapters attached.
        names: one name of an attached adapter, or None, for each row.
        flattened: some modules see rows and tokens in one axis, row by row, as the experts of a mixture do.

    Raises:
        UsageError: no adapter of such a name is attached.
        ShapeMismatch: raised by a forward of another number of rows.
        Unsupported: raised by a forward through a module whose rows cannot be told apart.
    """
    from .station import names_of, stations_of

    known = names_of(model)
    for name in names:
        if name is not None and name not in known:
            raise UsageError("no such adapter is attached", where=name, cure=nearest(name, known) or "Inject it first")
    names = tuple(names)
    with routed(dict.fromkeys(stations_of(model), Route(names, flattened))):
        yield


def split(route: Route, module: nn.Module, args: Any, kwargs: Any, where: str) -> Iterator[tuple[str | None, Any, Any]]:
    """The arguments of a module's forward for each group of rows: (name, args, kwargs).

    Raises:
        ShapeMismatch: no tensor has that many rows.
        Unsupported: the module does not have rows first.
    """
    kwargs, same = _without_mask(module, args, kwargs, where)
    count = _count(route, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], where)
    for name, rows in route.groups().items():
        taken = partial(_taken, rows=rows, total=len(route.names), count=count)
        some, named = pytree.tree_map(taken, (args, kwargs))
        yield name, some, named | same


def join(route: Route, outputs: Sequence[Any], where: str) -> Any:
    """What the groups' forwards returned, as one: tensors along their first axis, in the order of the rows.

    Raises:
        Unsupported: a result has no rows.
    """
    flat, (tree, *_) = zip(*(pytree.tree_flatten(output) for output in outputs), strict=True)
    groups = list(route.groups().values())
    order = [row for rows in groups for row in rows]
    back = sorted(range(len(order)), key=order.__getitem__)
    return pytree.tree_unflatten([_joined(leaves, groups, back, where) for leaves in zip(*flat, strict=True)], tree)


def _count(route: Route, tensors: list[Tensor], where: str) -> int:
    """The length of the axis that rows lie on: theirs, or a multiple where they are flattened."""
    rows = len(route.names)
    sizes = [tensor.shape[0] for tensor in tensors if tensor.ndim]
    if rows in sizes:
        return rows
    if sizes and sizes[0] == 1:
        return 1
    if sizes and route.flattened and sizes[0] % rows == 0:
        return sizes[0]
    why = f"{sizes[0] if sizes else 'no'} rows where the route names {rows}"
    more = "" if not sizes or sizes[0] % rows else "; pass flattened=True if the model has joined rows and tokens"
    raise ShapeMismatch(why, where=where, cure=f"Name one adapter, or None, for each row{more}")


def _taken(leaf: Any, rows: list[int], total: int, count: int) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != count:
        return leaf
    if count == total:
        return leaf[rows]
    if count == 1:
        return leaf.expand(len(rows), *leaf.shape[1:])
    return leaf.reshape(total, count // total, *leaf.shape[1:])[rows].flatten(0, 1)


def _joined(leaves: Sequence[Any], groups: list[list[int]], back: list[int], where: str) -> Any:
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        if any(leaf is not leaves[0] and leaf != leaves[0] for leaf in leaves):
            raise Unsupported("the module returns something that has no rows", where=where, cure=_ALONE)
        return leaves[0]
    lengths = [leaf.shape[0] // len(rows) if leaf.ndim else 0 for leaf, rows in zip(leaves, groups, strict=True)]
    fits = all(leaf.ndim and leaf.shape[0] == lengths[0] * len(rows) for leaf, rows in zip(leaves, groups, strict=True))
    if not fits:
        raise Unsupported("the module returns something that has no rows", where=where, cure=_ALONE)
    whole = torch.cat(list(leaves))
    if lengths[0] == 1:
        return whole[back]
    return whole.reshape(len(back), lengths[0], *whole.shape[1:])[back].flatten(0, 1)


def _without_mask(module: nn.Module, args: Any, kwargs: Any, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments to split, and those that are the same for all rows whatever their first axis.

    torch's attention has rows second unless told otherwise, and a mask of queries by keys that may look like rows.
    """
    if not isinstance(module, nn.MultiheadAttention):
        return kwargs, {}
    if not (module.batch_first and args and args[0].ndim == 3):
        raise Unsupported("rows are not its first axis", where=where, cure="Build it with batch_first=True")
    mask = kwargs.get("attn_mask")
    if len(args) > 5 or (mask is not None and mask.ndim > 2):
        raise Unsupported("a mask for each row", where=where, cure="Pass one attn_mask of two axes, by its name")
    return {name: value for name, value in kwargs.items() if name != "attn_mask"}, {"attn_mask": mask}


_ALONE = "Run the rows of each adapter by themselves"

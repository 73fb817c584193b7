"""Reorder fused queries, keys and values for bases that store them head by head; shapes do not show the order.

MiniMaxAI's shards of MiniMax-H3 have each head's query, key and value side by side. Single files of the model have the
same names, but all queries, then all keys, then all values; adapters always have this order after reading. Names,
shapes and metadata are the same in both orders, so diffusers takes the order as an argument (`qkv_layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from ...errors import NotMergeable, ShapeMismatch, UsageError
from ...io.lazy import as_lazy
from ..architectures import HOLE, named, of_pipelines, shape_of
from ..renames import BY_HEAD, BY_PART, Rename
from .moving import ungrouped
from .sites import Site

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Array, Lazy, Leaf
    from .fitting import Shapes


def in_order_of(base: Checkpoint, sites: Sequence[Site], shapes: Shapes, rules: Sequence[Rename]) -> list[Site]:
    """Reorder updates of fused projections to the order of the base's rows.

    Args:
        base: the base. Published single files have all queries first; shards may have either order.
        sites: the sites of the updates.
        shapes: the shapes of the base's tensors, by name.
        rules: the user's rules; one of them may state the order.

    Raises:
        UsageError: the base is sharded, and no rule states its order.
        NotMergeable: an update's rows cannot be reordered.
        ShapeMismatch: the rows do not form whole heads.
    """
    if base.config is not None and "model_type" in base.config:
        return list(sites)
    known = _fused()
    fused = {at: size for at, site in enumerate(sites) if (size := known.get(_tail(site.target.path)))}
    order = next((rule.rows for rule in rules if rule.rows), "" if base.index is not None else BY_PART)
    if not fused or order == BY_PART:
        return list(sites)
    if not order:
        first = sites[next(iter(fused))].target
        raise UsageError(
            "the base is sharded, and the rows of its fused queries, keys and values may be ordered by part (all "
            "queries, all keys, all values, as in the published single files) or by head (as in MiniMaxAI's shards)",
            where=str(first), path=base.root,
            cure=f"State the order with --rename rows:{BY_HEAD} or --rename rows:{BY_PART} (rename=)",
        )  # fmt: skip
    return [_by_head(site, shapes, fused[at]) if at in fused else site for at, site in enumerate(sites)]


@cache
def _fused() -> dict[str, int]:
    """Map the end of a fused projection's name to the rows of a head, for families with bases in both orders."""
    found = {}
    for head, _ in of_pipelines():
        family = named(head.family) if head.pipeline.diffsynth_head else None
        for weight in () if family is None else family.record.weights:
            place = family.place(weight, "native") if family is not None else None
            if place is not None and place.of == 3:
                found[_tail(HOLE.sub("0", place.name))] = head.pipeline.diffsynth_head
    return found


def _tail(path: str) -> str:
    """Return the end of a name after its last number."""
    return shape_of(path).rpartition("#.")[2]


def _by_head(site: Site, shapes: Shapes, size: int) -> Site:
    rows = shapes[site.weight][0] if site.weight is not None else 0
    if not rows or rows % (3 * size):
        why = f"the {rows} rows do not form queries, keys and values of heads with {size} rows each"
        raise ShapeMismatch(why, where=str(site.target), cure="Is this the base that the adapter was trained on?")
    target = replace(site.target, rows=None)
    updates = tuple(_reordered(update, site, rows, size) for update in site.updates)
    return replace(site, target=target, updates=updates)


def _reordered(update: Update, site: Site, rows: int, size: int) -> Update:
    """Reorder an update of all rows to the base's order; give an update of one part zeros in all other rows."""
    if site.target.rows is not None:
        if update.method != "lora":
            why = f"{update.method} adapts one part of a weight whose rows are ordered by heads"
            raise NotMergeable(why, where=str(site.target), cure="Train the adapter on the fused weight, or use LoRA")
        update = update.replace(B=_within(update.tensors["B"], rows, site.target.rows))
    elif not update.cuts("out"):
        why = f"{update.method} changes all outputs of a weight together, but the base has them in another order"
        raise NotMergeable(why, where=str(site.target), cure="Inject the adapter into a live model instead")
    return ungrouped(update, lambda: _order(rows, size), site.target.stacked)


def _within(leaf: Leaf, rows: int, part: tuple[int, int]) -> Lazy:
    """Place a factor's rows in a tensor with `rows` rows that is otherwise zero."""
    tensor = as_lazy(leaf)

    def spread(array: Array) -> Array:
        import numpy as np

        whole = np.zeros((rows, *array.shape[1:]), array.dtype)
        whole[part[0] : part[1]] = array
        return whole

    return tensor.map(spread, (rows, *tensor.shape[1:]))


def _order(rows: int, size: int) -> Array:
    """Return the order in which row i of the base is row `order[i]` of all queries, then all keys, then all values."""
    import numpy as np

    return np.arange(rows).reshape(3, -1, size).swapaxes(0, 1).reshape(rows)

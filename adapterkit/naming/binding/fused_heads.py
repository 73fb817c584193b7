"""Reorder fused queries, keys and values for bases that store them head by head; shapes cannot tell the order.

MiniMaxAI's shards of MiniMax-H3 have each head's query, key and value side by side. Single files of the model use the
same names with all queries, then all keys, then all values; so do all adapters as they are read. diffusers takes an
argument for it (`qkv_layout`), because names, shapes and metadata are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from ...errors import NotMergeable, ShapeMismatch, UsageError
from ...io.lazy import as_lazy
from ..architectures import HOLE, named, of_pipelines, shape_of
from ..renames import BY_HEAD, BY_PART, Rename
from .moving import ungrouped
from .sites import Site

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from .fitting import Shapes


def in_order_of(base: Checkpoint, sites: Sequence[Site], shapes: Shapes, rules: Sequence[Rename]) -> list[Site]:
    """Put updates of fused projections into the order of the base's rows.

    Args:
        base: the base. Published single files have all queries first; shards may have either order.
        sites: the sites of the updates.
        shapes: name of a tensor of the base -> its shape.
        rules: the user's rules; one may say the order.

    Raises:
        UsageError: the base is sharded, and no rule says its order.
        NotMergeable: an update's rows cannot be reordered.
        ShapeMismatch: the rows are not those of whole heads.
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
            cure=f"Say which with --rename rows:{BY_HEAD} or --rename rows:{BY_PART} (rename=)",
        )  # fmt: skip
    return [_by_head(site, shapes, fused[at]) if at in fused else site for at, site in enumerate(sites)]


@cache
def _fused() -> dict[str, int]:
    """Return end of a fused projection's name -> rows of one head, for families whose bases come in both orders."""
    found = {}
    for head, _ in of_pipelines():
        family = named(head.family) if head.pipeline.diffsynth_head else None
        for weight in () if family is None else family.record.weights:
            place = family.place(weight, "native") if family is not None else None
            if place is not None and place.of == 3:
                found[_tail(HOLE.sub("0", place.name))] = head.pipeline.diffsynth_head
    return found


def _tail(path: str) -> str:
    """Return the end of a name from its last number on."""
    return shape_of(path).rpartition("#.")[2]


def _by_head(site: Site, shapes: Shapes, size: int) -> Site:
    rows = shapes[site.weight][0] if site.weight is not None else 0
    if not rows or rows % (3 * size):
        why = f"{rows} rows are not queries, keys and values of heads of {size}"
        raise ShapeMismatch(why, where=str(site.target), cure="Is this the base that the adapter was trained on?")
    target = replace(site.target, rows=None)
    updates = tuple(_reordered(update, site, rows, size) for update in site.updates)
    return replace(site, target=target, updates=updates)


def _reordered(update: Update, site: Site, rows: int, size: int) -> Update:
    """Put an update of all rows into the base's order; an update of one part gets zeros in the other parts' rows."""
    if site.target.rows is not None:
        if update.method != "lora":
            why = f"{update.method} on one part of rows that stand by heads"
            raise NotMergeable(why, where=str(site.target), cure="Train it on the fused weight, or use LoRA")
        update = update.replace(B=_within(update.tensors["B"], rows, site.target.rows))
    elif not update.cuts("out"):
        why = f"{update.method} changes all outputs of a weight together, and the base has them in another order"
        raise NotMergeable(why, where=str(site.target), cure="Inject it into a live model instead")
    return ungrouped(update, lambda: _order(rows, size), site.target.stacked)


def _within(leaf: Any, rows: int, part: tuple[int, int]) -> Any:
    """Place a factor's rows among `rows` rows of zeros."""
    tensor = as_lazy(leaf)

    def spread(array: Any) -> Any:
        import numpy as np

        whole = np.zeros((rows, *array.shape[1:]), array.dtype)
        whole[part[0] : part[1]] = array
        return whole

    return tensor.map(spread, (rows, *tensor.shape[1:]))


def _order(rows: int, size: int) -> Any:
    """Return the order in which row i of the base is row `order[i]` of all queries, then all keys, then all values."""
    import numpy as np

    return np.arange(rows).reshape(3, -1, size).swapaxes(0, 1).reshape(rows)

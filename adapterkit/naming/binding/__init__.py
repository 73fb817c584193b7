"""Bind an adapter to a base: find where each target is stored, and check that its shapes fit.

`naming.resolver` maps the names; `moving` splits and joins updates if the base stores weights in other parts. The
storage layout of a target follows from shapes, or else from the family's table, or else from the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING

from ...core.adapter import Adapter, Target
from ...core.collection import collection_off
from ...core.updates import Update
from ...errors import AdapterkitError, NotMergeable, ShapeMismatch, TargetNotFound
from ...io.checkpoint import opened
from ..moves import Rule
from ..renames import Rename, parse_renames
from .deltas import delta, fold, view, view_shape, weight_shape
from .fitting import Shapes, fits, viewed
from .fused_heads import in_order_of
from .layouts import with_layouts
from .renaming import renamed
from .sites import Bound, Site, apart, find_parts, find_sites

if TYPE_CHECKING:
    from ...io.checkpoint import Checkpoint

__all__ = [
    "Binding",
    "Bound",
    "Site",
    "apart",
    "bind",
    "check_site",
    "delta",
    "find_parts",
    "find_sites",
    "fits",
    "fold",
    "renamed",
    "view",
    "view_shape",
    "weight_shape",
    "with_layouts",
]


Resize = Callable[[Sequence[Site], Shapes], tuple[list[Site], dict[str, tuple[int, ...]]]]


@dataclass(frozen=True, slots=True, eq=False)
class Binding:
    """An adapter bound to a base.

    Attributes:
        adapter: the adapter, with its targets in the base's names and layouts.
        sites: one site per entry, in the adapter's order; context updates have no site.
        missing: the targets that the base does not have, if partial binding was allowed.
        renamed: the prefix as (removed, added), or None.
        rules: the rules that turned the adapter's names into the base's.
        origins: the adapter's original target for each site.
    """

    adapter: Adapter
    sites: tuple[Site, ...]
    missing: tuple[Target, ...]
    renamed: tuple[str, str] | None
    rules: tuple[Rule, ...] = ()
    origins: tuple[Target, ...] = ()


@collection_off()
def bind(
    adapter: Adapter,
    base: Checkpoint | str | PathLike[str],
    *,
    partial: bool = False,
    aliases: Mapping[str, str] = {},
    rename: str | Sequence[str | Rename] = (),
    resize: Resize | None = None,
    distinct: bool = True,
) -> Binding:
    """Bind an adapter to a base.

    Args:
        adapter: the adapter.
        base: an open checkpoint, or its path.
        partial: whether to omit targets that the base does not have, instead of refusing; at least one must remain.
        aliases: further names of stored tensors, such as a tied head, as alias -> stored name.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first rule that matches a target's name is used. Also
            `family:NAME` for a base whose config names no family, and `rows:by_head` or `rows:by_part` for a base whose
            fused queries, keys and values may have either order.
        resize: a function of the sites and all shapes, which returns the sites and shapes to use; it is called before
            shapes are checked.
        distinct: whether to check that positions do not repeat; a merge checks that later, when it reads all values.

    Raises:
        TargetNotFound: the base does not have a target; the error names the nearest module.
        ShapeMismatch: a shape does not fit, or the layout of a square weight is ambiguous.
    """
    base = opened(base)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in aliases.items()}
    rules = parse_renames(rename, None if partial else [target.path for target in adapter.updates])
    weights, context = apart(adapter)
    found = find_sites(weights, shapes, partial=partial, config=base.config, rename=rules)
    given: Sequence[Site] = in_order_of(base, found.sites, shapes, rules)
    if resize is not None:
        given, shapes = resize(given, shapes)
    # Share one object among sites with the same form: tens of thousands of targets have only a few dozen forms.
    same: dict[Hashable, Hashable] = {}
    forms = [same.setdefault(form, form) for form in (site.form(shapes) for site in given)]
    sites = with_layouts(list(given), shapes, found.config, forms)
    passed = set[Hashable]()
    for site, form in zip(sites, forms, strict=True):
        seen = site.target.layout, form
        if seen not in passed:
            check_site(site, shapes, distinct=distinct)
            if all(update.by_form for update in site.updates):
                passed.add(seen)
    updates: dict[Target, tuple[Update, ...]] = {}
    for site in sites:
        there = updates.get(site.target)
        updates[site.target] = site.updates if there is None else (*there, *site.updates)
    updates |= find_parts(context, shapes, found.renamed, rules)
    return Binding(
        adapter.replace(updates=updates), tuple(sites), tuple(found.missing), found.renamed, found.rules,
        tuple(found.origins),
    )  # fmt: skip


def check_site(site: Site, shapes: Shapes, *, biasless: bool = False, distinct: bool = True) -> None:
    """Check a site's updates against the stored shapes.

    Args:
        site: the site of the target.
        shapes: the shapes of stored tensors, by name.
        biasless: whether to accept a change of a bias that the base lacks; a live layer adds it to its output.
        distinct: whether to check that positions do not repeat.

    Raises:
        TargetNotFound: the base has only a bias at this target.
        ShapeMismatch: a shape does not fit.
        NotMergeable: the base has no bias to change.
    """
    for update in site.updates:
        try:
            _check_update(update, site, shapes, biasless)
            if distinct:
                update.check_distinct()
        except AdapterkitError as error:
            # Name the target as the place of every misfit, which the specification requires.
            error.where = f"{site.target}: {update.method}"
            raise error from None


def _check_update(update: Update, site: Site, shapes: Shapes, biasless: bool) -> None:
    if update.changes_weight and site.weight is None:
        raise TargetNotFound("the base has only a bias for this target, no weight", cure=_WRONG_BASE)
    if site.weight is not None and not fits(site.target, (update,), shapes[site.weight]):
        dims = update.dims(site.target.stacked)
        made_for = ", ".join(
            f"{name}={dims[name]}" for name in ("e", "out", "in", "k", "rest", "columns") if name in dims
        )
        why = f"the update has {made_for}, but the base's weight has shape {list(shapes[site.weight])}"
        raise ShapeMismatch(why, cure=_WRONG_BASE)
    seen = None if site.weight is None else viewed(shapes[site.weight], site.target)
    shape: tuple[int, ...] | None = None
    if seen is not None:
        out, *rest = seen[int(site.target.stacked) :]
        rows = site.target.rows
        if rows is not None and rows[1] > out:
            raise ShapeMismatch(
                f"the update changes rows {rows[0]} to {rows[1]}, but the weight has {out} rows", cure=_WRONG_BASE
            )
        shape = (out if rows is None else rows[1] - rows[0], *rest)
        update.check_axes(shape)
    if site.bias is None and update.changes_bias and update.needs_bias and not biasless:
        raise NotMergeable("the update changes a bias that the base does not have", cure=_NO_BIAS)
    held = None if site.bias is None else shapes[site.bias]
    if held is not None and update.changes_bias and not _bias_fits(update, site.target, held, shape):
        outs = update.dims(site.target.stacked).get("out", "the weight's")
        raise ShapeMismatch(
            f"the update has {outs} outputs, but the base's bias has shape {list(held)}", cure=_WRONG_BASE
        )
    if shape is not None:
        update.check_against(shape)


def _bias_fits(update: Update, target: Target, shape: tuple[int, ...], weight: tuple[int, ...] | None) -> bool:
    """Whether a bias, `[out]` or `[e, out]` for experts, fits the update and the weight, or has room for its rows."""
    dims = update.dims(target.stacked)
    lead = (dims["e"],) if target.stacked else ()
    if target.rows is not None:
        return shape[:-1] == lead and len(shape) > 0 and target.rows[1] <= shape[-1]
    outs = {dims.get("out", shape[-1]), shape[-1] if weight is None else weight[0]} if shape else set()
    return shape[:-1] == lead and outs == set(shape[-1:])


_NO_BIAS = (
    "Inject it instead of merging (adapterkit.torch.inject), or merge into a copy of the base that has biases: "
    "from_pretrained(base, attention_bias=True) and save_pretrained, if its config has attention_bias or mlp_bias"
)
"""PEFT's merge refuses this, too. Transformers fills new biases with zeros, which leave the outputs unchanged."""

_WRONG_BASE = "Is this the base that the adapter was trained on?"

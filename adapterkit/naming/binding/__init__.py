"""Bind an adapter to a base: find where each target is stored, and check that its shapes fit.

`naming.resolver` maps the names; `moving` cuts and joins updates if the base stores weights in other parts. Storage
layouts are proven by shapes, then by the family's table, then by the layout that the adapter declares.
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
        sites: one site an entry, in the adapter's order; context updates have none.
        missing: targets without a place, if partial binding was allowed.
        renamed: the prefix that was (taken off, added), if any.
        rules: the rules by which the adapter's names became the base's.
        origins: for each site, the target of the adapter as it was given.
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
        base: an open checkpoint or the path of one.
        partial: leave out targets without a place instead of refusing; at least one must have a place.
        aliases: further names of stored tensors (a tied head), alias -> stored name.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first that matches a target's name is used. Also
            `family:NAME` for a base whose config names no family, and `rows:by_head` or `rows:by_part` for a base whose
            fused queries, keys and values may be in either order.
        distinct: check that positions do not repeat; a merge checks it later, when it reads all values.
        resize: called with the sites and all shapes before shapes are checked; returns the sites and shapes to use.

    Raises:
        TargetNotFound: there are targets without a place; the error names the nearest.
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
    # One object for all sites of one form: tens of thousands of targets have a few dozen of them.
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
    """Check a site's updates against the stored shapes there.

    Args:
        site: the site of the target.
        shapes: name of a stored tensor -> its shape.
        distinct: check that positions do not repeat.
        biasless: accept a change to a bias that the base lacks; a live layer adds it to its output.

    Raises:
        TargetNotFound: the base has only a bias there.
        ShapeMismatch: a shape does not fit.
        NotMergeable: there is no bias to change.
    """
    for update in site.updates:
        try:
            _check_update(update, site, shapes, biasless)
            if distinct:
                update.check_distinct()
        except AdapterkitError as error:
            # The specification gives one place for every misfit; the message names the tensor.
            error.where = f"{site.target}: {update.method}"
            raise error from None


def _check_update(update: Update, site: Site, shapes: Shapes, biasless: bool) -> None:
    if update.changes_weight and site.weight is None:
        raise TargetNotFound("the base has no weight there, only a bias", cure=_WRONG_BASE)
    if site.weight is not None and not fits(site.target, (update,), shapes[site.weight]):
        dims = update.dims(site.target.stacked)
        made_for = ", ".join(
            f"{name}={dims[name]}" for name in ("e", "out", "in", "k", "rest", "columns") if name in dims
        )
        raise ShapeMismatch(f"made for {made_for}; the base has {list(shapes[site.weight])}", cure=_WRONG_BASE)
    seen = None if site.weight is None else viewed(shapes[site.weight], site.target)
    shape: tuple[int, ...] | None = None
    if seen is not None:
        out, *rest = seen[int(site.target.stacked) :]
        rows = site.target.rows
        if rows is not None and rows[1] > out:
            raise ShapeMismatch(f"rows {rows[0]} to {rows[1]} of a weight that has {out}", cure=_WRONG_BASE)
        shape = (out if rows is None else rows[1] - rows[0], *rest)
        update.check_axes(shape)
    if site.bias is None and update.changes_bias and update.needs_bias and not biasless:
        raise NotMergeable("changes a bias that the base does not have", cure=_NO_BIAS)
    held = None if site.bias is None else shapes[site.bias]
    if held is not None and update.changes_bias and not _bias_fits(update, site.target, held, shape):
        outs = update.dims(site.target.stacked).get("out", "the weight's")
        raise ShapeMismatch(f"made for {outs} outputs; the bias is {list(held)}", cure=_WRONG_BASE)
    if shape is not None:
        update.check_against(shape)


def _bias_fits(update: Update, target: Target, shape: tuple[int, ...], weight: tuple[int, ...] | None) -> bool:
    """Whether a bias `[out]`, or `[e, out]` of experts, fits the update and the weight, or has room for its rows."""
    dims = update.dims(target.stacked)
    lead = (dims["e"],) if target.stacked else ()
    if target.rows is not None:
        return shape[:-1] == lead and len(shape) > 0 and target.rows[1] <= shape[-1]
    outs = {dims.get("out", shape[-1]), shape[-1] if weight is None else weight[0]} if shape else set()
    return shape[:-1] == lead and outs == set(shape[-1:])


_NO_BIAS = (
    "Inject it instead of merging (adapterkit.torch.inject), or merge into a copy of the base that has biases: "
    "from_pretrained(base, attention_bias=True) and save_pretrained, where its config has attention_bias, or mlp_bias"
)
"""PEFT's merge refuses this too. Transformers fills fresh biases with zeros, which leave the outputs alone."""

_WRONG_BASE = "Is this the base that the adapter was trained on?"

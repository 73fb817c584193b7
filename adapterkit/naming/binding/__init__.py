"""Bind an adapter to a base: find the stored tensors of each target, and check that shapes fit.

`naming.resolver` maps names. `moving` splits and joins updates if the base fuses or stacks weights differently. Shapes
show the layout of most stored weights. If a weight's shape fits two layouts, the layout comes from the base's family,
or else from the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ...core.adapter import LAYOUTS, Adapter, Target, collection_off
from ...core.updates import Additive, Update
from ...errors import (
    INJECT_INSTEAD,
    PASS_BASE,
    USE_ITS_BASE,
    AdapterkitError,
    NotMergeable,
    ShapeMismatch,
    TargetNotFound,
    UsageError,
)
from ...io.checkpoint import opened
from ...io.lazy import as_lazy, as_torch, for_formulas
from ..architectures import HOLE, STORED_AS, named, of_pipelines, shape_of
from ..moves import MoveRule, stored_in_out
from ..renames import BY_HEAD, BY_PART, IN_OUT, Rename, layout_of, parse_renames, renamed_by
from ..ties import aliases
from .fitting import Shapes, fits, viewed
from .layouts import LayoutEvidence, ambiguous_square, names_embedding
from .moving import ungrouped
from .sites import Bound, Site, apart, find_parts, find_sites

if TYPE_CHECKING:
    import torch

    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Array, Lazy, Leaf

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
        sites: the stored tensors of each target, in the adapter's order. Context updates, such as prompts, have no
            stored tensor and no site.
        missing: the targets that the base does not have, if partial binding was allowed.
        renamed: the change of prefix that mapped the names, as (removed, added); None if no prefix was changed.
        rules: the rules that mapped the adapter's names to the base's names.
        origins: for each site, the target as the given adapter names it. If single experts were joined into a stack,
            this is the target of the first expert.
    """

    adapter: Adapter
    sites: tuple[Site, ...]
    missing: tuple[Target, ...]
    renamed: tuple[str, str] | None
    rules: tuple[MoveRule, ...] = ()
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
        partial: whether to omit targets that the base does not have, instead of raising an error; at least one target
            must remain.
        aliases: other names of stored tensors, such as the name of a tied head. These names are not in the base's
            files. `aliases` maps each of them to the name under which the tensor is stored.
        rename: rules for names, each `FROM=TO` or `@FILE`; the first rule that matches a target's name is used.
            `family:NAME` names the family of a base without a config. `rows:by_head` or `rows:by_part` states the order
            of fused queries, keys and values. `in_out:GLOB` or `out_in:GLOB` states how the base stores square weights.
        resize: a function that gets the sites and all shapes, and returns the sites and shapes to use instead. It is
            called before shapes are checked.
        distinct: whether to check that the positions of a sparse update do not repeat. A merge passes False, because it
            checks the positions later, when it reads the update's values.

    Raises:
        TargetNotFound: the base does not have a target; the error names the nearest module.
        ShapeMismatch: a shape does not fit, or the layout of a square weight is ambiguous.
    """
    base = opened(base)
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in aliases.items()}
    rules = parse_renames(rename, None if partial else [target.path for target in adapter.updates], shapes)
    weights, context = apart(adapter)
    sites_here = find_sites(weights, shapes, partial=partial, config=base.config, rename=rules)
    given: Sequence[Site] = in_order_of(base, sites_here.sites, shapes, rules)
    if resize is not None:
        given, shapes = resize(given, shapes)
    # Tens of thousands of sites have only a few dozen different results of `Site.form`. So save memory: keep only one
    # of several equal results.
    same: dict[Hashable, Hashable] = {}
    forms = [same.setdefault(form, form) for form in (site.form(shapes) for site in given)]
    sites = with_layouts(list(given), shapes, sites_here.config, forms, rules)
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
    updates |= find_parts(context, shapes, sites_here.renamed, rules)
    return Binding(
        adapter.replace(updates=updates), tuple(sites), tuple(sites_here.missing), sites_here.renamed, sites_here.rules,
        tuple(sites_here.origins),
    )  # fmt: skip


def check_site(site: Site, shapes: Shapes, *, biasless: bool = False, distinct: bool = True) -> None:
    """Check that a site's updates fit the stored shapes.

    Args:
        site: the target's stored tensors.
        shapes: the shapes of stored tensors, by name.
        biasless: whether to accept an update of a bias that the base lacks. Live models accept such an update, because
            an injected layer can add the bias to its output.
        distinct: whether to check that the positions of a sparse update do not repeat.

    Raises:
        TargetNotFound: the base has only a bias for this target, no weight.
        ShapeMismatch: a shape does not fit.
        NotMergeable: the base has no bias to change.
    """
    for update in site.updates:
        try:
            _check_update(update, site, shapes, biasless)
            if distinct:
                update.check_distinct()
        except AdapterkitError as error:
            # The specification requires that every error about a shape names the target.
            error.where = f"{site.target}: {update.method}"
            raise error from None


def _check_update(update: Update, site: Site, shapes: Shapes, biasless: bool) -> None:
    if update.changes_weight and site.weight is None:
        raise TargetNotFound("the base has only a bias for this target, no weight", cure=USE_ITS_BASE)
    if site.weight is not None and not fits(site.target, (update,), shapes[site.weight]):
        dims = update.dims(site.target.stacked)
        made_for = ", ".join(
            f"{name}={dims[name]}" for name in ("e", "out", "in", "k", "rest", "columns") if name in dims
        )
        why = f"the update has {made_for}, but the base's weight has shape {list(shapes[site.weight])}"
        raise ShapeMismatch(why, cure=USE_ITS_BASE)
    seen = None if site.weight is None else viewed(shapes[site.weight], site.target)
    shape: tuple[int, ...] | None = None
    if seen is not None:
        out, *rest = seen[int(site.target.stacked) :]
        rows = site.target.rows
        if rows is not None and rows[1] > out:
            raise ShapeMismatch(
                f"the update changes rows {rows[0]} to {rows[1]}, but the weight has {out} rows", cure=USE_ITS_BASE
            )
        shape = (out if rows is None else rows[1] - rows[0], *rest)
        update.check_axes(shape)
    if site.bias is None and update.changes_bias and update.needs_bias and not biasless:
        raise NotMergeable("the update changes a bias that the base does not have", cure=_NO_BIAS)
    bias_shape = None if site.bias is None else shapes[site.bias]
    if bias_shape is not None and update.changes_bias and not _bias_fits(update, site.target, bias_shape, shape):
        outs = update.dims(site.target.stacked).get("out", "the weight's")
        raise ShapeMismatch(
            f"the update has {outs} outputs, but the base's bias has shape {list(bias_shape)}", cure=USE_ITS_BASE
        )
    if shape is not None:
        update.check_against(shape)


def _bias_fits(update: Update, target: Target, shape: tuple[int, ...], weight: tuple[int, ...] | None) -> bool:
    """Return whether a bias has as many outputs as the update and the weight.

    The bias has shape `[out]`, or `[e, out]` for a stack of experts. If the target has `rows`, the bias only
    needs to be long enough to contain these rows.
    """
    dims = update.dims(target.stacked)
    lead = (dims["e"],) if target.stacked else ()
    if target.rows is not None:
        return shape[:-1] == lead and len(shape) > 0 and target.rows[1] <= shape[-1]
    outs = {dims.get("out", shape[-1]), shape[-1] if weight is None else weight[0]} if shape else set()
    return shape[:-1] == lead and outs == set(shape[-1:])


_NO_BIAS = (
    "Inject the adapter instead of merging it (adapterkit.torch.inject). Or, if the base's config has attention_bias "
    "or mlp_bias, merge into a copy with biases: from_pretrained(base, attention_bias=True), then save_pretrained"
)
"""The cure if an update changes a bias that the base does not have. PEFT's merge also refuses such an update.

If `from_pretrained` adds the biases, it fills them with zeros, which change no output.
"""


# Rename the targets of an adapter by the user's rules, for operations without a base.
#
# Operations with a base pass the user's rules to the resolver. The resolver also has rules of its own, and reports all
# rules that it used. Operations without a base call `renamed`, which applies only the user's rules.


def renamed(adapters: Sequence[Adapter], rename: str | Sequence[str | Rename]) -> list[Adapter]:
    """Rename the targets of adapters.

    Args:
        adapters: the adapters; each rule must match a target of at least one of them.
        rename: one rule or several, each `FROM=TO` or `@FILE`; the first rule that matches a target's name is used.

    Returns:
        the adapters in the same order; each lineage records the rules that changed the adapter.

    Raises:
        UsageError: a rule cannot be parsed; a rule is about the base, such as `family:NAME`; or two targets of an
            adapter get the same name.
        TargetNotFound: a rule matches no target.
        StorageError, Malformed: a rules file cannot be read.
    """
    rules = parse_renames(rename, [target.path for adapter in adapters for target in adapter.updates])
    family = next((rule.text for rule in rules if rule.is_about_base), None)
    if family is not None:
        cure = f"Omit --rename {family} (rename=) here; use it where the adapter is bound to a base, as in merge"
        raise UsageError(f"the rule {family!r} concerns a base, but no base is read here", where="rename", cure=cure)
    return [_renamed(adapter, rules) for adapter in adapters] if rules else list(adapters)


def _renamed(adapter: Adapter, rules: Sequence[Rename]) -> Adapter:
    updates: dict[Target, tuple[Update, ...]] = {}
    used: dict[str, None] = {}
    for target, given in adapter.updates.items():
        path, rule = renamed_by(target.path, rules)
        new = replace(target, path=path)
        if new in updates:
            cure = "Correct --rename (rename=) so that all targets keep different names"
            raise UsageError(f"two targets would get the name {path}", where=str(target), cure=cure)
        updates[new] = given
        if rule is not None:
            used[rule.text] = None
    return adapter.replace(updates=updates).step("rename", rules=list(used)) if used else adapter


# Find the layout of each stored weight: from shapes, or else from the user's rules, the base's family or the base's
# biases, or else from the adapter's own layout.


def with_layouts(
    sites: list[Site],
    shapes: Shapes,
    config: Mapping[str, object] | None,
    forms: Sequence[Hashable] = (),
    rules: Sequence[Rename] = (),
) -> list[Site]:
    """Return the sites, with each target's layout replaced by the layout in which the base stores the weight.

    Args:
        sites: the sites of one adapter.
        shapes: the shapes of the base's stored tensors, by name.
        config: the base's config.
        forms: the result of `Site.form` for each site, if the caller has computed it already.
        rules: the user's rules; a rule `in_out:GLOB` or `out_in:GLOB` states the layout of square weights.

    Raises:
        ShapeMismatch: the layout of a square weight is ambiguous.
    """
    # Sites with the same result of `Site.form` fit the same layouts, so compute these layouts once per result. Tens of
    # thousands of sites have only a few dozen different results.
    known: dict[Hashable, list[str]] = {}
    fitting = []
    for site, form in zip(sites, forms or [site.form(shapes) for site in sites], strict=True):
        if form not in known:
            known[form] = _fitting_layouts(site, shapes)
        fitting.append(known[form])
    evidence = LayoutEvidence(list(zip(sites, fitting, strict=True)), shapes)
    return [_stored(site, _choose(site, fits, evidence, config, rules)) for site, fits in evidence.sites]


def _stored(site: Site, layout: str) -> Site:
    return site if layout == site.target.layout else replace(site, target=replace(site.target, layout=layout))


def _fitting_layouts(site: Site, shapes: Shapes) -> list[str]:
    if site.weight is None:
        return [site.target.layout]
    stacked = [layout for layout in LAYOUTS if layout.startswith("e ") == site.target.stacked]
    if _product_alone(site) and len(shapes[site.weight]) > 2 + site.target.stacked:
        stacked = [
            site.target.layout
        ]  # Do not deduce [in, out] if updates show only the product of the input size and the kernel's sizes.
    if len(shapes[site.weight]) == 1 + site.target.stacked:
        stacked = stacked[:1]  # A weight without an input axis has only one layout; see section 8 of the specification.
    return [
        layout for layout in stacked if fits(replace(site.target, layout=layout), site.updates, shapes[site.weight])
    ]


def _product_alone(site: Site) -> bool:
    """Return whether the updates show only the product of the input size and the kernel's sizes, not each size."""
    dims = [update.dims(site.target.stacked) for update in site.updates]
    return any("columns" in each for each in dims) and not any({"in", "out", "rest"} & each.keys() for each in dims)


def _choose(
    site: Site,
    fits: list[str],
    evidence: LayoutEvidence,
    config: Mapping[str, object] | None,
    rules: Sequence[Rename],
) -> str:
    declared = site.target.layout
    if len(fits) < 2:
        return fits[0] if fits else declared
    stated = layout_of(rules, site.target.path)
    # LAYOUTS lists [out, in] before [in, out].
    if stated:
        return fits[1] if stated == IN_OUT else fits[0]
    if declared in fits and _whole_only(site):
        return declared
    # For a GGUF file, ignore the layouts that the family's file lists: GGUF files store all weights except embeddings
    # as [out, in]. For embeddings, use the adapter's layout.
    embedding = names_embedding(site.target.path)
    if (config or {}).get(STORED_AS) == "gguf":
        return declared if embedding else fits[0]
    in_out = stored_in_out(site.target.path, config)
    if in_out is None and not embedding and not site.target.stacked:
        in_out = evidence.of_square(site)
    if in_out or (in_out is False and not embedding and not site.target.stacked):
        return fits[1] if in_out else fits[0]
    if in_out is None and any(choice == declared and is_ != declared for choice, is_ in evidence.proven):
        raise ambiguous_square(site.target)
    return declared


def _whole_only(site: Site) -> bool:
    """Return whether the updates have whole weights, not factors.

    For such updates, `_choose` keeps the layout that the target states, if the base's weight fits this layout.
    """
    dims = [update.dims(site.target.stacked) for update in site.updates]
    return any("rest" in each for each in dims) and not any("in" in each for each in dims)


# Reorder fused queries, keys and values for bases that store them head by head. Shapes do not show this order.
#
# MiniMaxAI's shards of MiniMax-H3 have each head's query, key and value side by side. Single files of the model have
# the same names, but store all queries, then all keys, then all values. In memory, adapters always have the order of
# the single files, because the reader reorders the rows of DiffSynth's adapter files. Names, shapes and metadata do not
# show the order of a file, so users of diffusers' loader state it with the argument `qkv_layout`.


def in_order_of(base: Checkpoint, sites: Sequence[Site], shapes: Shapes, rules: Sequence[Rename]) -> list[Site]:
    """Reorder the updates of fused projections so that their rows have the order of the base's rows.

    Args:
        base: the base. A base that is published as a single file has all queries, then all keys, then all values. A
            base in shards may have this order, or store the rows head by head.
        sites: the sites of the updates.
        shapes: the shapes of the base's tensors, by name.
        rules: the user's rules; a rule `rows:by_head` or `rows:by_part` states the order.

    Raises:
        UsageError: the base is sharded, and no rule states the order of its fused queries, keys and values.
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
    """Return a map from the end of a fused projection's name to the number of rows of one head.

    The map covers only the families whose bases may store the rows by part (all queries, all keys, all values) or head
    by head.
    """
    keys = {}
    for head, _ in of_pipelines():
        family = named(head.family) if head.pipeline.diffsynth_head else None
        for weight in () if family is None else family.record.weights:
            place = family.place(weight, "native") if family is not None else None
            if place is not None and place.of == 3:
                keys[_tail(HOLE.sub("0", place.name))] = head.pipeline.diffsynth_head
    return keys


def _tail(path: str) -> str:
    """Return the end of a name after its last number."""
    return shape_of(path).rpartition("#.")[2]


def _by_head(site: Site, shapes: Shapes, size: int) -> Site:
    rows = shapes[site.weight][0] if site.weight is not None else 0
    if not rows or rows % (3 * size):
        why = f"the base's weight has {rows} rows; q, k and v with {size} rows per head need a multiple of {3 * size}"
        raise ShapeMismatch(why, where=str(site.target), cure=USE_ITS_BASE)
    target = replace(site.target, rows=None)
    updates = tuple(_reordered(update, site, rows, size) for update in site.updates)
    return replace(site, target=target, updates=updates)


def _reordered(update: Update, site: Site, rows: int, size: int) -> Update:
    """Reorder an update's rows to the base's order.

    If the update changes only the queries, keys or values, first extend the update to all rows, with zeros.
    """
    if site.target.rows is not None:
        if update.method != "lora":
            why = f"only LoRA, not {update.method}, can change some rows of a weight that the base orders by heads"
            raise NotMergeable(why, where=str(site.target), cure="Train the adapter on the fused weight, or use LoRA")
        update = update.replace(B=_within(update.tensors["B"], rows, site.target.rows))
    elif not update.cuts("out"):
        why = f"{update.method} changes all outputs of a weight together, but the base orders the outputs differently"
        raise NotMergeable(why, where=str(site.target), cure=INJECT_INSTEAD)
    return ungrouped(update, lambda: _order(rows, size), site.target.stacked)


def _within(leaf: Leaf, rows: int, part: tuple[int, int]) -> Lazy:
    """Extend a factor to `rows` rows: rows `part[0]:part[1]` are the factor's rows, all other rows are zero."""
    tensor = as_lazy(leaf)

    def spread(array: Array) -> Array:
        import numpy as np

        whole = np.zeros((rows, *array.shape[1:]), array.dtype)
        whole[part[0] : part[1]] = array
        return whole

    return tensor.map(spread, (rows, *tensor.shape[1:]))


def _order(rows: int, size: int) -> Array:
    """Return `order`: row i of the base is row `order[i]` of the concatenation [queries, keys, values]."""
    import numpy as np

    return np.arange(rows).reshape(3, -1, size).swapaxes(0, 1).reshape(rows)


# Compute the full difference `W' - W` of one weight, for inspection and checks. Merges do not compute it.


A = TypeVar("A")
"""A numpy array or torch tensor."""


def delta(adapter: Adapter, path: str, base: Checkpoint | str | PathLike[str] | None) -> torch.Tensor:
    """Return `W' - W` for the weight `path` in float32, with axes `[out, in, *k]`; see `Adapter.delta`."""
    import torch

    _refuse_other_formulas(path, adapter.find(path))
    if base is None:
        targets = adapter.find(path)
        _one_view(path, targets)
        return _free_delta(targets).float()

    part = adapter.replace(updates=adapter.find(path))
    checkpoint = opened(base)
    sites = bind(part, checkpoint).sites
    _one_view(path, [site.target for site in sites])
    weight = sites[0].weight
    if weight is None:
        raise NotMergeable("the update changes only a bias", where=path, cure="There is no weight difference to return")
    W = view(as_torch(checkpoint.tensors[weight], dtype=torch.float64), sites[0].target)
    return (fold([u for site in sites for u in site.updates], W, sites[0].target.stacked) - W).float()


def _refuse_other_formulas(path: str, targets: Mapping[Target, tuple[Update, ...]]) -> None:
    other = next((u for updates in targets.values() for u in updates if u.kind not in ("additive", "weight")), None)
    if other is not None:
        why = f"{other.method} changes {other.acts_on}, not weights"
        raise NotMergeable(why, where=path or "(model)", cure=INJECT_INSTEAD)


def view(W: A, target: Target, bias: bool = False) -> A:
    """Return a stored weight with the axes that updates use, `[out, in, *k]` or `[e, out, in, *k]`, without a copy.

    Args:
        W: a numpy array or torch tensor as stored.
        target: the target. Its layout is the order of the stored axes; its `rows` are the rows to return.
        bias: whether W is a bias.
    """
    seen: Any = W
    if bias:
        seen = seen if target.rows is None else seen[..., slice(*target.rows)]
        return cast("A", seen)
    if target.layout == "in out *k":
        seen = seen.swapaxes(0, 1)
    elif target.layout == "e in out *k":
        seen = seen.swapaxes(1, 2)
    if target.rows is not None:
        rows = slice(*target.rows)
        seen = seen[:, rows] if target.stacked else seen[rows]
    return cast("A", seen)


def fold(updates: Iterable[Update], W: torch.Tensor, stacked: bool) -> torch.Tensor:
    """Apply the updates to W in order, computing in W's dtype and on W's device. W has the axes of `view`."""
    import torch

    device, dtype = W.device, W.dtype
    for update in updates:
        loaded = update.map(lambda leaf: for_formulas(leaf, device, dtype))
        if not loaded.changes_weight:
            continue
        if stacked:
            W = torch.stack([loaded.expert(e).new_weight(W[e]) for e in range(W.shape[0])])
        else:
            W = loaded.new_weight(W)
    return W


def view_shape(target: Target, updates: Iterable[Update]) -> tuple[int, ...]:
    """Deduce a weight's shape from its updates, without the base. The axes are those of `view`.

    Raises:
        UsageError: the updates do not show the whole shape.
    """
    dims: dict[str, Any] = {}
    for update in updates:
        dims |= update.dims(target.stacked)
    if "rest" in dims:
        return (*((dims["e"],) if target.stacked else ()), dims["out"], *dims["rest"])
    if "out" in dims and "in" not in dims and "columns" in dims:
        return (*((dims["e"],) if target.stacked else ()), dims["out"], dims["columns"])
    if "out" not in dims or "in" not in dims:
        raise UsageError("only the base shows the shape of this weight", where=str(target), cure=PASS_BASE)
    return (*((dims["e"],) if target.stacked else ()), dims["out"], dims["in"], *dims.get("k", ()))


def weight_shape(
    target: Target, updates: Sequence[Update], base: Checkpoint | str | PathLike[str] | None
) -> tuple[int, ...] | None:
    """Return the shape of a target's weight: from the base if it has the weight, or else from the updates.

    Returns:
        the shape `[out, in, *k]`, without the axis of experts. The shape is `[out]` if the updates change only a bias
        and the base does not show the weight's shape. The result is None if the shape is unknown.
    """
    if base is not None:
        checkpoint = opened(base)
        names = aliases(checkpoint)
        keys = (names.get(key, key) for key in (f"{target.path}.weight", target.path))
        stored = next((checkpoint.tensors[key] for key in keys if key in checkpoint.tensors), None)
        seen = None if stored is None else viewed(stored.shape, target)
        if seen is not None:
            rows = target.rows
            shape = seen[int(target.stacked) :]
            return shape if rows is None else (rows[1] - rows[0], *shape[1:])
    if not any(update.changes_weight for update in updates):
        # Use `get`, because output and context updates have no axis `out`.
        out = updates[0].dims(target.stacked).get("out")
        return None if out is None else (int(out),)  # type: ignore[arg-type]
    try:
        return view_shape(target, [update for update in updates if update.changes_weight])[int(target.stacked) :]
    except UsageError:
        return None


def _free_delta(targets: Mapping[Target, tuple[Update, ...]]) -> torch.Tensor:
    import torch

    (target, updates), *_ = targets.items()
    needy = next((u for us in targets.values() for u in us if not isinstance(u, Additive)), None)
    if needy is not None:
        why = f"the formula of {needy.method} needs the weight"
        raise UsageError(why, where=target.path, cure=PASS_BASE)
    zero = torch.zeros(view_shape(target, updates), dtype=torch.float64)
    return fold([u for us in targets.values() for u in us], zero, target.stacked)


def _one_view(path: str, targets: Iterable[Target]) -> None:
    views = {(target.layout, target.rows) for target in targets}
    if len(views) > 1:
        raise UsageError(
            "the weight's updates differ in layout or rows", where=path, cure="Merge the adapter into the base instead"
        )

"""Find how a base stores each weight: from shapes, or else the family's table, or else the adapter's layout."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from ...core.adapter import LAYOUTS
from ...errors import ShapeMismatch
from ..architectures import STORED_AS
from ..layouts import stored_in_out
from ..ties import is_embedding
from .fitting import Shapes, fits
from .sites import Site


def with_layouts(
    sites: list[Site], shapes: Shapes, config: Mapping[str, object] | None, forms: Sequence[Hashable] = ()
) -> list[Site]:
    """Return the sites with the layout in which the base stores each weight.

    Args:
        sites: the sites.
        shapes: the shapes of the base's stored tensors, by name.
        config: the base's config.
        forms: the form of each site, if the caller already computed the forms.

    Raises:
        ShapeMismatch: the layout of a square weight is ambiguous.
    """
    # Compute the fitting layouts once per form: tens of thousands of targets have only a few dozen forms.
    known: dict[Hashable, list[str]] = {}
    fitting = []
    for site, form in zip(sites, forms or [site.form(shapes) for site in sites], strict=True):
        if form not in known:
            known[form] = _fitting_layouts(site, shapes)
        fitting.append(known[form])
    proven = {(site.target.layout, fits[0]) for site, fits in zip(sites, fitting, strict=True) if len(fits) == 1}
    return [_stored(site, _choose(site, fits, proven, config)) for site, fits in zip(sites, fitting, strict=True)]


def _stored(site: Site, layout: str) -> Site:
    return site if layout == site.target.layout else replace(site, target=replace(site.target, layout=layout))


def _fitting_layouts(site: Site, shapes: Shapes) -> list[str]:
    if site.weight is None:
        return [site.target.layout]
    stacked = [layout for layout in LAYOUTS if layout.startswith("e ") == site.target.stacked]
    if _product_alone(site) and len(shapes[site.weight]) > 2 + site.target.stacked:
        stacked = [
            site.target.layout
        ]  # The product of a kernel's axes does not prove that a weight is stored as [in, out].
    if len(shapes[site.weight]) == 1 + site.target.stacked:
        stacked = stacked[:1]  # A weight without inputs has only one layout; see the spec's section 8.
    return [
        layout for layout in stacked if fits(replace(site.target, layout=layout), site.updates, shapes[site.weight])
    ]


def _product_alone(site: Site) -> bool:
    """Whether the updates show only the product of the input size and the kernel's axes, not the single sizes."""
    dims = [update.dims(site.target.stacked) for update in site.updates]
    return any("columns" in each for each in dims) and not any({"in", "out", "rest"} & each.keys() for each in dims)


def _choose(site: Site, fits: list[str], proven: set[tuple[str, str]], config: Mapping[str, object] | None) -> str:
    declared = site.target.layout
    if len(fits) < 2:
        return fits[0] if fits else declared
    if declared in fits and _whole_only(site):
        return declared
    # Ignore the family's table for GGUF files: they store all weights as [out, in].
    gguf = (config or {}).get(STORED_AS) == "gguf"
    in_out = not gguf and stored_in_out(site.target.path, config)
    if in_out:
        return next(layout for layout in fits if layout in ("in out *k", "e in out *k"))
    if gguf and not is_embedding(f"{site.target.path}.weight"):
        return next(layout for layout in fits if layout in ("out *in", "e out *in"))
    if in_out is None and any(said == declared and is_ != declared for said, is_ in proven):
        raise ShapeMismatch(
            "the weight is square and may be stored as [out, in] or [in, out], and the adapter's layout is wrong for "
            "other weights",
            where=str(site.target),
            cure="Add the model_type of a known family to the base's config",
        )
    return declared


def _whole_only(site: Site) -> bool:
    """Whether the updates are only whole weights, so that the declared layout is the order of their own axes."""
    dims = [update.dims(site.target.stacked) for update in site.updates]
    return any("rest" in each for each in dims) and not any("in" in each for each in dims)

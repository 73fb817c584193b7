"""List, as plain data, the names in a base to which an adapter's names are mapped."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ...io.checkpoint import opened
from ..architectures import architecture_of, shape_of
from ..ties import aliases

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue


def name_map(
    base: Checkpoint | str | PathLike[str],
    adapter: Adapter | None = None,
    *,
    rename: str | Sequence[str] = (),
    partial: bool = False,
) -> dict[str, Any]:
    """Return the stored names of an adapter's targets, and the rules that mapped the names.

    Args:
        base: an open checkpoint, or its path.
        adapter: the adapter. If None, the result lists the names in the base, each with the names that other tools use.
        rename: rules for names, each `FROM=TO` or `@FILE`.
        partial: whether to list targets that the base does not have, instead of refusing them.

    Returns:
        a dict with `model_type`, `family` (the name of the base's architecture file, or None) and, with an adapter,
        `targets`, `rules` and `missing`. Without an adapter it has `weights`: a record for each stored name (one of
        several that differ only in numbers), with its name in each naming.

    Raises:
        TargetNotFound: the base does not have a target, or a target's name can mean two modules.
        ShapeMismatch: the shape of a target's weight does not fit.
    """
    base = opened(base)
    architecture = architecture_of(base.config)
    record: dict[str, Any] = {
        "base": str(base.root), "model_type": (base.config or {}).get("model_type"),
        "family": architecture.family if architecture else None,
    }  # fmt: skip
    if adapter is None:
        return record | {"weights": _weights(base)}
    from . import bind

    bound = bind(adapter, base, partial=partial, aliases=aliases(base), rename=rename)
    targets = [
        {
            "target": str(origin), "path": site.target.path, "rows": site.target.rows, "layout": site.target.layout,
            "tensor": site.weight or site.bias,
        }
        for origin, site in zip(bound.origins, bound.sites, strict=True)
    ]  # fmt: skip
    rules = [{"rule": str(rule), "targets": rule.targets} for rule in bound.rules]
    return record | {"targets": targets, "rules": rules, "missing": [str(target) for target in bound.missing]}


def _weights(base: Checkpoint) -> list[JsonValue]:
    """List the base's modules (one of several that differ only in numbers) with their names in every naming."""
    architecture = architecture_of(base.config)
    paths = dict.fromkeys(
        name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in base.tensors
    )
    counts: dict[str, int] = {}
    examples: dict[str, str] = {}
    for path in paths:
        template = shape_of(path)
        counts[template] = counts.get(template, 0) + 1
        examples.setdefault(template, path)
    found: list[JsonValue] = []
    for template, count in counts.items():
        names: dict[str, str] = {}
        for naming in architecture.namings if architecture else ():
            weights = architecture.find(examples[template], naming) if architecture else []
            for weight, _, _ in weights:
                for other in architecture.namings if architecture else ():
                    place = architecture.place(weight, other) if architecture else None
                    if place is not None:
                        names[other] = place.name
        found.append({"name": template, "tensors": count, "names": names})
    return found

"""Check whether updates fit the stored shapes of a base, and whether an adapter was made for this base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from os import PathLike
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ...core.adapter import Target, config_hash
from ...core.metadata import FINGERPRINT, REPORT, SHAPES, fingerprints_of, shapes_of
from ...core.updates import Update
from ...errors import AdapterkitError, CheckFailed, TargetNotFound, UsageError
from ...io.checkpoint import PREFIX, SHAPES_PREFIX, opened, shapes_digest
from ...io.locations import is_repo, source_of
from ..architectures import STORED_AS, Architecture, architecture_of, shape_of, with_names
from ..heads import heads_of
from ..moves import Names, PathPart
from ..resolver import resolve
from ..ties import aliases

if TYPE_CHECKING:
    from ...core.adapter import Adapter
    from ...core.shapes import Dims
    from ...io.checkpoint import Checkpoint
    from ...io.strict_json import JsonValue


# Check whether updates fit a stored shape.


Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of stored tensors, by name."""


def fits(target: Target, updates: tuple[Update, ...], shape: tuple[int, ...]) -> bool:
    """Return whether the updates fit a stored weight of shape `shape`, whose axes are in the order `target.layout`."""
    seen = viewed(shape, target)
    if seen is None:
        return False
    offset = int(target.stacked)
    for update in updates:
        dims = update.dims(target.stacked)
        if target.stacked and dims.get("e") != seen[0]:
            return False
        out, rest = seen[offset], seen[offset + 1 :]
        if target.rows is not None:
            out = target.rows[1] - target.rows[0] if target.rows[1] <= out else -1
        if dims.get("out", out) != out or not _rest_fits(dims, rest):
            return False
    return True


def viewed(shape: tuple[int, ...], target: Target) -> tuple[int, ...] | None:
    """Return a stored shape with its axes in the order that updates use: `[out, in, *k]`, or `[e, out, in, *k]`.

    Return None if the shape has no axis for the outputs.
    """
    lead, rest = shape[: int(target.stacked)], shape[int(target.stacked) :]
    if not rest:
        return None
    # If the outputs come first or are the only axis, the shape already has the axis order of updates.
    if len(rest) < 2 or target.layout.removeprefix("e ").startswith("out"):
        return shape
    inputs, outputs, *kernel = rest
    return (*lead, outputs, inputs, *kernel)


def _rest_fits(dims: Dims, rest: tuple[int, ...]) -> bool:
    if "rest" in dims:
        return bool(dims["rest"] == rest)
    if dims.get("columns", math.prod(rest)) != math.prod(rest):
        return False
    if "in" not in dims:
        return True
    if not rest or dims["in"] != rest[0]:
        return False
    kernel = dims.get("k")
    return not isinstance(kernel, tuple) or _without_ones(kernel) == _without_ones(rest[1:])


def _without_ones(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Drop trailing sizes of 1 from a kernel's shape: some tools store the kernel of a 1D convolution with two axes."""
    while kernel and kernel[-1] == 1:
        kernel = kernel[:-1]
    return kernel


def paths_of(names: Iterable[str]) -> set[str]:
    """Return the paths that targets may have: all names of tensors, and all modules with a weight or a bias."""
    paths = set(names)
    paths.update([name.rpartition(".")[0] for name in paths if name.endswith((".weight", ".bias"))])
    return paths


def biasless(base: Checkpoint, path: str) -> bool:
    """Return whether a base has the weight of module `path`, but not its bias."""
    weights = [name for name in base.tensors if f".{name}".endswith(f".{path}.weight")]
    return bool(weights) and not any(f"{name.removesuffix('weight')}bias" in base.tensors for name in weights)


def live_shape(base: Checkpoint, name: str) -> tuple[int, ...] | None:
    """Return the shape of the tensor `name` in the loaded model; None if the shape is unknown.

    The base may not have a tensor of this name: it may store the same values in several tensors, or in a part of a
    fused tensor.
    """
    # Cache the shapes: format readers ask for the shape of a stack several times, and each computation visits every
    # expert in the base.
    known = _LIVE_SHAPES.setdefault(base, {})
    if name not in known:
        known[name] = _live_shape(base, name)
    return known[name]


_LIVE_SHAPES: WeakKeyDictionary[Checkpoint, dict[str, tuple[int, ...] | None]] = WeakKeyDictionary()


def _live_shape(base: Checkpoint, name: str) -> tuple[int, ...] | None:
    architecture = architecture_of(base.config)
    if architecture is not None:
        return _shape_in(base, name.removesuffix(".weight"), architecture)
    if names_family(base.config):
        return None
    # A folder of shards without a config does not state its family. Try all families that have a weight of this name.
    # If the families give different shapes, the shape is unknown.
    path = name.removesuffix(".weight")
    shapes = {_shape_in(base, path, known) for known in with_names((path,))} - {None}
    return shapes.pop() if len(shapes) == 1 else None


def _share(part: PathPart, base: Checkpoint) -> tuple[int, int]:
    """Return which fraction of a fused weight's rows belongs to `part`, as (numerator, denominator)."""
    if not part.heads:
        return 1, part.of
    heads = heads_of(base.config, str(base.root))
    shares = heads.query, heads.kv, heads.kv
    return shares[part.number], sum(shares)


def names_family(config: Mapping[str, object] | None) -> bool:
    """Return whether a config has a `model_type`, even an unknown one, or was built from a GGUF file."""
    return not {"model_type", STORED_AS}.isdisjoint(config or {})


def _shape_in(base: Checkpoint, path: str, architecture: Architecture) -> tuple[int, ...] | None:
    try:
        moves = resolve([path], _names_of(base), architecture=architecture, partial=True).moves.get(path)
    except TargetNotFound:  # The name can mean two different modules.
        return None
    if not moves:
        return None
    first = moves[0]
    shape = next(base.tensors[n].shape for n in (f"{first.path}.weight", first.path) if n in base.tensors)
    if first.slot is not None:
        shape = shape[1:]
    lead = int(first.expert is None and len(shape) > 2)
    try:
        whole = _share(first.take, base) if first.take else (1, 1)
        part = _share(first.into, base) if first.into else (1, 1)
    except AdapterkitError:  # The base's config does not state the numbers of heads.
        return None
    out = shape[lead] * whole[1] * part[0] // (whole[0] * part[1])
    experts = () if first.expert is None else (len({move.expert for move in moves}),)
    return (*experts, *shape[:lead], out, *shape[lead + 1 :])


@lru_cache(maxsize=2)
def _names_of(base: Checkpoint) -> Names:
    return Names(paths_of(base.tensors))


# Check whether an adapter was made for a given base. The adapter may record its base's name, config hash and weight
# fingerprint; compare them with those of the given base.


_CACHED = re.compile(r"models--(.+)")
"""Matches the name of a repository's folder in huggingface_hub's cache, such as `models--org--name`."""


def mismatches(name: str, adapter: Adapter, base: Checkpoint, fingerprint: str | None) -> list[str]:
    """Compare the base that the adapter records with the given base; return a sentence for each difference.

    Args:
        name: the adapter's name, to use in the sentences.
        adapter: the adapter.
        base: the base.
        fingerprint: the fingerprint of the base's weights; None if it was not computed.
    """
    reasons = []
    known = [each for each in fingerprints_of(adapter) if each.startswith(PREFIX)]
    if fingerprint is not None and known and fingerprint not in known:
        how = relation(base, shapes_of(adapter))
        reasons.append(
            f"{name} was made for a base with the fingerprint {', '.join(known)}; this base has {fingerprint}"
            + (f" ({how})" if how else "")
        )  # fmt: skip
    wanted = adapter.base
    if wanted is None:
        return reasons
    proven = fingerprint is not None and fingerprint in known
    names = names_of(base)
    if is_repo(wanted.id) and names and not proven and str(wanted.id).lower() not in (each.lower() for each in names):
        reasons.append(f"{name} was made for {wanted.id}; this base is {' or '.join(names)}")
    # Skip GGUF files: adapterkit builds their config from key-values, so the hash cannot match a recorded hash.
    if wanted.config_hash is not None and base.config is not None and STORED_AS not in base.config:
        given = config_hash(base.config)
        if given != wanted.config_hash:
            reasons.append(
                f"{name} was made for a base with the config hash {wanted.config_hash}; this base has {given}"
            )
    return reasons


def relation(base: Checkpoint, shapes: Sequence[str]) -> str:
    """Return a phrase that says how a base differs from the recorded base: in weights only, or in names or shapes.

    Args:
        base: the base. Its fingerprint differs from the recorded fingerprint.
        shapes: the recorded digests of tensor names and shapes, see `shapes_digest`. Without such a digest, the
            function returns an empty string.
    """
    known = [each for each in shapes if each.startswith(SHAPES_PREFIX)]
    if not known:
        return ""
    return "same architecture, other weights" if shapes_digest(base) in known else "other names or shapes of tensors"


def identity_of(base: Checkpoint) -> dict[str, str]:
    """Return the arguments with which a lineage step identifies a base.

    The arguments are a fingerprint of the base's weights, and a digest of the tensors' names and shapes. To compute the
    fingerprint, the function reads about 16 MiB, spread over all tensors.
    """
    from ...io.checkpoint import fingerprint

    return {FINGERPRINT: fingerprint(base), SHAPES: shapes_digest(base)}


def identified(adapter: Adapter, base: Checkpoint | str | PathLike[str]) -> dict[str, str]:
    """Return `identity_of(base)` if the adapter records no fingerprint yet; otherwise an empty dict."""
    return {} if fingerprints_of(adapter) else identity_of(opened(base))


TO_REFUSE = "; to refuse such a base, pass --strict-base (strict_base=True)"
"""Functions and commands with the option `strict_base` append this text to each warning about a base."""


def check_bases(
    adapters: Sequence[tuple[str, Adapter]], base: Checkpoint, fingerprint: str | None, strict: bool
) -> tuple[str, ...]:
    """Compare a base with the bases that adapters record; return the differences as warnings, without duplicates.

    Args:
        adapters: (name, adapter) pairs.
        base: the base.
        fingerprint: the fingerprint of the base's weights; None if it was not computed.
        strict: whether to raise an error instead of returning warnings.

    Raises:
        CheckFailed: there is a difference, and `strict` is set.
    """
    reasons = [why for name, adapter in adapters for why in mismatches(name, adapter, base, fingerprint)]
    if reasons and strict:
        cure = "Pass the base that the adapter was made for, or omit --strict-base (strict_base=True)"
        raise CheckFailed("; ".join(reasons), path=base.root, cure=cure)
    return tuple(dict.fromkeys(reasons))


def check_base(
    adapters: Sequence[tuple[str, Adapter]], base: Checkpoint | str | PathLike[str] | None, strict: bool
) -> tuple[str, ...]:
    """Compare the base with the bases that the adapters record, and return the differences; see `check_bases`.

    The base's fingerprint is computed only if an adapter records a fingerprint. Without a base, nothing is compared.
    `formats.read` calls this function if a base is given. Functions that take adapters in memory also call it.

    Raises:
        CheckFailed: see `check_bases`.
        UsageError: `strict` is set, but no base is given.
    """
    from ...io.checkpoint import fingerprint

    if base is None:
        if strict:
            cure = "Pass --base BASE (base=), or omit --strict-base (strict_base=True)"
            raise UsageError("without a base, the adapters' recorded bases cannot be checked", cure=cure)
        return ()
    checkpoint = opened(base)
    taken = fingerprint(checkpoint) if any(fingerprints_of(adapter) for _, adapter in adapters) else None
    return check_bases(adapters, checkpoint, taken, strict)


def check_tuned(tuned: Checkpoint, base: Checkpoint, strict: bool) -> tuple[str, ...]:
    """Return a warning if the tuned weights are the result of a merge whose base was not `base`.

    The function compares the fingerprint of `base` with the fingerprint in the merge record. A merge by adapterkit
    writes this record to the folder of the merged weights. Without a record, nothing is compared.

    Raises:
        CheckFailed: there is a warning, and `strict` is set.
    """
    from ...io.checkpoint import fingerprint

    recorded = merge_record(tuned).get("base_fingerprint")
    if not isinstance(recorded, str) or not recorded.startswith(PREFIX) or recorded == (given := fingerprint(base)):
        return ()
    how = relation(base, [str(merge_record(tuned).get(SHAPES))])
    why = f"{tuned.root} was merged from a base with the fingerprint {recorded}; this base has {given}"
    why += f" ({how})" if how else ""
    if strict:
        cure = "Pass the base that the weights were merged from, or omit --strict-base (strict_base=True)"
        raise CheckFailed(why, path=base.root, cure=cure)
    return (why,)


def merge_record(merged: Checkpoint) -> dict[str, Any]:
    """Return the record that adapterkit's merge wrote next to the merged weights; an empty dict if there is none."""
    from ...io.checkpoint import read_json

    try:
        return read_json(merged.folder / REPORT)
    except AdapterkitError:
        return {}


def names_of(base: Checkpoint) -> tuple[str, ...]:
    """List the repositories that a base may come from.

    The function looks in the record that a pull wrote, and in the names of huggingface_hub's cache folders. If neither
    names a repository, the function uses the config's `_name_or_path`.
    """
    names = []
    source = source_of(base.folder)
    if source is not None:
        names.append(source.repo)
    for part in base.folder.absolute().parts:
        cached = _CACHED.fullmatch(part)
        if cached is not None:
            names.append(cached[1].replace("--", "/"))
    if not names and base.config is not None:
        name = base.config.get("_name_or_path")
        if isinstance(name, str) and is_repo(name):
            names.append(name)
    return tuple(dict.fromkeys(names))


# Show how an adapter's names are mapped to the names in a base. The result can be written as JSON.


def name_map(
    base: Checkpoint | str | PathLike[str],
    adapter: Adapter | None = None,
    *,
    rename: str | Sequence[str] = (),
    partial: bool = False,
) -> dict[str, Any]:
    """Map an adapter's targets to names in the base; return the names, and the rules that mapped them.

    Args:
        base: an open checkpoint, or its path.
        adapter: the adapter. If None, the result lists the base's own names, each with the names that other tools use
            for the same weight.
        rename: rules for names, each `FROM=TO`, `@FILE` or `family:NAME`.
        partial: whether to list targets in `missing` if the base does not have them, instead of raising an error.

    Returns:
        a dict with `base` (the base's path), `model_type` and `family` (the name of the base's architecture file, or
        None). With an adapter, the dict also has `targets`, `rules` and `missing`. Without an adapter, it has
        `weights`: a record for each stored name, with the weight's name in each naming. Stored names that differ only
        in numbers share one record.

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
    """List the base's modules with their names in every naming; names that differ only in numbers share one entry."""
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
    templates: list[JsonValue] = []
    for template, count in counts.items():
        names: dict[str, str] = {}
        for naming in architecture.namings if architecture else ():
            weights = architecture.find(examples[template], naming) if architecture else []
            for weight, _, _ in weights:
                for other in architecture.namings if architecture else ():
                    place = architecture.place(weight, other) if architecture else None
                    if place is not None:
                        names[other] = place.name
        templates.append({"name": template, "tensors": count, "names": names})
    return templates

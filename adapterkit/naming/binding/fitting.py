"""Check whether updates fit a stored shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ...core.adapter import Target
from ...core.updates import Update
from ...errors import AdapterkitError, TargetNotFound
from ..architectures import STORED_AS, Architecture, architecture_of, with_names
from ..heads import heads_of
from ..moves import PathPart
from ..resolver import resolve
from ..stored_names import Names

if TYPE_CHECKING:
    from ...core.shapes import Dims
    from ...io.checkpoint import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of stored tensors, by name."""


def fits(target: Target, updates: tuple[Update, ...], shape: tuple[int, ...]) -> bool:
    """Return whether the updates fit a stored weight with shape `shape`, which has the target's layout."""
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
    """Reorder a stored shape to the axes that updates use, `[out, in, *k]`.

    Return None if the shape has too few axes.
    """
    lead, rest = shape[: int(target.stacked)], shape[int(target.stacked) :]
    if not rest:
        return None
    # Return the shape unchanged: the only axis of such a weight is its outputs, in every layout.
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
    """Drop trailing sizes of 1 from a kernel's shape: some tools write a one-dimensional kernel with two dimensions."""
    while kernel and kernel[-1] == 1:
        kernel = kernel[:-1]
    return kernel


def paths_of(names: Iterable[str]) -> set[str]:
    """Return the paths that targets may have: modules with a weight or a bias, and names of tensors."""
    paths = set(names)
    paths.update([name.rpartition(".")[0] for name in paths if name.endswith((".weight", ".bias"))])
    return paths


def biasless(base: Checkpoint, path: str) -> bool:
    """Return whether a base has the weight of module `path`, but not its bias."""
    weights = [name for name in base.tensors if f".{name}".endswith(f".{path}.weight")]
    return bool(weights) and not any(f"{name.removesuffix('weight')}bias" in base.tensors for name in weights)


def live_shape(base: Checkpoint, name: str) -> tuple[int, ...] | None:
    """Return the shape of a tensor in the live model, if the base stores the tensor split or fused; None if unknown."""
    # Cache the shapes: readers need the shape of each stack several times, and each computation visits every expert of
    # the base.
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
    # The family of a folder of plain shards is unknown. Try all families that have the name; their results must agree.
    path = name.removesuffix(".weight")
    found = {_shape_in(base, path, known) for known in with_names((path,))} - {None}
    return found.pop() if len(found) == 1 else None


def _share(part: PathPart, base: Checkpoint) -> tuple[int, int]:
    """Return the fraction of a fused weight's rows that a part has, as (numerator, denominator)."""
    if not part.heads:
        return 1, part.of
    heads = heads_of(base.config, str(base.root))
    shares = heads.query, heads.kv, heads.kv
    return shares[part.number], sum(shares)


def names_family(config: Mapping[str, object] | None) -> bool:
    """Return whether a base's config names a model type or classes, known to this version or not."""
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

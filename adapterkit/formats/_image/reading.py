"""Read a file of an image format: group keys into modules, decode their methods, find their targets."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.adapter import Adapter, Foreign, Step, Target
from ...errors import AdapterkitError, Malformed, UsageError, nearest
from ...io.lazy import DTYPES, Lazy, at_once
from ...naming.image import families, families_with, rooted
from ...naming.stored_names import WRAPPERS
from .biases import check_biases
from .bundles import ImageBundle, split
from .deciding import FAMILY, Origin, check_said, denoiser_targets
from .file import rules_for
from .hints import ImageLeftovers
from .laws import decode
from .placing import placed

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from .container import Metadata
    from .dialect import ImageFormat
    from .file import ImageUpdate


def decoded(
    dialect: ImageFormat, tensors: Mapping[str, Lazy], metadata: Metadata, compat: str | None, base: Checkpoint | None
) -> Adapter:
    """Return the adapter that a file's tensors and metadata describe.

    Raises:
        Malformed: a key belongs to another format, or two keys mean the same.
    """
    tensors, metadata = _with_alphas(dialect, at_once(tensors), metadata)
    tensors, embeddings = split(tensors) if dialect.bundles else (tensors, {})
    modules = dialect.modules(tensors)
    targets = {stem: _unwrapped(t) for stem, t in dialect.targets(modules, dict(metadata), base).items()}
    _check_distinct(targets)
    _check_apart(targets)
    check_biases(modules, dialect.switch)
    rules = rules_for(dialect.rules, compat, dict(metadata))
    updates, hints = dict[Target, tuple["Update", ...]](), ImageLeftovers()
    for stem, module in modules.items():
        found = [dialect.rescaled(each, stem, dict(metadata)) for each in decode(module, rules)]
        _check_shapes(stem, found)
        updates[targets[stem]] = tuple(each.update for each in found)
        hints.add(dialect.spell, targets[stem], module, found, rules)
    if base is not None:
        inside = [rooted(target.path)[1] for target in denoiser_targets(updates, ())]
        check_said(list(dict.fromkeys(inside)), base, dict(metadata))
    placed_there = updates if base is None else placed(updates, base)
    bundle = ImageBundle(embeddings, updates, Origin(dialect.naming, metadata=dict(metadata)))
    hints.keys |= bundle.keys
    hints.shapes |= bundle.shapes
    hints.stems |= {str(t): hints.stems[str(t)] for t in placed_there if str(t) in hints.stems}
    data = hints.made(metadata, compat)
    kept = {key: tensors[key] for key in hints.kept}
    name = dialect.name()
    return Adapter(
        {**placed_there, **bundle.updates}, None, (Step("read", {"format": name}),), Foreign(name, data, kept)
    )


def _unwrapped(target: Target) -> Target:
    """Return a target without the words that torch.compile, FSDP and activation checkpointing add to paths."""
    words = target.path.split(".")
    if WRAPPERS.isdisjoint(words):
        return target
    return replace(target, path=".".join(word for word in words if word not in WRAPPERS))


def of_family(metadata: Metadata, family: str | None) -> Metadata:
    """Add the family given by the caller to the metadata.

    Raises:
        UsageError: no family has this name.
    """
    if family is None:
        return metadata
    known = [each.name for each in families()]
    if family not in known:
        cure = nearest(family, known) or f"Known: {', '.join(sorted(known))}"
        raise UsageError(f"unknown family {family!r}", cure=cure)
    return [*((key, value) for key, value in metadata if key != FAMILY), (FAMILY, family)]


def check_family(adapter: Adapter, family: str) -> None:
    """Check that the family given by the caller has every module of the U-Net or the transformer.

    Raises:
        UsageError: the family lacks a module; the error names the module.
    """
    own = next(each for each in families() if each.name == family)
    for target in denoiser_targets(adapter.updates, ()):
        if rooted(target.path)[1] not in own:
            why = f"{own.title} does not have this module"
            raise UsageError(why, where=str(target), cure="Name another family, or omit --family (family=)")


def _check_shapes(stem: str, found: list[ImageUpdate]) -> None:
    """Check the tensors' shapes now, because `ImageLeftovers` compares them with what the writer would write."""
    for each in found:
        try:
            each.update.dims()
        except AdapterkitError as error:
            error.where = f"{stem}: {error.where}"
            raise


def _check_apart(targets: Mapping[str, Target]) -> None:
    """Check that the file does not change both a fused weight and its parts.

    Some trainers of Z-Image write both the fused queries, keys and values and their parts. diffusers then ignores the
    fused ones, and other tools add both.

    Raises:
        Malformed: the file changes a module twice.
    """
    inside = {stem: rooted(t.path)[1] for stem, t in targets.items() if t.path.startswith("transformer.")}
    names = list(dict.fromkeys(inside.values()))
    fitting = families_with(names)
    if not fitting or any(family.naming_of(names) for family in fitting):
        return
    seen: dict[str, str] = {}
    for stem, rest in inside.items():
        family = fitting[0]
        for piece in family.moves(rest, family.naming_of([rest]), "diffusers"):
            if seen.setdefault(piece.path, stem) != stem:
                why = f"this key and {seen[piece.path]} both change {piece.path}"
                raise Malformed(why, where=stem, cure="Remove one of the two keys from the file")


def _check_distinct(targets: Mapping[str, Target]) -> None:
    seen: dict[Target, str] = {}
    for stem, target in targets.items():
        if target in seen:
            why = f"this key and {seen[target]} both mean the module {target}"
            raise Malformed(why, where=stem, cure="Remove one of the two from the file")
        seen[target] = stem


# Some families' trainers write one alpha for all modules into the header; the functions below apply it.

ALPHA = "alpha"
"""The header's key for alpha; the slot has the same name."""

CONFIG = "lora_adapter_metadata"
"""The header's key for diffusers' config, which states every scaling."""


def _with_alphas(
    dialect: ImageFormat, tensors: Mapping[str, Lazy], metadata: Metadata
) -> tuple[dict[str, Lazy], Metadata]:
    """Return the tensors with the header's alpha added to each LoRA, and the metadata without this alpha.

    Most loaders ignore such an alpha, so it counts only for families whose `header_alpha` is true. Alphas among the
    tensors, or a config, take precedence over the header's alpha.
    """
    value = _finite(dict(metadata).get(ALPHA, ""))
    parsed = [key for key in map(dialect.parse, tensors) if key is not None] if value else []
    if not parsed or CONFIG in dict(metadata) or any(key.slot == ALPHA for key in parsed):
        return dict(tensors), metadata
    stems = dict.fromkeys(key.stem for key in parsed if key.slot == "down")
    if not _has_header_alpha({rooted(stem)[1] for stem in stems}):
        return dict(tensors), metadata
    alpha = Lazy((), DTYPES["F32"], lambda: _float32(value))
    added = {dialect.spell(stem, ALPHA): alpha for stem in stems}
    return {**tensors, **added}, [(key, text) for key, text in metadata if key != ALPHA]


def _has_header_alpha(names: Collection[str]) -> bool:
    """Whether every family with all of these modules uses an alpha from the header."""
    fitting = families_with(names)
    return bool(fitting) and all(family.facts.header_alpha for family in fitting)


def _finite(text: str) -> float:
    """Return the number in a text; 0 if the text is not a number."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) and abs(value) < 1e30 else 0.0


def _float32(value: float) -> bytes:
    import numpy as np

    return np.array(value, "<f4").tobytes()

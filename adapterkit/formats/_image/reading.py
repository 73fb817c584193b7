"""Reading a file of an image model's dialect: modules out of keys, their laws, their targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.adapter import Adapter, Foreign, Step, Target
from ...errors import AdapterkitError, Malformed, UsageError, nearest
from ...io.lazy import at_once
from ...naming.image import families, families_with, rooted
from ...naming.resolver import WRAPPERS
from .biases import check_biases
from .bundles import Bundle, split
from .deciding import FAMILY, Origin, denoiser_targets
from .file import rules_for
from .header_alpha import with_alphas
from .laws import decode
from .leftovers import Leftovers
from .placing import placed

if TYPE_CHECKING:
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint
    from ...io.lazy import Lazy
    from .container import Metadata
    from .dialect import ImageFormat
    from .file import Found


def decoded(
    dialect: ImageFormat, tensors: Mapping[str, Lazy], metadata: Metadata, compat: str | None, base: Checkpoint | None
) -> Adapter:
    """The adapter that a file's tensors and metadata make up.

    Raises:
        Malformed: a key is of another dialect, or two of them mean the same.
    """
    tensors, metadata = with_alphas(dialect, at_once(tensors), metadata)
    tensors, embeddings = split(tensors) if dialect.bundles else (tensors, {})
    modules = dialect.modules(tensors)
    targets = {stem: _unwrapped(t) for stem, t in dialect.targets(modules, dict(metadata), base).items()}
    _check_distinct(targets)
    _check_apart(targets)
    check_biases(modules, dialect.switch)
    rules = rules_for(dialect.rules, compat, dict(metadata))
    updates, hints = dict[Target, tuple["Update", ...]](), Leftovers()
    for stem, module in modules.items():
        found = [dialect.rescaled(each, stem, dict(metadata)) for each in decode(module, rules)]
        _check_shapes(stem, found)
        updates[targets[stem]] = tuple(each.update for each in found)
        hints.add(dialect.spell, targets[stem], module, found, rules)
    placed_there = updates if base is None else placed(updates, base)
    bundle = Bundle(embeddings, updates, Origin(dialect.naming, metadata=dict(metadata)))
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
    """A target without the words that torch.compile, FSDP and activation checkpointing put into paths."""
    words = target.path.split(".")
    if WRAPPERS.isdisjoint(words):
        return target
    return replace(target, path=".".join(word for word in words if word not in WRAPPERS))


def of_family(metadata: Metadata, family: str | None) -> Metadata:
    """The metadata with the family that the caller says the file is of.

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
    """Check that every module of a U-Net or a transformer is one of the family that the caller named.

    Raises:
        UsageError: one is not; names it.
    """
    own = next(each for each in families() if each.name == family)
    for target in denoiser_targets(adapter.updates, ()):
        if rooted(target.path)[1] not in own:
            why = f"{own.title} has no such module"
            raise UsageError(why, where=str(target), cure="Name another family, or leave --family (family=) out")


def _check_shapes(stem: str, found: list[Found]) -> None:
    """Check tensors against their method's shapes at once: `Leftovers` compares them with what would be written."""
    for each in found:
        try:
            each.update.dims()
        except AdapterkitError as error:
            error.where = f"{stem}: {error.where}"
            raise


def _check_apart(targets: Mapping[str, Target]) -> None:
    """Check that no file changes a fused weight and its parts, too.

    Some trainers of Z-Image write the fused queries, keys and values beside the parts; diffusers then leaves the fused
    one out, and other tools add both.

    Raises:
        Malformed: a module is in the file twice.
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
                why = f"it changes {piece.path}, as does {seen[piece.path]}"
                raise Malformed(why, where=stem, cure="Take one of the two out of the file: they say the same twice")


def _check_distinct(targets: Mapping[str, Target]) -> None:
    seen: dict[Target, str] = {}
    for stem, target in targets.items():
        if target in seen:
            why = f"it is the module {target}, as is {seen[target]}"
            raise Malformed(why, where=stem, cure="Take one of the two out of the file")
        seen[target] = stem

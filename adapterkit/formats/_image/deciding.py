"""Which family's names the targets of an adapter are: decided by all of them together, or refused with the readings.

A name that a family does not have is never passed through into another naming: half of a Qwen-Image LoRA has FLUX's
names, and all names of a FLUX.2 LoRA of double blocks are FLUX.1's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...naming.image import ROOTS, Family, families, rooted

if TYPE_CHECKING:
    from ...adapter import Adapter, Target, Updates
    from ...tensors.checkpoint import Checkpoint

SOURCES = {"comfyui": "native", "xlabs": "native", "bfl_control": "native", "diffusers": "diffusers"}
"""Format -> the naming of its files. kohya and LyCORIS write any names, with underscores."""

DENOISERS = ("unet", "transformer", "denoiser")


@dataclass(frozen=True, slots=True)
class Origin:
    """Facts about the naming that an adapter's names come from.

    Attributes:
        naming: `native` or `diffusers`; empty where nothing tells.
        families: families that have all names of a base, if there is one.
        inside: whether the targets are modules of that base.
    """

    naming: str = ""
    families: tuple[str, ...] = ()
    inside: bool = False


UNKNOWN = Origin()


def origin_of(adapter: Adapter, base: Checkpoint | None) -> Origin:
    """The naming of the files that an adapter was read from, or of the base."""
    from .underscores import modules_of

    told = {SOURCES.get(str(step.args.get("format")), "") for step in adapter.recipe if step.op == "read"}
    naming = next(iter(told)) if len(told) == 1 else ""
    if base is None:
        return Origin(naming)
    known = set(modules_of(base))
    if "_diffusers_version" in (base.config or {}):
        naming = "diffusers"
    elif any(path.startswith(("model.diffusion_model.", "diffusion_model.")) for path in known):
        naming = "native"
    inside = all(target.path in known for target in adapter.updates)
    return Origin(naming, families_of_all(known), inside)


def families_in(base: Checkpoint) -> tuple[str, ...]:
    """The families that have all names of a base's U-Net or transformer."""
    from .underscores import modules_of

    return families_of_all(modules_of(base))


def families_of_all(paths: Iterable[str]) -> tuple[str, ...]:
    """The families that have all of these modules, as far as they are of no text encoder."""
    split = map(rooted, paths)
    inside = [rest for root, rest in split if ROOTS.get(root[:-1], "denoiser") in DENOISERS]
    return tuple(family.name for family in families() if all(path in family for path in inside))


def denoiser_targets(updates: Updates, stay: Collection[str]) -> list[Target]:
    """The targets inside a U-Net or a transformer that are to be in another naming."""
    found = []
    for target in updates:
        root, rest = rooted(target.path)
        inside = ROOTS[root[:-1]] in DENOISERS if root else any(rest in family for family in families())
        if inside and str(target) not in stay:
            found.append(target)
    return found


def decide(updates: Updates, targets: Collection[Target], naming: str, origin: Origin) -> tuple[Family | None, str]:
    """The family by which targets are translated, and why there is none.

    Args:
        updates: all updates, whose shapes are evidence.
        targets: those of the denoiser.
        naming: the naming that is wanted.
        origin: what is known of where the names come from.

    Returns:
        no family and no reason where the names are to stay as they are.
    """
    paths = list(dict.fromkeys(rooted(target.path)[1] for target in targets))
    fitting = [family for family in families() if all(path in family for path in paths)]
    if not fitting:
        return None, "" if origin.naming == naming else _unknown(paths, naming)
    fitting = _narrowed(fitting, lambda family: not family.facts.generic)
    fitting = _narrowed(fitting, lambda family: family.name in origin.families)
    if origin.naming:
        fitting = _narrowed(fitting, lambda family: all(path in family.names(origin.naming) for path in paths))
    fitting = _narrowed(fitting, lambda family: _possible(family, paths, updates, targets))
    fitting = _narrowed(fitting, lambda family: not _inputs(updates, targets).isdisjoint(family.facts.widths))
    if len({_outcome(family, paths, naming) for family in fitting}) > 1:
        names = " or ".join(family.name for family in fitting)
        return None, f"its names are those of {names}, which are translated differently"
    return fitting[0], ""


def _narrowed(families: list[Family], fits: Any) -> list[Family]:
    """The families that fit; all of them where none does, since then the evidence is of another kind of model."""
    return [family for family in families if fits(family)] or families


def _unknown(paths: Iterable[str], naming: str) -> str:
    best = max(families(), key=lambda family: sum(path in family for path in paths))
    odd = next(path for path in paths if path not in best)
    words = {"native": "its authors' naming", "diffusers": "diffusers' naming"}
    return (
        f"{odd} is a module of no family that can be translated into {words.get(naming, 'the naming of this format')}"
    )


def _possible(family: Family, paths: Iterable[str], updates: Updates, targets: Iterable[Target]) -> bool:
    """Whether there are so many blocks, and shapes are such."""
    for path in paths:
        first, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        if number.isdigit() and int(number) >= family.facts.blocks.get(first, 1 << 30):
            return False
    return all(_shaped(family, target, updates[target]) for target in targets) if family.ratios else True


def _shaped(family: Family, target: Target, found: Iterable[Any]) -> bool:
    rest = rooted(target.path)[1]
    patterns = family.names("native").patterns_of(rest)
    ratio = next((family.ratios[pattern] for pattern in patterns if pattern in family.ratios), None)
    if ratio is None or target.rows is not None:
        return True
    for update in found:
        dims = update.dims(target.stacked)
        out, in_ = dims.get("out"), dims.get("in")
        if isinstance(out, int) and isinstance(in_, int) and abs(out - ratio * in_) > 0.5:
            return False
    return True


def _inputs(updates: Updates, targets: Iterable[Target]) -> set[int]:
    sizes = (update.dims(target.stacked).get("in") for target in targets for update in updates[target])
    return {size for size in sizes if isinstance(size, int)}


def _outcome(family: Family, paths: Collection[str], naming: str) -> tuple[Any, ...]:
    """What becomes of the names in the naming that is wanted."""
    wanted = family.wanted(naming)
    source = family.naming_of(paths, wanted)
    return tuple(
        path if source == wanted else family.moves(path, source or family.naming_of([path], wanted), wanted)
        for path in paths
    )

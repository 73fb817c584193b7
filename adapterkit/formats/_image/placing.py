"""Translate targets to the module names of a given base, which has its own prefix and naming."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.adapter import Target, Updates
from ...core.updates import Update
from ...errors import Malformed, TargetNotFound, nearest
from ...methods.dora import DoRA
from ...methods.lora import LoRA
from ...naming.image import ROOTS, rooted
from .deciding import Origin, families_in
from .file import AGAIN, ImageModule
from .translate import in_naming
from .underscores import modules_of

if TYPE_CHECKING:
    from ...core.adapter import Target, Updates
    from ...core.updates import Update
    from ...io.checkpoint import Checkpoint


_DENOISERS = ("unet", "transformer")


def placed(updates: Updates, base: Checkpoint) -> dict[Target, tuple[Update, ...]]:
    """Translate the targets of updates to modules of a base.

    Raises:
        TargetNotFound: the base does not have a target; the error names the nearest module.
    """
    known = set(modules_of(base))
    found: dict[Target, tuple[Update, ...]] = {}
    for target, each in updates.items():
        for place, update in _placed(target, each, known).items():
            found[place] = (*found.get(place, ()), *update)
    lost = next((t for t in found if t.path not in known), None)
    if lost is None:
        return found
    origin = Origin(families=families_in(base))
    for naming in ("native", "diffusers"):
        moved, _ = in_naming({t: u for t, u in found.items() if t.path not in known}, naming, (), origin)
        there = {place: u for t, each in moved.items() for place, u in _placed(t, each, known).items()}
        if there and all(t.path in known for t in there):
            return {**{t: u for t, u in found.items() if t.path in known}, **there}
    cure = nearest(lost.path, known) or "Is this the base that the adapter was trained on?"
    raise TargetNotFound("the base does not have this module", where=str(lost), cure=cure)


def _placed(target: Target, each: tuple[Update, ...], known: set[str]) -> dict[Target, tuple[Update, ...]]:
    """Return the target with the prefix that its module has in the base; unchanged if the base lacks the module."""
    if target.path in known:
        return {target: each}
    root, rest = rooted(target.path)
    component = ROOTS.get(root[:-1], "")
    # Try both components, because ComfyUI's prefix `diffusion_model.` may mean a U-Net or a transformer.
    alike = {component, "denoiser", *(_DENOISERS if component in _DENOISERS else ())}
    same = [word for word, part in ROOTS.items() if part in alike]
    tries = [rest, *(f"{word}.{rest}" for word in same)]
    path = next((path for path in tries if path in known), target.path)
    return {replace(target, path=path): each}


def kernel_of(target: Target, base: Checkpoint | None) -> int:
    """Return the number of kernel axes of a target's weight in the base; 0 if unknown."""
    if base is None:
        return 0
    known = (base.tensors.get(f"{path}.weight") for path in (target.path, rooted(target.path)[1]))
    return next((max(len(leaf.shape) - 2, 0) for leaf in known if leaf is not None), 0)


# In each component of a file, all LoRAs or none must have a bias: loaders have one setting for the whole component.


def check_biases(modules: Mapping[str, ImageModule], part_of: Callable[[str], str]) -> None:
    """Check that in each component all LoRAs or none have a bias.

    Raises:
        Malformed: some LoRAs of a component have a bias, and others do not.
    """
    biased = {part_of(stem) for stem, module in modules.items() if "bias" in module.tensors}
    for stem, module in modules.items():
        if "up" in module.tensors and "bias" not in module.tensors and part_of(stem) in biased:
            why = "this module has no bias in the file, but other modules have one"
            raise Malformed(why, where=module.keys["up"], cure=AGAIN)


def mixed_biases(updates: Updates, part_of: Callable[[Target, Update], str]) -> Iterator[tuple[Target, str]]:
    """Yield the LoRAs with a bias, or those without one if these are fewer, for each component that has both."""
    parties: dict[str, dict[bool, list[Target]]] = {}
    for target, found in updates.items():
        for update in found:
            if isinstance(update, (LoRA, DoRA)):
                party = parties.setdefault(part_of(target, update), {True: [], False: []})
                party[update.tensors.get("bias") is not None].append(target)
    for party in parties.values():
        if party[True] and party[False]:
            own = len(party[True]) <= len(party[False])
            yield from (
                (
                    target,
                    (
                        f"this LoRA {'has a' if own else 'has no'} bias, unlike other LoRAs of the same component "
                        "(such as the text encoder)"
                    ),
                )
                for target in party[own]
            )

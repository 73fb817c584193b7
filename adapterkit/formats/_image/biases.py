"""Check that a part of a file has biases at all of its LoRAs or at none: loaders have one switch for the whole part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ...errors import Malformed
from ...methods.dora import DoRA
from ...methods.lora import LoRA
from .file import AGAIN, ImageModule

if TYPE_CHECKING:
    from ...core.adapter import Target, Updates
    from ...core.updates import Update


def check_biases(modules: Mapping[str, ImageModule], part_of: Callable[[str], str]) -> None:
    """Check the biases of a file's modules.

    Raises:
        Malformed: a bias is missing.
    """
    biased = {part_of(stem) for stem, module in modules.items() if "bias" in module.tensors}
    for stem, module in modules.items():
        if "up" in module.tensors and "bias" not in module.tensors and part_of(stem) in biased:
            why = "its partner is not in the file: the bias, which other modules have"
            raise Malformed(why, where=module.keys["up"], cure=AGAIN)


def mixed_biases(updates: Updates, part_of: Callable[[Target, Update], str]) -> Iterator[tuple[Target, str]]:
    """Yield the LoRAs of the smaller group, if some LoRAs of a part have a bias and others do not."""
    parties: dict[str, dict[bool, list[Target]]] = {}
    for target, found in updates.items():
        for update in found:
            if isinstance(update, (LoRA, DoRA)):
                party = parties.setdefault(part_of(target, update), {True: [], False: []})
                party[update.tensors.get("bias") is not None].append(target)
    for party in parties.values():
        if party[True] and party[False]:
            own = len(party[True]) <= len(party[False])
            yield from ((target, f"lora {'with' if own else 'without'} a bias beside others") for target in party[own])

"""Check that all LoRAs in a part of a file have a bias, or none has: loaders have one setting for the whole part."""

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
        Malformed: some LoRAs of a part have a bias, and others do not.
    """
    biased = {part_of(stem) for stem, module in modules.items() if "bias" in module.tensors}
    for stem, module in modules.items():
        if "up" in module.tensors and "bias" not in module.tensors and part_of(stem) in biased:
            why = "this module has no bias in the file, but other modules have one"
            raise Malformed(why, where=module.keys["up"], cure=AGAIN)


def mixed_biases(updates: Updates, part_of: Callable[[Target, Update], str]) -> Iterator[tuple[Target, str]]:
    """If only some LoRAs of a part have a bias, yield the smaller group."""
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
                (target, f"this lora {'has a' if own else 'has no'} bias, unlike others in its part")
                for target in party[own]
            )

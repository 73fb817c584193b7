"""What of a file the writer would not know by itself: collected while it is read."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from ...core.adapter import Target
from ...core.updates import Update
from ...io.lazy import Lazy
from .container import Metadata
from .encode import encode
from .file import Found, Module, Rules, Stored, rules_at
from .hints import Hints, fingerprint

Spell = Callable[[str, str], str]
"""Module's name and slot -> key."""


class Leftovers:
    """Collects what the writer would not know."""

    def __init__(self) -> None:
        self.stems: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self.shapes: dict[str, list[int]] = {}
        self.without: list[str] = []
        self.derived: dict[str, str] = {}
        self.kept: list[str] = []
        self.idle: dict[str, str] = {}

    def add(self, spell: Spell, target: Target, module: Module, found: list[Found], rules: Rules) -> None:
        self.stems[str(target)] = module.stem
        for each in found:
            self.derived |= {module.keys[s]: fingerprint(each.update.tensors[f]) for s, f in each.derived.items()}
            self.kept += [module.keys[slot] for slot in (*each.kept, *each.idle)]
            self.idle |= {module.keys[slot]: str(target) for slot in each.idle}
            slots = dict(each.fields)
            for stored in encode(each.update, rules_at(rules, module.stem)):
                slot = slots.get(stored.field) if stored.field else stored.slot
                self._compare(spell, module, stored, slot)
            for slot in each.kept:
                self._spelled(spell, module, slot, slot)
        if "alpha" in module.tensors:
            self.kept.append(module.keys["alpha"])
            self._spelled(spell, module, "alpha", "alpha")
        else:
            self.without.append(module.stem)

    def _compare(self, spell: Spell, module: Module, stored: Stored, slot: str | None) -> None:
        if slot is None or slot not in module.tensors or slot == "alpha":
            return
        self._spelled(spell, module, stored.slot, slot)
        if stored.field and module.tensors[slot].shape != stored.leaf.shape:
            self.shapes[module.keys[slot]] = list(module.tensors[slot].shape)

    def _spelled(self, spell: Spell, module: Module, default: str, slot: str) -> None:
        key = spell(module.stem, default)
        if key != module.keys[slot]:
            self.keys[key] = module.keys[slot]

    def made(self, metadata: Metadata, compat: str | None) -> dict[str, object]:
        hints = Hints(
            metadata=metadata, stems=self.stems, keys=self.keys, shapes=self.shapes, without_alpha=self.without,
            derived=self.derived, idle=self.idle, compat=compat,
        )  # fmt: skip
        made: dict[str, object] = msgspec.to_builtins(hints)
        return made


def still(old: Lazy, new: Lazy, update: Update, rules: Rules) -> bool:
    """Whether an alpha that was kept says what the update does."""
    whole = {"w1", "w2"} <= update.tensors.keys()
    if whole and not rules.trained.rs:
        return True
    value, wanted = (Module("", {"alpha": alpha}, {"alpha": "alpha"}).number("alpha") for alpha in (old, new))
    # A scaling with sqrt(r) in it does not give the alpha back to the last bit.
    near = rules.trained.rs and math.isclose(value, wanted, rel_tol=1e-12)
    return value == wanted or near or (value == 0 and update.attributes.get("scaling") == 1)

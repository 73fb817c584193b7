"""Record details of a file that an adapter's fields cannot store, so that the writer can write the same file again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import msgspec

from ...core.adapter import Adapter, Target
from ...core.updates import Update
from ...io.lazy import Lazy, as_lazy
from .._kit import leftovers
from .file import ImageModule, ImageUpdate, Metadata, Rules, StoredTensor, rules_at
from .slots import encode

if TYPE_CHECKING:
    from ...io.lazy import Leaf
    from ...io.strict_json import JsonValue

Size = Annotated[int, msgspec.Meta(ge=0)]


class ImageHints(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Details of the source file, stored in an adapter.

    Attributes:
        metadata: the keys and values of the header, in the header's order.
        stems: a map from each target to the name of the target's module in the file's keys.
        keys: a map from the writer's default key to the file's key, for keys where the two differ.
        shapes: a map from a key in the file to the tensor's shape, for tensors whose shape differs from the writer's
            default shape.
        without_alpha: the modules that have no alpha in the file. Each module is listed by its name in the file's keys.
        derived: a map from the key of a stored tensor to the fingerprint of the field that was computed from this
            tensor.
        idle: a map from key to target, for stored tensors that have no effect.
        compat: the `compat` with which the caller read the file.
    """

    metadata: list[tuple[str, str]] = []
    stems: dict[str, str] = {}
    keys: dict[str, str] = {}
    shapes: dict[str, list[Size]] = {}
    without_alpha: list[str] = []
    derived: dict[str, str] = {}
    idle: dict[str, str] = {}
    compat: str | None = None


def hints_of(adapter: Adapter, format: str) -> ImageHints:  # noqa: A002 - the public contract's word
    """Return the stored details if the adapter was read from this format. Otherwise return empty details.

    Raises:
        Malformed: the stored details are damaged.
    """
    return leftovers(adapter, format, ImageHints)


def fingerprint(leaf: Leaf) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes."""
    tensor = as_lazy(leaf)
    head = f"{tensor.dtype.name} {list(tensor.shape)}\n"
    return hashlib.sha256(head.encode() + bytes(tensor.fetch())).hexdigest()


Spell = Callable[[str, str], str]
"""A function that returns the key for a module's name and a slot."""


class ImageLeftovers:
    """Collects, module by module, the details of a file that the adapter's fields cannot store."""

    def __init__(self) -> None:
        self.stems: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        self.shapes: dict[str, list[int]] = {}
        self.without: list[str] = []
        self.derived: dict[str, str] = {}
        self.kept: list[str] = []
        self.idle: dict[str, str] = {}

    def add(
        self, spell: Spell, target: Target, module: ImageModule, decoded_updates: list[ImageUpdate], rules: Rules
    ) -> None:
        self.stems[str(target)] = module.stem
        for each in decoded_updates:
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

    def _compare(self, spell: Spell, module: ImageModule, stored: StoredTensor, slot: str | None) -> None:
        if slot is None or slot not in module.tensors or slot == "alpha":
            return
        self._spelled(spell, module, stored.slot, slot)
        if stored.field and module.tensors[slot].shape != stored.leaf.shape:
            self.shapes[module.keys[slot]] = list(module.tensors[slot].shape)

    def _spelled(self, spell: Spell, module: ImageModule, default: str, slot: str) -> None:
        key = spell(module.stem, default)
        if key != module.keys[slot]:
            self.keys[key] = module.keys[slot]

    def to_builtins(self, metadata: Metadata, compat: str | None) -> dict[str, JsonValue]:
        hints = ImageHints(
            metadata=metadata, stems=self.stems, keys=self.keys, shapes=self.shapes, without_alpha=self.without,
            derived=self.derived, idle=self.idle, compat=compat,
        )  # fmt: skip
        leftovers: dict[str, JsonValue] = msgspec.to_builtins(hints)
        return leftovers


def still(old: Lazy, new: Lazy, update: Update, rules: Rules) -> bool:
    """Whether the source file's alpha (`old`) still gives the update's scaling.

    `new` is the alpha that the writer computed from the scaling.
    """
    whole = {"w1", "w2"} <= update.tensors.keys()
    if whole and not rules.trained.rs:
        return True
    value, wanted = (ImageModule("", {"alpha": alpha}, {"alpha": "alpha"}).number("alpha") for alpha in (old, new))
    # Allow rounding errors: with rs_lora, scalings contain sqrt(r), so the writer's alpha may differ from the file's in
    # the last bits.
    near = rules.trained.rs and math.isclose(value, wanted, rel_tol=1e-12)
    return value == wanted or near or (value == 0 and update.attributes.get("scaling") == 1)

"""Represent one module of a file: its tensors by slot, the format's rules, and the updates they make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ...core.updates import Update
from ...errors import Malformed
from ...io.lazy import Lazy, value_of
from .._format import FORMULA
from .arguments import Arguments, arguments_in

if TYPE_CHECKING:
    from ...io.lazy import Leaf

AGAIN = "Write the file again with the tool that made it"


@dataclass(frozen=True, slots=True)
class ImageKey:
    """A parsed key: the module's name as the format spells it, and the slot."""

    text: str
    stem: str
    slot: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageModule:
    """The tensors of one module of a file.

    Attributes:
        stem: its name in the keys.
        tensors: slot -> tensor.
        keys: slot -> key.
    """

    stem: str
    tensors: Mapping[str, Lazy]
    keys: Mapping[str, str]

    @property
    def where(self) -> str:
        """Return a key that stands for all, for errors."""
        return next(iter(self.keys.values()))

    def need(self, *slots: str) -> list[Lazy]:
        """Return the tensors of slots that belong together.

        Raises:
            Malformed: one is missing.
        """
        missing = next((slot for slot in slots if slot not in self.tensors), None)
        if missing is not None:
            raise Malformed(f"its partner is not in the file: {missing}", where=self.where, cure=AGAIN)
        return [self.tensors[slot] for slot in slots]

    def number(self, slot: str) -> float:
        """Return the one number that a slot holds.

        Raises:
            Malformed: it holds none, or more than one.
        """
        leaf = self.tensors[slot]
        if leaf.nbytes != leaf.dtype.itemsize:
            raise Malformed(f"{list(leaf.shape)} is not one number", where=self.keys[slot], cure=AGAIN)
        value = value_of(leaf)
        if not -1e300 < value < 1e300:
            raise Malformed(f"{value} is not a finite number", where=self.keys[slot], cure=AGAIN)
        return value


@dataclass(frozen=True, slots=True)
class Rules:
    """A format's rules for scalings.

    Attributes:
        alpha_needed: its trainers write an alpha for every module; a missing or zero alpha means the rank.
        by_formula: as in the paper's formula, a missing alpha is an error and an alpha of 0 is a factor of 0; otherwise
            both mean the rank, as in the forward of its tools.
        oft_zero: meaning of an OFT's alpha of 0: no constraint (True), or no rotation at all (False).
        norms: changes of vectors use the slots of norms.
        peft: DoRA's magnitude has PEFT's shape, [out], or [1, out, 1, ...] of a convolution; else [out, 1, ...].
        slots: the slots that it has; a slot counts if it begins with one of these words.
        trained: the options of LyCORIS in the file's header.
    """

    alpha_needed: bool = False
    by_formula: bool = False
    oft_zero: bool = True
    norms: bool = False
    peft: bool = False
    slots: tuple[str, ...] = ()
    trained: Arguments = field(default_factory=Arguments)


def rules_at(rules: Rules, stem: str) -> Rules:
    """Return the rules at one module, by its name in the keys."""
    there = rules.trained.at(stem)
    return rules if there is rules.trained else replace(rules, trained=there)


def rules_for(rules: Rules, compat: str | None, metadata: Mapping[str, str]) -> Rules:
    """Return the rules of a format in the selected reading, for a file with these metadata."""
    by_formula = compat == FORMULA
    return replace(rules, by_formula=by_formula, trained=Arguments() if by_formula else arguments_in(metadata))


@dataclass(frozen=True, slots=True, eq=False)
class ImageUpdate:
    """An update made from slots: field -> slot; and slots that are only kept."""

    update: Update
    fields: Mapping[str, str]
    kept: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    """Slot that is only kept -> the field computed from it."""
    idle: tuple[str, ...] = ()
    """Slots that are only kept, because they have no effect."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor to write: its slot, and the field it holds; an alpha holds none."""

    slot: str
    leaf: Leaf
    field: str = ""


def inputs_of(modules: Iterable[ImageModule]) -> set[int]:
    """Return the sizes of the inputs of the modules that have LoRA's A."""
    downs = (module.tensors["down"].shape for module in modules if "down" in module.tensors)
    return {shape[1] for shape in downs if len(shape) > 1}

"""One module of a file: its tensors by slot; and what a dialect makes of it."""

from __future__ import annotations

from collections.abc import Mapping
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
class Key:
    """A key taken apart: the module's name in the words of the dialect, and the slot."""

    text: str
    stem: str
    slot: str


@dataclass(frozen=True, slots=True, eq=False)
class Module:
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
        """A key that stands for all."""
        return next(iter(self.keys.values()))

    def need(self, *slots: str) -> list[Lazy]:
        """The tensors of slots that go together.

        Raises:
            Malformed: one is missing.
        """
        missing = next((slot for slot in slots if slot not in self.tensors), None)
        if missing is not None:
            raise Malformed(f"its partner is not in the file: {missing}", where=self.where, cure=AGAIN)
        return [self.tensors[slot] for slot in slots]

    def number(self, slot: str) -> float:
        """The one number that a slot holds.

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
    """How a dialect says scalings.

    Attributes:
        alpha_needed: its trainers write an alpha for every module, and take one that is missing or 0 for the rank.
        by_formula: a missing alpha is an error and an alpha of 0 a factor of 0, as in the paper's formula; otherwise
            both stand for the rank, as in the forward of its tools.
        oft_zero: what an OFT's alpha of 0 is: no constraint (True), or no rotation at all (False).
        norms: changes of vectors have the slots of norms.
        peft: DoRA's magnitude has PEFT's shape, [out], or [1, out, 1, ...] of a convolution; else [out, 1, ...].
        slots: which of the slots it has; a slot that begins with one of these words counts.
        trained: the options of LyCORIS that the file's header names.
    """

    alpha_needed: bool = False
    by_formula: bool = False
    oft_zero: bool = True
    norms: bool = False
    peft: bool = False
    slots: tuple[str, ...] = ()
    trained: Arguments = field(default_factory=Arguments)


def rules_at(rules: Rules, stem: str) -> Rules:
    """The rules at one module, by its name in the keys."""
    there = rules.trained.at(stem)
    return rules if there is rules.trained else replace(rules, trained=there)


def rules_for(rules: Rules, compat: str | None, metadata: Mapping[str, str]) -> Rules:
    """The rules of a dialect in the reading that was asked for, for a file with these metadata."""
    by_formula = compat == FORMULA
    return replace(rules, by_formula=by_formula, trained=Arguments() if by_formula else arguments_in(metadata))


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """An update made of slots: field -> slot; and slots that are only kept."""

    update: Update
    fields: Mapping[str, str]
    kept: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    """Slot that is only kept -> field computed from it."""
    idle: tuple[str, ...] = ()
    """Slots that are only kept, since they have no effect."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A tensor to write: its slot, and the field that it is; alphas are of none."""

    slot: str
    leaf: Leaf
    field: str = ""

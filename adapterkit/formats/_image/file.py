"""Represent one module of a file: its tensors by slot, the format's rules, and the updates of the module."""

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
    """A parsed key: its text, the module's name as the format spells it, and the slot."""

    text: str
    stem: str
    slot: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageModule:
    """The tensors of one module in a file.

    Attributes:
        stem: the module's name in the keys.
        tensors: the tensors by slot.
        keys: the keys by slot.
    """

    stem: str
    tensors: Mapping[str, Lazy]
    keys: Mapping[str, str]

    @property
    def where(self) -> str:
        """Return one key of the module, to name the module in errors."""
        return next(iter(self.keys.values()))

    def need(self, *slots: str) -> list[Lazy]:
        """Return the tensors of several slots, which must all be present.

        Raises:
            Malformed: a slot is missing.
        """
        missing = next((slot for slot in slots if slot not in self.tensors), None)
        if missing is not None:
            raise Malformed(f"the file lacks its partner: {missing}", where=self.where, cure=AGAIN)
        return [self.tensors[slot] for slot in slots]

    def number(self, slot: str) -> float:
        """Return the number that a slot stores.

        Raises:
            Malformed: the slot does not have exactly one finite number.
        """
        leaf = self.tensors[slot]
        if leaf.nbytes != leaf.dtype.itemsize:
            raise Malformed(
                f"the tensor has shape {list(leaf.shape)}, but one number is expected",
                where=self.keys[slot],
                cure=AGAIN,
            )
        value = value_of(leaf)
        if not -1e300 < value < 1e300:
            raise Malformed(f"{value} is not a finite number", where=self.keys[slot], cure=AGAIN)
        return value


@dataclass(frozen=True, slots=True)
class Rules:
    """A format's rules for scalings.

    Attributes:
        alpha_needed: whether the format's trainers write an alpha for every module; a missing or zero alpha means the
            rank.
        by_formula: whether to follow the paper's formula, in which a missing alpha is an error and an alpha of 0 is a
            scaling of 0. If false, both mean the rank, as in the tools' forward.
        oft_zero: the meaning of an OFT's alpha of 0: no constraint (True), or no rotation at all (False).
        norms: whether changes of one-dimensional weights use the slots of norms.
        peft: whether DoRA's magnitude has PEFT's shape, not [out, 1, ...]; PEFT's is [out], on a convolution [1, out,
            1, ...].
        slots: the format's slots, or prefixes of slots.
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
    """Return the rules for one module, given its name in the keys."""
    there = rules.trained.at(stem)
    return rules if there is rules.trained else replace(rules, trained=there)


def rules_for(rules: Rules, compat: str | None, metadata: Mapping[str, str]) -> Rules:
    """Return a format's rules, adapted to a file's metadata and to the selected `compat`."""
    by_formula = compat == FORMULA
    return replace(rules, by_formula=by_formula, trained=Arguments() if by_formula else arguments_in(metadata))


@dataclass(frozen=True, slots=True, eq=False)
class ImageUpdate:
    """An update made from a module's slots.

    Attributes:
        update: the update.
        fields: a map from each field of the update to its slot.
        kept: slots whose tensors are stored with the adapter only to be written again.
        derived: a map from a kept slot to the field that was computed from this slot.
        idle: kept slots that have no effect.
    """

    update: Update
    fields: Mapping[str, str]
    kept: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor to write, with its slot and the name of the update's field; the name is empty for an alpha."""

    slot: str
    leaf: Leaf
    field: str = ""


def inputs_of(modules: Iterable[ImageModule]) -> set[int]:
    """Return the input sizes of the modules that have LoRA's A."""
    downs = (module.tensors["down"].shape for module in modules if "down" in module.tensors)
    return {shape[1] for shape in downs if len(shape) > 1}

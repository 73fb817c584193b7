"""Define the data of one module in a file: its tensors by slot, the format's rules, and the module's updates."""

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
    """A parsed key: the complete text, the module's name in the file (the stem), and the kind of tensor (the slot)."""

    text: str
    stem: str
    slot: str


@dataclass(frozen=True, slots=True, eq=False)
class ImageModule:
    """The tensors of one module in a file. A slot is the kind of a tensor, such as `down`, `up` or `alpha`.

    Attributes:
        stem: the module's name in the keys.
        tensors: the tensors by slot.
        keys: the complete keys by slot.
    """

    stem: str
    tensors: Mapping[str, Lazy]
    keys: Mapping[str, str]

    @property
    def where(self) -> str:
        """Return the first key of the module, which errors use to name the module."""
        return next(iter(self.keys.values()))

    def need(self, *slots: str) -> list[Lazy]:
        """Return the tensors of several slots, which must all be present.

        Raises:
            Malformed: a slot is missing.
        """
        missing = next((slot for slot in slots if slot not in self.tensors), None)
        if missing is not None:
            raise Malformed(f"the file lacks the matching tensor: {missing}", where=self.where, cure=AGAIN)
        return [self.tensors[slot] for slot in slots]

    def number(self, slot: str) -> float:
        """Return the value of a slot whose tensor has one element.

        Raises:
            Malformed: the tensor does not have exactly one element, or the element is not finite.
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
    """The rules by which a format's tensors are decoded and encoded.

    Attributes:
        alpha_needed: whether the format's trainers write an alpha for every module. Their tools replace a missing or
            zero alpha by the rank.
        by_formula: whether to follow the paper's formula, where a missing alpha is an error and an alpha of 0 gives a
            scaling of 0. If false, a missing or zero alpha means the rank, as in the tools' forward.
        oft_zero: whether an OFT's alpha of 0 means that the rotation has no constraint. If false, it allows no
            rotation.
        norms: whether the slots `w_norm` and `b_norm` store changes of one-dimensional weights.
        peft: whether DoRA's magnitude has PEFT's shape, [out] or, for a convolution, [1, out, 1, ...]. If false, the
            shape is [out, 1, ...].
        slots: the slots that the format has, or prefixes of slots.
        trained: the network options in the file's header.
    """

    alpha_needed: bool = False
    by_formula: bool = False
    oft_zero: bool = True
    norms: bool = False
    peft: bool = False
    slots: tuple[str, ...] = ()
    trained: Arguments = field(default_factory=Arguments)


def rules_at(rules: Rules, stem: str) -> Rules:
    """Return the rules for one module, given the module's name in the keys."""
    there = rules.trained.at(stem)
    return rules if there is rules.trained else replace(rules, trained=there)


def rules_for(rules: Rules, compat: str | None, metadata: Mapping[str, str]) -> Rules:
    """Return a format's rules, adapted to a file's metadata and to the caller's `compat`."""
    by_formula = compat == FORMULA
    return replace(rules, by_formula=by_formula, trained=Arguments() if by_formula else arguments_in(metadata))


@dataclass(frozen=True, slots=True, eq=False)
class ImageUpdate:
    """An update that was decoded from a module's slots.

    Attributes:
        update: the decoded update.
        fields: a map from each field of the update to its slot.
        kept: slots whose original tensors are stored in the adapter, so that the same file can be written again.
        derived: a map from a slot in `kept` to the field that was computed from the slot's tensor.
        idle: slots that have no effect; their tensors are stored, too.
    """

    update: Update
    fields: Mapping[str, str]
    kept: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor to write, with its slot and the update's field that it contains; the field is empty for an alpha."""

    slot: str
    leaf: Leaf
    field: str = ""


def inputs_of(modules: Iterable[ImageModule]) -> set[int]:
    """Return the numbers of inputs of all modules that have a `down` (LoRA's A)."""
    downs = (module.tensors["down"].shape for module in modules if "down" in module.tensors)
    return {shape[1] for shape in downs if len(shape) > 1}

"""Define the base class of families. A family has a `peft_type`, and converts keys to updates and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from ....errors import Malformed, ShapeMismatch
from ..alphas import number_fields
from ..patterns import first_match

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..._format import Departure
    from ..file import File, Findings, Found, Key
    from ..settings import Settings

Parts = dict[str, "tuple[str, Lazy]"]
"""A map from each field of an update to (part of the key, tensor as PEFT stores it)."""


Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """The config fields that only this family reads."""


class Family(ABC):
    """Converts the files with one `peft_type`. If a module defines several families, each has a `name`.

    Class attributes:
        name: the family's name; needed only if a module defines several families.
        peft_type: the value of `peft_type` in the config.
        method: the class of most or all of the family's updates.
        others: further classes of the family's updates; one file may have updates of several classes.
        parts: the parts of keys after a module's path, including `.weight` or `.bias`; `*` stands for one word.
        shared: the keys, without `shared_prefix`, of tensors that all modules share.
        shared_prefix: the prefix that is written before a shared key; keys with and without `base_model.` can be read.
        prefix: the prefix that is written before the base's module names.
        names_modules: whether the config lists the modules that have tensors in the file.
        own: the config fields that only this family reads, with PEFT's defaults.
        read: for each field in `own` that changes the meaning of the tensors, a phrase that describes the effect.
        harmless: for each other field of this `peft_type`, a phrase that says why the field has no effect.
        fresh: config fields for an adapter that was not read from PEFT's format.
        departures: the cases, by name, in which PEFT's forward differs from the paper's formula; see `Format`.
        empty: whether tensors of the family's updates may have no elements.
        folds: fields of an update; a scaling that the config cannot express is folded into the first of them that
            exists.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str]
    method: ClassVar[type[Update]]
    others: ClassVar[tuple[type[Update], ...]] = ()
    parts: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    shared_prefix: ClassVar[str] = "base_model."
    prefix: ClassVar[str] = "base_model.model."
    names_modules: ClassVar[bool] = True
    own: ClassVar[type[Own]] = Own
    read: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    fresh: ClassVar[Mapping[str, Any]] = {}
    departures: ClassVar[Mapping[str, Departure]] = {}
    empty: ClassVar[bool] = False
    folds: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def methods(cls) -> tuple[type[Update], ...]:
        """Return all classes that the family's updates may have."""
        return (cls.method, *cls.others)

    @classmethod
    def decode(cls, file: File) -> Findings:
        """Yield the updates of this family in a file.

        Raises:
            Malformed: a tensor lacks its partners.
            ShapeMismatch: the tensors' shapes contradict the config.
        """
        for stem, keys in file.modules(cls.parts).items():
            check_stem(stem, next(iter(keys.values())))
            yield cls.found(file, keys)

    @classmethod
    @abstractmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        """Return the update of one module.

        `keys` has the module's keys by part, and `file.shared` has the shared keys.
        """

    @classmethod
    @abstractmethod
    def encode(cls, update: Any) -> Parts:
        """Map each field of an update, or `FIELD.0`, `FIELD.1`, ..., to (part or shared key, tensor as PEFT stores it).

        A part that begins with a dot belongs to the module, even if a shared key has the same name.
        """

    @classmethod
    def encode_at(cls, update: Any, shape: tuple[int, ...] | None) -> dict[str, tuple[str, Lazy]]:
        """Encode an update of a module. `shape` is the shape of the module's weight in the base; None if unknown."""
        return cls.encode(update)

    @classmethod
    def why_not(cls, target: Target, update: Any) -> str:
        """Return the reason why a file cannot store an update of this target; empty if it can."""
        return (
            "" if target.layout == "out *in" else f"a file cannot store {update.method} of a weight stored as [in, out]"
        )

    @classmethod
    @abstractmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        """Return the config fields whose values the tensors do not show: ranks, scalings, variants."""

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        """Encode all updates of this family, in order.

        Override this method if an update's keys depend on other updates.
        """
        for target, found in updates.items():
            weight = None if base is None else base.tensors.get(f"{target.path}.weight")
            for update in (update for update in found if type(update) in cls.methods()):
                yield cls.encode_at(update, None if weight is None else weight.shape)

    @classmethod
    def guesses(cls, target: Target) -> bool:
        """Whether the keys of a target are uncertain, because it may be an embedding or a Conv1D, whose keys differ."""
        return False

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, JsonValue]:
        """Return the fields of `numbers`. Override this method if the fields depend on the base's shapes."""
        return cls.numbers(updates)

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        """Yield (target, reason) for updates that cannot be in one file together with the other updates."""
        yield from ()

    @classmethod
    def omitted(cls, config: Mapping[str, JsonValue], updates: Mapping[Target, tuple[Update, ...]]) -> frozenset[str]:
        """Return the fields of updates whose tensors need not be written, because the config determines the values."""
        return frozenset()

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        """Return the paths of updates whose scaling has no exact alpha."""
        return []

    @classmethod
    def of_it(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        """Return the updates of this family by path.

        Updates of stacked experts are omitted: in PEFT's files only LoRA has stacks, and the writer refuses all others.
        """
        whole = {target: found for target, found in updates.items() if not target.stacked}
        return {t.path: update for t, found in whole.items() for update in found if type(update) in cls.methods()}

    @classmethod
    def turned(cls, updates: Mapping[Target, tuple[Update, ...]]) -> bool:
        """Return the value of `fan_in_fan_out`: whether at least one of the family's weights is stored as [in, out]."""
        own = (target for target, found in updates.items() if any(type(update) in cls.methods() for update in found))
        return any(target.layout == "in out *k" for target in own)


class Scaled(Own, frozen=True, kw_only=True):
    """The config fields of a family whose scaling is alpha / r."""

    alpha: float = 8

    def scaling(self, settings: Settings, name: str) -> float:
        """Return the scaling of the module `name`."""
        return first_match(settings.alpha_pattern or {}, name, self.alpha) / settings.rank(name)


def scaled_numbers(scales: Mapping[str, tuple[int, float]]) -> dict[str, JsonValue]:
    """Return the config fields for the ranks and alphas of modules, given (rank, scaling) by module."""
    fields, _ = number_fields(scales, (False,))
    del fields["use_rslora"]
    return {"alpha" if name == "lora_alpha" else name: value for name, value in fields.items()}


def inexact_alphas(scales: Mapping[str, tuple[int, float]]) -> list[str]:
    """Return the modules whose scaling has no exact alpha, given (rank, scaling) by module."""
    return number_fields(scales, (False,))[1]


def minority(said: Mapping[Target, object]) -> list[Target]:
    """Return the targets that do not have the most common value; of equally common values, the first one counts."""
    count = Counter(said.values())
    most = max(count, key=lambda value: count[value], default=None)
    return [target for target, value in said.items() if value != most]


def stored_inputs(base: Checkpoint | None, target: Target) -> int | None:
    """Return the number of inputs of a linear layer's weight in the base; None if the base does not show it."""
    weight = None if base is None else base.tensors.get(f"{target.path}.weight")
    if weight is None or len(weight.shape) != 2:
        return None
    return weight.shape[0 if target.layout == "in out *k" else 1]


def check_parts(keys: Mapping[str, Key], wanted: Collection[str]) -> None:
    """Check that a module's keys have exactly the parts in `wanted`.

    Raises:
        Malformed: a part is missing, or the module has a further part.
    """
    some = next(iter(keys.values()))
    missing = next((part for part in wanted if part not in keys), None)
    if missing:
        raise Malformed(f"the file lacks the matching tensor: {missing}", where=some.text, cure=_AGAIN)
    extra = next((key for part, key in keys.items() if part not in wanted), None)
    if extra:
        raise Malformed("this tensor does not fit the module's other tensors", where=extra.text, cure=_AGAIN)


def check_rank(key: Key, tensor: Lazy, rank: int, axis: int = 0) -> None:
    """Check the size of one axis of a factor against the rank in the config.

    Raises:
        ShapeMismatch: the axis has another size, or the factor has no such axis.
    """
    if len(tensor.shape) < 2 or tensor.shape[axis] != rank:
        why = f"the shape is {list(tensor.shape)}, but the config states rank {rank}"
        cure = "The config does not belong to this file, or its rank_pattern is damaged"
        raise ShapeMismatch(why, where=key.text, cure=cure)


def check_stem(stem: str, key: Key) -> None:
    """Check that a module is adapted only once.

    Raises:
        Malformed: the module is inside the wrapper of another adapter.
    """
    if stem.endswith(".base_layer"):
        raise Malformed("this adapter is nested in another adapter", where=key.text, cure=_AGAIN)


_AGAIN = "Save the adapter again with PEFT"

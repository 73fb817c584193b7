"""Define a family: the config words of one `peft_type`, and two functions between its keys and a method's fields."""

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
"""Field -> part of the key, and tensor as PEFT stores it."""


Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of a config that only one family reads."""


class Family(ABC):
    """One `peft_type`. Subclass it in a module of its own, or with a `name` in a module of families that are alike.

    Class attributes:
        name: its name here; needed only where its module has several families.
        peft_type: its name in the config.
        method: the class of its updates, or of most of them.
        others: further classes of its updates, which a file may mix.
        parts: the ends of its keys after a module's path, including `.weight` or `.bias`; a star stands for one word.
        shared: keys of tensors that all modules share; they follow `shared_prefix`.
        shared_prefix: the prefix that is written before a shared key; read with and without `base_model.`.
        prefix: the prefix that is written before the base's own names.
        names_modules: whether its config lists the modules that have tensors.
        own: the fields that no other type has, with PEFT's defaults.
        read: fields that change what its tensors mean -> their effect; without the fields of all types.
        harmless: its own fields without an effect -> the reason.
        fresh: the config of an adapter that was not read from PEFT.
        departures: departures of PEFT's forward from the paper's formula, see `Format`.
        empty: tensors of its updates may have no elements.
        folds: tensor fields; the first that is present absorbs a scaling that the config cannot express.
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
        """Return all classes of its updates."""
        return (cls.method, *cls.others)

    @classmethod
    def decode(cls, file: File) -> Findings:
        """Return all its updates in a file.

        Raises:
            Malformed: a tensor lacks its partners.
            ShapeMismatch: shapes contradict the config.
        """
        for stem, keys in file.modules(cls.parts).items():
            check_stem(stem, next(iter(keys.values())))
            yield cls.found(file, keys)

    @classmethod
    @abstractmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        """Return the update of one module, from its keys by part; shared keys are in `file.shared`."""

    @classmethod
    @abstractmethod
    def encode(cls, update: Any) -> Parts:
        """Return field, or `field.0`, `field.1`, ... -> part or shared key, and tensor as PEFT stores it.

        A part that begins with a dot is the module's own, even if a shared key has the same name.
        """

    @classmethod
    def encode_at(cls, update: Any, shape: tuple[int, ...] | None) -> dict[str, tuple[str, Lazy]]:
        """Encode an update at a module; `shape` is its weight's shape as stored, if the base is known."""
        return cls.encode(update)

    @classmethod
    def why_not(cls, target: Target, update: Any) -> str:
        """Say why a file cannot express an update at its target; empty if it can."""
        return "" if target.layout == "out *in" else f"{update.method} on a weight stored [in, out]"

    @classmethod
    @abstractmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        """Return the fields that tensors do not determine: ranks, scalings, forms."""

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        """Encode every update of this family, in order; for families whose keys depend on the other updates too."""
        for target, found in updates.items():
            weight = None if base is None else base.tensors.get(f"{target.path}.weight")
            for update in (update for update in found if type(update) in cls.methods()):
                yield cls.encode_at(update, None if weight is None else weight.shape)

    @classmethod
    def guesses(cls, target: Target) -> bool:
        """Whether it is not known which of two keys a target has: an embedding's, or a Conv1D's."""
        return False

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, Any]:
        """Return the fields of `numbers`, for families that also need shapes of the base."""
        return cls.numbers(updates)

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        """Yield targets whose update cannot be in one file with the others, and the reason."""
        yield from ()

    @classmethod
    def omitted(cls, config: Mapping[str, JsonValue], updates: Mapping[Target, tuple[Update, ...]]) -> frozenset[str]:
        """Return fields whose tensors this config makes unnecessary, because it determines them."""
        return frozenset()

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        """Return paths of the updates whose scaling no alpha gives exactly."""
        return []

    @classmethod
    def of_it(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        """Return path -> its update, for the updates of this family.

        Stacked experts are left out: PEFT has files of them only for LoRA, and the writer refuses the others.
        """
        whole = {target: found for target, found in updates.items() if not target.stacked}
        return {t.path: update for t, found in whole.items() for update in found if type(update) in cls.methods()}

    @classmethod
    def turned(cls, updates: Mapping[Target, tuple[Update, ...]]) -> bool:
        """Whether weights among its targets are stored [in, out]: `fan_in_fan_out`."""
        own = (target for target, found in updates.items() if any(type(update) in cls.methods() for update in found))
        return any(target.layout == "in out *k" for target in own)


class Scaled(Own, frozen=True, kw_only=True):
    """Fields of a family whose scaling is alpha / r."""

    alpha: float = 8

    def scaling(self, settings: Settings, name: str) -> float:
        """Return the factor on the change at the module `name`."""
        return first_match(settings.alpha_pattern or {}, name, self.alpha) / settings.rank(name)


def scaled_numbers(scales: Mapping[str, tuple[int, float]]) -> dict[str, JsonValue]:
    """Return rank and alpha fields for the rank and scaling of each module."""
    fields, _ = number_fields(scales, (False,))
    del fields["use_rslora"]
    return {"alpha" if name == "lora_alpha" else name: value for name, value in fields.items()}


def inexact_alphas(scales: Mapping[str, tuple[int, float]]) -> list[str]:
    """Return the modules whose scaling no alpha / r gives exactly."""
    return number_fields(scales, (False,))[1]


def minority(said: Mapping[Target, object]) -> list[Target]:
    """Return the targets whose value is not the most common one; of equally common ones, the first counts."""
    count = Counter(said.values())
    most = max(count, key=lambda value: count[value], default=None)
    return [target for target, value in said.items() if value != most]


def stored_inputs(base: Checkpoint | None, target: Target) -> int | None:
    """Return how many inputs the weight of a linear layer has, if the base tells."""
    weight = None if base is None else base.tensors.get(f"{target.path}.weight")
    if weight is None or len(weight.shape) != 2:
        return None
    return weight.shape[0 if target.layout == "in out *k" else 1]


def check_parts(keys: Mapping[str, Key], wanted: Collection[str]) -> None:
    """Check that a module has exactly these parts.

    Raises:
        Malformed: one is missing, or there is another.
    """
    some = next(iter(keys.values()))
    missing = next((part for part in wanted if part not in keys), None)
    if missing:
        raise Malformed(f"its partner is not in the file: {missing}", where=some.text, cure=_AGAIN)
    extra = next((key for part, key in keys.items() if part not in wanted), None)
    if extra:
        raise Malformed("a tensor of another form than its partners'", where=extra.text, cure=_AGAIN)


def check_rank(key: Key, tensor: Lazy, rank: int, axis: int = 0) -> None:
    """Check one axis of a factor against the rank in the config.

    Raises:
        ShapeMismatch: they differ, or there is no such axis.
    """
    if len(tensor.shape) < 2 or tensor.shape[axis] != rank:
        why = f"{list(tensor.shape)}, where the config says rank {rank}"
        raise ShapeMismatch(why, where=key.text, cure="The config is not of this file, or its rank_pattern is damaged")


def check_stem(stem: str, key: Key) -> None:
    """Check that a module is adapted once.

    Raises:
        Malformed: it is inside another adapter's wrapper.
    """
    if stem.endswith(".base_layer"):
        raise Malformed("nested in another adapter", where=key.text, cure=_AGAIN)


_AGAIN = "Save the adapter again with PEFT"

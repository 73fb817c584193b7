"""Poly: `poly_lora_A` [splits, skills, in / splits, r], `poly_lora_B` [splits, skills, r, out / splits], and logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ....errors import ShapeMismatch, Unsupported
from ....io.lazy import as_lazy
from ....methods.poly import Poly
from ..file import File, Found, Key, make
from ._family import Family, Own, Rank, check_parts, minority

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

FIELDS = {"poly_lora_A": "A", "poly_lora_B": "B", "poly_router.module_logits": "logits"}
"""A map from a word in the keys to the update's field."""


class PolyFields(Own, frozen=True, kw_only=True):
    """The sizes, except those of the module."""

    r: Rank = 8
    n_tasks: Rank = 1
    n_skills: Rank = 4
    n_splits: Rank = 1
    poly_type: str = "poly"


class PolyFamily(Family):
    """The family of the peft_type POLY."""

    peft_type = "POLY"
    method = Poly
    parts = tuple(FIELDS)
    own: ClassVar[type[Own]] = PolyFields
    read: ClassVar[Mapping[str, str]] = {
        "n_skills": "number of pairs of factors in each split",
        "n_splits": "number of blocks of channels that are mixed separately",
        "n_tasks": "number of tasks",
        "poly_type": "poly, the only known value",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "poly_type": "poly", "task_type": "CAUSAL_LM"}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        own, some = file.settings.own, keys["poly_lora_A"]
        if own.poly_type != "poly":
            why = f"this version does not know the router {own.poly_type[:60]!r}"
            raise Unsupported(why, where="poly_type", cure="Run the adapter with PEFT")
        update: Any = make("poly", {FIELDS[part]: file.tensors[key] for part, key in keys.items()})
        if (told := _sizes(update)) != (own.r, own.n_tasks, own.n_skills, own.n_splits):
            why = f"r, tasks, skills and splits are {told} in the tensors, but not in the config"
            raise ShapeMismatch(why, where=some.text, cure="The config does not belong to this file")
        return Found(some.path, update, {FIELDS[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: Poly) -> dict[str, tuple[str, Lazy]]:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        sizes = _sizes(next(iter(cls.of_it(updates).values())))
        return dict(zip(("r", "n_tasks", "n_skills", "n_splits"), sizes, strict=True))

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        said = {t: _sizes(u) for t, found in updates.items() for u in found if isinstance(u, Poly)}
        for target in minority(said):
            yield target, "the rank or the number of tasks, skills or splits of this poly differs from the others"


def _sizes(update: Poly) -> tuple[int, int, int, int]:
    """Return r, and the numbers of tasks, skills and splits.

    Raises:
        ShapeMismatch: the tensors contradict each other.
    """
    r, tasks, skills, splits = (cast(int, update.dims()[name]) for name in ("r", "tasks", "skills", "splits"))
    return r, tasks, skills, splits

"""HiRA: `hira_A` [r, in, *k], `hira_B` [out, r, 1, ...] with a 1 per kernel axis; `hira_embedding_A` and `_B`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.hira import HiRA
from ..file import File, Found, Key, make
from ._family import Family, Parts, check_parts, check_rank

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

PLAIN = {"A": "hira_A", "B": "hira_B"}
EMBEDDING = {"A": "hira_embedding_A", "B": "hira_embedding_B"}
"""A map from the update's field to the part of a key."""


class HiraFamily(Family):
    """The family of the peft_type HIRA."""

    peft_type = "HIRA"
    method = HiRA
    parts = (*PLAIN.values(), *EMBEDDING.values())
    harmless: ClassVar[Mapping[str, str]] = {"hira_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        fields = EMBEDDING if EMBEDDING["A"] in keys else PLAIN
        check_parts(keys, fields.values())
        own = {field: keys[part] for field, part in fields.items()}
        A, B = (file.tensors[own[field]] for field in ("A", "B"))
        _check_rank(file, own["A"], A)
        if math.prod(B.shape[:2]) != math.prod(B.shape):
            why = f"the shape {list(B.shape)} has a kernel; B must only mix channels"
            raise ShapeMismatch(why, where=own["B"].text, cure="Save the adapter again with PEFT")
        update = make("hira", {"A": A, "B": B.reshape(*B.shape[:2])})
        turned = fields is EMBEDDING or (file.settings.fan_in_fan_out and len(A.shape) == 2)
        return Found(own["A"].path, update, own, "in out *k" if turned else "out *in")

    @classmethod
    def encode(cls, update: HiRA) -> Parts:
        B = as_lazy(update.B)
        return {"A": (PLAIN["A"], as_lazy(update.A)), "B": (PLAIN["B"], B.reshape(*B.shape, *[1] * _kernel(update)))}

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        from ..spelling import is_embedding  # It imports the families.

        for target, found in updates.items():
            for update in (update for update in found if isinstance(update, HiRA)):
                fields = EMBEDDING if is_embedding(target) else PLAIN
                yield {field: (fields[field], leaf) for field, (_, leaf) in cls.encode(update).items()}

    @classmethod
    def guesses(cls, target: Target) -> bool:
        from ..spelling import is_embedding  # It imports the families.

        return is_embedding(target) is None

    @classmethod
    def why_not(cls, target: Target, update: HiRA) -> str:
        return (
            "PEFT has no hira on a transposed convolution" if target.layout == "in out *k" and _kernel(update) else ""
        )

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        from ..spelling import is_embedding  # It imports the families.

        paths = cls.of_it(updates)
        turned = any(t.path in paths and t.layout == "in out *k" and not is_embedding(t) for t in updates)
        rank = int(next(iter(paths.values())).B.shape[1])
        return {"r": rank, "rank_pattern": {}, "fan_in_fan_out": turned}


def _check_rank(file: File, key: Key, A: Lazy) -> None:
    """Accept the common rank or a pattern's rank, because a second adapter of a model in PEFT uses a pattern."""
    if file.settings.r not in A.shape[:1]:
        check_rank(key, A, file.settings.rank(key.path))


def _kernel(update: HiRA) -> int:
    return len(update.A.shape) - 2

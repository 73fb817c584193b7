"""Lily: `lily_A.weight` [r, in], `lily_B.weight` [num_B * r, out], `lily_router.weight` [num_B, r].

Modules with the same shape and the same matching word in `target_modules` share B, and each `stride_A` of them share A.
A file repeats the shared tensors for each module; after reading, several updates share each of them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Malformed, ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.lily import Lily
from ..file import File, Found, Key, make
from ._family import Family, Own, Rank, check_parts, check_rank, check_stem, minority

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue
    from ..file import Findings
    from ..settings import Settings

FIELDS = {"lily_A.weight": "A", "lily_B.weight": "B", "lily_router.weight": "router"}
"""A map from a word in the keys to the update's field."""


class LilyFields(Own, frozen=True, kw_only=True):
    """The sizes, and the number of modules that share A."""

    r: Rank = 32
    num_B: Rank = 2
    stride_A: Rank = 1
    scaling: float = 1.0


class LilyFamily(Family):
    """The family of the peft_type LILY."""

    peft_type = "LILY"
    method = Lily
    parts = tuple(FIELDS)
    own: ClassVar[type[Own]] = LilyFields
    read: ClassVar[Mapping[str, str]] = {
        "num_B": "number of factors B, the ones with outputs",
        "scaling": "the factor on the change",
        "stride_A": "number of neighbouring modules that share A",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "stride_A": 1}

    @classmethod
    def decode(cls, file: File) -> Findings:
        found = []
        for stem, keys in file.modules(cls.parts).items():
            check_stem(stem, next(iter(keys.values())))
            found.append(cls.found(file, keys))
        yield from _shared(found, file.settings)

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        own, tensors = file.settings.own, {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        check_rank(keys["lily_A.weight"], tensors["A"], own.r)
        check_rank(keys["lily_B.weight"], tensors["B"], own.r * own.num_B)
        tensors["B"] = tensors["B"].reshape(own.num_B, own.r, tensors["B"].shape[1])
        if tensors["router"].shape != (own.num_B, own.r):
            why = f"the shape is {list(tensors['router'].shape)}, but the config states [{own.num_B}, {own.r}]"
            raise ShapeMismatch(
                why, where=keys["lily_router.weight"].text, cure="The config does not belong to this file"
            )
        path = keys["lily_A.weight"].path
        return Found(
            path, make("lily", tensors, scaling=own.scaling), {FIELDS[part]: key for part, key in keys.items()}
        )

    @classmethod
    def encode(cls, update: Lily) -> dict[str, tuple[str, Lazy]]:
        held = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        held["B"] = held["B"].reshape(-1, held["B"].shape[-1])
        return {field: (part, held[field]) for part, field in FIELDS.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        return {"num_B": some.B.shape[0], "r": some.A.shape[0], "scaling": some.scaling}

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        said = {t: (u.scaling, *u.router.shape) for t, found in updates.items() for u in found if isinstance(u, Lily)}
        for target in minority(said):
            yield target, "the rank, the scaling or the number of experts of this lily differs from the others"


def _shared(found: list[Found], settings: Settings) -> Iterator[Found]:
    """Yield the same updates, but with one tensor object for each shared tensor.

    Raises:
        Malformed: modules that share a tensor in PEFT have different values; PEFT would load only the last.
    """
    groups: dict[Any, list[Found]] = defaultdict(list)
    for each in found:
        tensors = each.update.tensors
        groups[_word(each.path, settings), tensors["A"].shape[1], tensors["B"].shape[2]].append(each)
    first: dict[Any, Any] = {}
    for group, members in groups.items():
        for field, allowed in (("A", math.ceil(len(members) / settings.own.stride_A)), ("B", 1)):
            several: dict[bytes, Any] = {}
            for each in members:
                leaf = as_lazy(each.update.tensors[field])
                kind = sha256(leaf.fetch()).digest()
                first[id(leaf)] = several.setdefault(kind, leaf)
                if len(several) > allowed:
                    why = f"its {field} differs from its neighbours', but by the config they share it ({group[0]})"
                    raise Malformed(why, where=each.keys[field].text, cure="Save the adapter again with PEFT")
    yield from (replace(each, update=each.update.map(lambda leaf: first.get(id(leaf), leaf))) for each in found)


def _word(path: str, settings: Settings) -> str:
    """Return the word in the config that matches a module; the last one that matches, as in PEFT."""
    words = settings.target_modules
    if isinstance(words, str):
        return words
    return next((word for word in reversed(words or ()) if path.endswith(word)), path)

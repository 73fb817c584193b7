"""AdaLoRA: `lora_A` [r, in * k], `lora_B` [out, r], `lora_E` [r, 1], without the ranks that training removed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Malformed
from ....io.lazy import Lazy, as_lazy
from ....methods.adalora import AdaLoRA
from ..file import File, Found, Key, make
from ._family import Family, Own, Rank, check_parts, check_rank, minority
from ._weights import not_embedded

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue

FIELDS = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
"""A map from a word in the keys to the update's field."""

EPSILON = 1e-5
"""PEFT adds this value to the rank before dividing by it."""


class AdaLoRAFields(Own, frozen=True, kw_only=True):
    """The rank before training, and the ranks that remained after training."""

    init_r: Rank = 12
    lora_alpha: float = 8
    rank_pattern: dict[str, list[bool]] | None = None


class AdaloraFamily(Family):
    """The family of the peft_type ADALORA."""

    peft_type = "ADALORA"
    method = AdaLoRA
    parts = tuple(FIELDS)
    own: ClassVar[type[Own]] = AdaLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "init_r": "scaling = lora_alpha / (init_r + 0.00001), also for modules with a reduced rank",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "beta1": "training only",
        "beta2": "training only",
        "deltaT": "training only",
        "orth_reg_weight": "training only",
        "target_r": "training only",
        "tfinal": "training only",
        "tinit": "training only",
        "total_step": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "total_step": 1,
    }
    empty = True
    folds = ("E",)

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        some, own = keys["lora_A"], file.settings.own
        left = _left(own, some)
        check_rank(some, file.tensors[some], left)
        check_rank(keys["lora_B"], file.tensors[keys["lora_B"]], left, axis=1)
        check_rank(keys["lora_E"], file.tensors[keys["lora_E"]], left)
        tensors = {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        tensors["E"] = tensors["E"].reshape(left) if tensors["E"].shape == (left, 1) else tensors["E"]
        # With an alpha of 0, PEFT trains with init_r instead, so use init_r. When PEFT loads a pruned module, it uses
        # the remaining rank, which changes the trained function; that fault is not copied.
        alpha = own.lora_alpha if own.lora_alpha > 0 else own.init_r
        update = make("adalora", tensors, scaling=alpha / (own.init_r + EPSILON))
        layout = "in out *k" if file.settings.fan_in_fan_out else "out *in"
        return Found(some.path, update, {FIELDS[part]: key for part, key in keys.items()}, layout)

    @classmethod
    def encode(cls, update: AdaLoRA) -> dict[str, tuple[str, Lazy]]:
        held = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        held["E"] = held["E"].reshape(*held["E"].shape, 1)
        return {field: (part, held[field]) for part, field in FIELDS.items()}

    @classmethod
    def why_not(cls, target: Target, update: AdaLoRA) -> str:
        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        found = cls.of_it(updates)
        ranks = {path: int(update.E.shape[0]) for path, update in found.items()}
        scaling = next((update.scaling for update in found.values()), 1.0)
        init_r = max([1, *ranks.values()])
        init_r, alpha = next(_exact(scaling, init_r), (init_r, 8))
        dropped = {f"{path}.lora_E": [i < r for i in range(init_r)] for path, r in ranks.items() if r != init_r}
        return {
            "init_r": init_r,
            "lora_alpha": alpha,
            "rank_pattern": dropped or None,
            "target_r": max(1, min(ranks.values(), default=1)),
            "fan_in_fan_out": cls.turned(updates),
        }

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        found = cls.of_it(updates)
        r = max([1, *(int(update.E.shape[0]) for update in found.values())])
        return [path for path, update in found.items() if next(_exact(update.scaling, r), None) is None]

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        said = {t: u.scaling for t, found in updates.items() for u in found if isinstance(u, AdaLoRA)}
        for target in minority(said):
            yield target, "the scaling of this adalora differs from the others; the config states one for all"


def _left(own: AdaLoRAFields, key: Key) -> int:
    """Return the rank that the config states for a module."""
    kept = (own.rank_pattern or {}).get(f"{key.path}.lora_E")
    if kept is not None and len(kept) != own.init_r:
        why = f"it has {len(kept)} entries, but init_r is {own.init_r}"
        raise Malformed(why, where=f"rank_pattern: {key.path}.lora_E", cure="Save the adapter again with PEFT")
    return own.init_r if kept is None else sum(kept)


def _exact(scaling: float, rank: int) -> Iterator[tuple[int, float]]:
    """Yield (init_r, lora_alpha) that yield exactly this scaling, with an init_r of at least `rank`."""
    for init_r in range(rank, rank + 9):
        guess = scaling * (init_r + EPSILON)
        if not math.isfinite(guess) or guess <= 0:
            continue
        whole = round(guess) if guess < 1 << 53 else guess
        near = (whole, guess, math.nextafter(guess, math.inf), math.nextafter(guess, -math.inf))
        yield from ((init_r, alpha) for alpha in near if alpha > 0 and alpha / (init_r + EPSILON) == scaling)

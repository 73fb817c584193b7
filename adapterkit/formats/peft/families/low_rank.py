"""Families like LoRA with more between its factors: AdaLoRA, DEFT and GraLoRA.

AdaLoRA: `lora_A` [r, in * k], `lora_B` [out, r], `lora_E` [r, 1], without the ranks that training removed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....errors import Malformed
from ....io.lazy import Lazy, as_lazy
from ....methods.adalora import AdaLoRA
from ....methods.deft import DEFT
from ....methods.gralora import GraLoRA
from ..alphas import exact_alpha
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts, Rank, check_parts, check_rank, minority
from ._weights import check_size, layout, not_embedded, not_linear, side, unlike

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
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

    name = "adalora"
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


# DEFT: `deft_P` [out, r] and, unless `para`, `deft_R` [r, in]; r is at most the number of outputs.


PARTS = {"deft_P": "P", "deft_R": "R"}


class DEFTFields(Own, frozen=True, kw_only=True):
    """The rank, the scaling and the formula."""

    r: int = 8
    alpha: float | None = None
    para: bool = False
    decomposition_method: Literal["relu", "qr"] = "relu"


class DeftFamily(Family):
    """The family of the peft_type DEFT."""

    name = "deft"
    peft_type = "DEFT"
    method = DEFT
    parts = tuple(PARTS)
    own: ClassVar[type[Own]] = DEFTFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / r, with the module's own r; 1 without alpha",
        "decomposition_method": "qr: P is made orthonormal; relu: P is used unchanged",
        "para": "whether the module has no R",
    }
    harmless: ClassVar[Mapping[str, str]] = {"deft_dropout": "training only", "init_scale": "initial values"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "deft_dropout": 0.0, "init_scale": 1.0, "init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own = file.settings.own
        check_parts(keys, ("deft_P",) if own.para else tuple(PARTS))
        key = keys["deft_P"]
        P = file.tensors[key]
        rank = min(own.r, P.shape[0]) if P.shape else own.r
        check_rank(key, P, rank, axis=1)
        fields = {PARTS[part]: found for part, found in keys.items()}
        tensors = {field: file.tensors[found] for field, found in fields.items()}
        made = make("deft", tensors, scaling=own.alpha / rank if own.alpha else 1.0)
        update = made.replace(orthogonal=own.decomposition_method == "qr")
        return Found(key.path, update, fields, "in out *k" if file.settings.fan_in_fan_out else "out *in")

    @classmethod
    def encode(cls, update: DEFT) -> dict[str, tuple[str, Lazy]]:
        return {field: (f"deft_{field}", as_lazy(leaf)) for field, leaf in update.tensors.items()}

    @classmethod
    def why_not(cls, target: Target, update: DEFT) -> str:

        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        found = cls.of_it(updates)
        some = max(found.values(), key=lambda update: int(update.P.shape[1]))
        scaled = next((u for u in found.values() if u.scaling != 1), None)
        turned = any(target.layout == "in out *k" and target.path in found for target in updates)
        return {
            "r": int(some.P.shape[1]),
            "alpha": None if scaled is None else exact_alpha((int(scaled.P.shape[1]), float(scaled.scaling)), False),
            "para": some.R is None,
            "decomposition_method": "qr" if some.orthogonal else "relu",
            "fan_in_fan_out": turned,
        }


# GraLoRA: `gralora_A` [g, in / g, r], `gralora_B` [g, r, out / g]; hybrids have `gralora_A_general` and B's, too.


BLOCKS = {"gralora_A": "A", "gralora_B": "B"}
HYBRID = BLOCKS | {"gralora_A_general.weight": "A_whole", "gralora_B_general.weight": "B_whole"}
"""A map from a word in the keys to the update's field."""


class GraLoRAFields(Own, frozen=True, kw_only=True):
    """The ranks, the number of blocks, and alpha."""

    alpha: float = 64
    gralora_k: int = 2
    hybrid_r: int = 0


class GraLoRAFamily(Family):
    """The family of the peft_type GRALORA."""

    name = "gralora"
    peft_type = "GRALORA"
    method = GraLoRA
    parts = tuple(HYBRID)
    folds = ("B",)
    own: ClassVar[type[Own]] = GraLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / (r + hybrid_r)",
        "gralora_k": "number of blocks along each axis",
        "hybrid_r": "rank of the LoRA in addition to the blocks; 0 for none",
    }
    harmless: ClassVar[Mapping[str, str]] = {"gralora_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "gralora_dropout": 0.0, "init_weights": True}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own, r = file.settings.own, file.settings.r
        fields = HYBRID if own.hybrid_r else BLOCKS
        check_parts(keys, fields)
        key = keys["gralora_A"]
        check_size(key, side(file.tensors[key], 0, 3), own.gralora_k, "gralora_k")
        check_size(key, side(file.tensors[key], 2, 3), r, "r")
        if own.hybrid_r:
            whole = keys["gralora_A_general.weight"]
            check_size(whole, side(file.tensors[whole], 0, 2), own.hybrid_r, "hybrid_r")
        tensors = {fields[part]: file.tensors[key] for part, key in keys.items()}
        update = make("gralora", tensors, scaling=own.alpha / (r + own.hybrid_r))
        return Found(key.path, update, {fields[part]: key for part, key in keys.items()}, layout(file, key.path))

    @classmethod
    def encode(cls, update: GraLoRA) -> Parts:
        fields = BLOCKS if update.A_whole is None else HYBRID
        return {field: (part, as_lazy(update.tensors[field])) for part, field in fields.items()}

    @classmethod
    def why_not(cls, target: Target, update: GraLoRA) -> str:
        return not_linear(target, update.method)

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        plain = {path: update for path, update in cls.of_it(updates).items() if update.A_whole is None}
        if any(exact_alpha((int(u.A.shape[2]), float(u.scaling)), False) is None for u in plain.values()):
            return list(plain)
        return unlike({path: float(update.scaling) for path, update in plain.items()})

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        forms = Counter(_form(update) for update in cls.of_it(updates).values())
        g, r, hybrid, scaling = forms.most_common(1)[0][0]
        turned = any(target.layout == "in out *k" for target in updates)
        fields = {"gralora_k": g, "r": r, "hybrid_r": hybrid, "fan_in_fan_out": turned}
        return fields | {"alpha": exact_alpha((r + hybrid, scaling), False) or scaling * (r + hybrid)}


def _form(update: GraLoRA) -> tuple[int, int, int, float]:
    hybrid = 0 if update.A_whole is None else int(update.A_whole.shape[0])
    return int(update.A.shape[0]), int(update.A.shape[2]), hybrid, float(update.scaling)

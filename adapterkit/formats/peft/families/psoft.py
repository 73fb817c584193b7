"""PSOFT: `psoft_R.weight`, [r * (r - 1) / 2] for a rotation, or [r, r]; `psoft_R.vector_a` and `vector_b` [r]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec

from ....errors import ShapeMismatch
from ....io.lazy import as_lazy
from ....linalg.rotations import block_size
from ....methods.psoft import PSOFT
from ..file import File, Found, Key
from ._family import Family, Own, Parts, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

WEIGHT, VECTOR_A, VECTOR_B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"


class PSOFTFields(Own, frozen=True, kw_only=True):
    """The rank, the form of R, and how A and B are computed from the base."""

    r: int = 32
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, msgspec.Meta(ge=0, le=999)] = 10
    random_seed: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = 0
    psoft_orth: bool = True
    psoft_mag_a: bool = True
    psoft_mag_b: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts of the module's keys."""
        return (WEIGHT, *[VECTOR_A] * self.psoft_mag_a, *[VECTOR_B] * self.psoft_mag_b)


class PsoftFamily(Family):
    """The family of the peft_type PSOFT."""

    peft_type = "PSOFT"
    method = PSOFT
    parts = (WEIGHT, VECTOR_A, VECTOR_B)
    own: ClassVar[type[Own]] = PSOFTFields
    empty = True
    read: ClassVar[Mapping[str, str]] = {
        "ab_svd_init": "psoft_init: B gets the singular values; pissa_init: both factors get their square roots",
        "cayley_neumann_eps": "the limit on Q's norm with use_cayley_neumann",
        "num_cayley_neumann_terms": "number of terms of the series",
        "psoft_mag_a": "whether there is a vector_a",
        "psoft_mag_b": "whether there is a vector_b",
        "psoft_orth": "whether R is a rotation; otherwise R is any matrix",
        "psoft_svd": "lowrank: torch.svd_lowrank on the CPU computes A and B",
        "psoft_svd_lowrank_niter": "lowrank: the argument niter",
        "random_seed": "lowrank: the seed of the random numbers",
        "use_cayley_neumann": "whether to use the first terms of a series instead of the exact transform",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "psoft_alpha": "no effect: B is divided by the factor that it sets",
        "psoft_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "ab_svd_init": "psoft_init", "fan_in_fan_out": False, "init_weights": True, "psoft_dropout": 0.0,
        "psoft_mag_a": True, "psoft_mag_b": True, "psoft_orth": True, "psoft_svd": "full",
        "use_cayley_neumann": False,
    }  # fmt: skip

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own = file.settings.own
        check_parts(keys, own.parts)
        fields: dict[str, str] = {WEIGHT: "pairs" if own.psoft_orth else "R", VECTOR_A: "a", VECTOR_B: "b"}
        _check(own, keys[WEIGHT], file.tensors[keys[WEIGHT]])
        found = {fields[part]: key for part, key in keys.items()}
        series = own.psoft_orth and own.use_cayley_neumann
        leaves: Any = {field: file.tensors[key] for field, key in found.items()}
        terms = max(own.num_cayley_neumann_terms, 1) if series else 0
        eps = own.cayley_neumann_eps or 0.0 if series else 0.0
        sketched = own.psoft_svd == "lowrank"
        update = PSOFT(
            **leaves, symmetric=own.ab_svd_init == "pissa_init", terms=terms, eps=eps,
            steps=own.psoft_svd_lowrank_niter + 1 if sketched else 0, seed=own.random_seed if sketched else 0,
        )  # fmt: skip
        return Found(keys[WEIGHT].path, update, found)

    @classmethod
    def encode(cls, update: PSOFT) -> Parts:
        parts = {"pairs": WEIGHT, "R": WEIGHT, "a": VECTOR_A, "b": VECTOR_B}
        return {field: (parts[field], as_lazy(leaf)) for field, leaf in update.tensors.items() if field in parts}

    @classmethod
    def why_not(cls, target: Target, update: PSOFT) -> str:
        if update.A is not None:
            return (
                "this psoft stores A and B, but PEFT computes them from the base, with signs that depend on the machine"
            )
        if update.seed and not update.steps:
            return "this psoft has a seed, but an exact decomposition"
        if update.eps and not update.terms:
            return "this psoft has a limit on Q, but an exact transform"
        return super().why_not(target, update)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        rank = int(some.R.shape[0]) if some.pairs is None else block_size(int(some.pairs.shape[0]))
        return {
            "r": rank,
            "ab_svd_init": "pissa_init" if some.symmetric else "psoft_init",
            "psoft_svd": "lowrank" if some.steps else "full",
            **({"psoft_svd_lowrank_niter": some.steps - 1, "random_seed": some.seed} if some.steps else {}),
            "psoft_orth": some.R is None,
            "psoft_mag_a": some.a is not None,
            "psoft_mag_b": some.b is not None,
            "use_cayley_neumann": some.terms > 0,
            "num_cayley_neumann_terms": some.terms or 5,
            "cayley_neumann_eps": float(some.eps) or None,
        }


def _check(own: PSOFTFields, key: Key, weight: Lazy) -> None:
    wanted = (own.r * (own.r - 1) // 2,) if own.psoft_orth else (own.r, own.r)
    if weight.shape != wanted:
        why = f"the shape is {list(weight.shape)}, but the config states rank {own.r}"
        raise ShapeMismatch(why, where=key.text, cure="The config does not belong to this file")

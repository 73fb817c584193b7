"""RandLoRA: `randlora_lambda` [r, n] and `randlora_gamma` [n, short] per module; bases for all, copied per module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Malformed, Unsupported
from ....io.lazy import Lazy, as_lazy
from ....methods.randlora import RandLoRA
from ..alphas import exact_alpha
from ..file import File, Found, Key, make
from ._family import Family, Own, Rank, check_parts, check_rank, minority, stored_inputs
from ._weights import not_embedded

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue

OWN = {"randlora_lambda": "lam", "randlora_gamma": "gamma"}
SHARED = {"randlora_A": "A", "randlora_B": "B"}
"""A map from a word in the keys to the update's field."""


class RandLoRAFields(Own, frozen=True, kw_only=True):
    """The rank and the scaling, and whether the file has the bases."""

    r: Rank = 32
    randlora_alpha: float = 640
    save_projection: bool = True


class RandloraFamily(Family):
    """The family of the peft_type RANDLORA."""

    peft_type = "RANDLORA"
    method = RandLoRA
    parts = (*OWN, *SHARED)
    shared = tuple(SHARED)
    own: ClassVar[type[Own]] = RandLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "randlora_alpha": "scaling = randlora_alpha / r",
        "save_projection": "whether the bases are in the file; must be true",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "the seed of the bases, which are in the file",
        "randlora_dropout": "training only",
        "sparse": "how the bases were drawn; they are in the file",
        "very_sparse": "how the bases were drawn; they are in the file",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_weights": True,
        "projection_prng_key": 0,
        "randlora_dropout": 0.0,
    }
    folds = ("lam",)

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        own = file.settings.own
        if not own.save_projection:
            why = "RandLoRA's bases are not in the file, and PEFT draws them in a machine-dependent precision"
            raise Unsupported(why, where="save_projection", cure="Save the adapter from PEFT with save_projection=True")
        missing = next((word for word in SHARED if word not in file.shared), None)
        if missing is not None:
            raise Malformed(f"the file lacks a shared basis: {missing}", where="save_projection", cure=_AGAIN)
        copies = {part: key for part, key in keys.items() if part in SHARED}
        check_parts({part: key for part, key in keys.items() if part not in copies}, OWN)
        for part, key in copies.items():
            _check_copy(file, key, file.shared[part])
        check_rank(keys["randlora_lambda"], file.tensors[keys["randlora_lambda"]], own.r)
        places = {field: keys[part] for part, field in OWN.items()}
        places |= {field: file.shared[part] for part, field in SHARED.items()}
        update = make(
            "randlora", {n: file.tensors[key] for n, key in places.items()}, scaling=own.randlora_alpha / own.r
        )
        places |= {f"{SHARED[part]}.copy": key for part, key in copies.items()}
        layout = "in out *k" if file.settings.fan_in_fan_out else "out *in"
        return Found(keys["randlora_lambda"].path, update, places, layout)

    @classmethod
    def encode(cls, update: RandLoRA) -> dict[str, tuple[str, Lazy]]:
        held = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        words = {field: (part, held[field]) for part, field in (OWN | SHARED).items()}
        return words | {f"{field}.copy": (f".{part}", held[field]) for part, field in SHARED.items()}

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        r = int(some.lam.shape[0])
        alpha = exact_alpha((r, some.scaling), rslora=False)
        turned = cls.turned(updates)
        return {"r": r, "randlora_alpha": alpha, "save_projection": True, "fan_in_fan_out": turned}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        found = cls.of_it(updates)
        return [p for p, u in found.items() if exact_alpha((int(u.lam.shape[0]), u.scaling), rslora=False) is None]

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        """Yield targets that do not fit the others.

        PEFT has one rank and one scaling. Its bases are as large as the largest module, and as many as r needs.
        """
        own = {t: u for t, found in updates.items() for u in found if isinstance(u, RandLoRA)}
        said = {t: (u.scaling, tuple(u.A.shape), tuple(u.B.shape)) for t, u in own.items()}
        odd = minority(said)
        yield from ((target, "the scaling or the bases of this randlora differ from the others") for target in odd)
        kept = {target: update for target, update in own.items() if target not in odd}
        for target, update in kept.items():
            n, short = update.gamma.shape
            if n != -(-short // update.lam.shape[0]):
                yield target, "the number of terms of this randlora differs from PEFT's for a weight of this size"
        for longs, bases, r, shorts in {(*u.B.shape, u.A.shape[-1]) for u in kept.values()}:
            needed = _needed(base, kept)
            if bases != -(-shorts // r) or (needed is not None and (shorts, longs) != needed):
                yield from (
                    (target, "the sizes of its bases differ from those that PEFT creates for these weights")
                    for target in kept
                )


def _needed(base: Checkpoint | None, own: Mapping[Target, RandLoRA]) -> tuple[int, int] | None:
    """Return the largest number of outputs and of inputs, the smaller of them first; None if the base is unknown."""
    widths = {target: stored_inputs(base, target) for target in own}
    if base is None or None in widths.values():
        return None
    outs = [base.tensors[f"{t.path}.weight"].shape[1 if t.layout == "in out *k" else 0] for t in own]
    sides = sorted((max(outs), max(width for width in widths.values() if width is not None)))
    return sides[0], sides[1]


def _check_copy(file: File, copy: Key, original: Key) -> None:
    """Check that a module's copy of a basis equals the original: PEFT loads all copies into the same tensor."""
    one, other = file.tensors[copy], file.tensors[original]
    same = one is other or ((one.shape, one.dtype) == (other.shape, other.dtype) and one.fetch() == other.fetch())
    if not same:
        raise Malformed(f"this copy differs from {original.text}", where=copy.text, cure=_AGAIN)


_AGAIN = "Save the adapter again with PEFT"

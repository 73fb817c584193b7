"""BOFT: `boft_R` [factors, blocks, b, b], and `boft_s` [out, 1], or [1, out] for a convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Malformed, ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.boft import BOFT
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue


class BOFTFields(Own, frozen=True, kw_only=True):
    """The sizes and numbers of blocks and factors."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1


class BoftFamily(Family):
    """The family of the peft_type BOFT."""

    peft_type = "BOFT"
    method = BOFT
    parts = ("boft_R", "boft_s")
    own: ClassVar[type[Own]] = BOFTFields
    read: ClassVar[Mapping[str, str]] = {
        "boft_block_num": "number of blocks; 0 if boft_block_size states it",
        "boft_block_size": "size of blocks; 0 if boft_block_num states it",
        "boft_n_butterfly_factor": "number of factors; one if PEFT ran without its CUDA extension",
    }
    harmless: ClassVar[Mapping[str, str]] = {"boft_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none", "boft_block_num": 0, "boft_block_size": 0, "boft_dropout": 0.0, "init_weights": True,
    }  # fmt: skip

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, cls.parts)
        R, s, own = file.tensors[keys["boft_R"]], file.tensors[keys["boft_s"]], file.settings.own
        _check(own, keys["boft_R"], R)
        if len(s.shape) != 2 or 1 not in s.shape:
            raise ShapeMismatch(
                f"the shape {list(s.shape)} is not that of a scale of outputs", where=keys["boft_s"].text, cure=_OTHER
            )
        update = make("boft", {"R": R, "s": s.reshape(-1)})
        return Found(keys["boft_R"].path, update, {"R": keys["boft_R"], "s": keys["boft_s"]})

    @classmethod
    def encode(cls, update: BOFT) -> Parts:
        return {"R": ("boft_R", as_lazy(update.R)), "s": ("boft_s", as_lazy(update.s).reshape(-1, 1))}

    @classmethod
    def encode_at(cls, update: BOFT, shape: tuple[int, ...] | None) -> Parts:
        turned = {"s": ("boft_s", as_lazy(update.s).reshape(1, -1))} if shape is not None and len(shape) > 2 else {}
        return cls.encode(update) | turned

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        shapes = [tuple(map(int, update.R.shape)) for update in cls.of_it(updates).values()]
        factors, blocks, sizes = ({shape[axis] for shape in shapes} for axis in (0, 1, 2))
        by_size = len(sizes) == 1
        return {
            "boft_block_size": sizes.pop() if by_size else 0,
            "boft_block_num": 0 if by_size else max(blocks),
            "boft_n_butterfly_factor": factors.pop() if len(factors) == 1 else 0,
        }


def _check(own: BOFTFields, key: Key, R: Lazy) -> None:
    if (own.boft_block_size > 0) == (own.boft_block_num > 0):
        why = "exactly one of boft_block_size and boft_block_num must be 0"
        raise Malformed(why, where="boft_block_size", cure="Save the adapter again with PEFT")
    factors, blocks, size = R.shape[:3] if len(R.shape) == 4 else (0, 0, 0)
    fits = size == own.boft_block_size if own.boft_block_size else blocks == own.boft_block_num
    if not fits or not own.boft_n_butterfly_factor or factors not in (1, own.boft_n_butterfly_factor):
        why = f"the shape {list(R.shape)} contradicts boft_block_size, boft_block_num or boft_n_butterfly_factor"
        raise ShapeMismatch(why, where=key.text, cure=_OTHER)


_OTHER = "The config does not belong to this file"

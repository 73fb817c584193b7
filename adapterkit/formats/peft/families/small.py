"""Families with one to four small tensors per module: BEFT, C3A, DeLoRA, HRA and RoAd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....errors import SAVE_WITH_PEFT, ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.c3a import C3A
from ....methods.delora import DeLoRA
from ....methods.dense import Dense
from ....methods.hra import HRA
from ....methods.road import RoAd
from ..file import DecodedUpdate, File, Key, make
from . import Family, MethodFields, Parts, check_parts, check_rank, scaled_numbers
from ._weights import check_size, side, size_at, size_fields

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue


class BeftFamily(Family):
    """BEFT: `beft_bias` [1, out], which is added to the layer's bias."""

    name = "beft"
    peft_type = "BEFT"
    method = Dense
    parts = ("beft_bias",)
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        (key,) = keys.values()
        tensor = file.tensors[key]
        if len(tensor.shape) != 2 or tensor.shape[0] != 1:
            raise ShapeMismatch(
                f"the shape must be [1, out], but is {list(tensor.shape)}",
                where=key.text,
                cure=SAVE_WITH_PEFT,
            )
        return DecodedUpdate(key.path, make("dense", {"d": tensor.reshape(tensor.shape[1])}), {"d": key})

    @classmethod
    def encode(cls, update: Dense) -> dict[str, tuple[str, Lazy]]:
        return {} if update.d is None else {"d": ("beft_bias", as_lazy(update.d).reshape(1, -1))}

    @classmethod
    def why_not(cls, target: Target, update: Dense) -> str:
        if update.D is not None or update.scaling != 1:
            return "PEFT's beft can store only a change of the bias, with a scaling of 1"
        return super().why_not(target, update)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        return {}


class Renamed(Family):
    """The base class of families that store each field of an update under one key of the module.

    Class attributes:
        fields: a map from the endings of keys to fields of the update.
    """

    fields: ClassVar[Mapping[str, str]]

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, cls.fields)
        cls.check(file, keys)
        fields = {cls.fields[part]: key for part, key in keys.items()}
        tensors = {field: file.tensors[key] for field, key in fields.items()}
        update = make(cls.name, tensors, **cls.attributes(file.settings.method_fields))
        return DecodedUpdate(next(iter(keys.values())).path, update, fields)

    @classmethod
    def check(cls, file: File, keys: Mapping[str, Key]) -> None:
        """Check the shapes of a module's tensors against the config.

        Raises:
            ShapeMismatch: a shape does not match the config.
        """

    @classmethod
    def attributes(cls, config: Any) -> dict[str, Any]:
        """Return the attributes that an update gets from the config."""
        return {}

    @classmethod
    def encode(cls, update: Update) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in cls.fields.items()}


class C3AFields(MethodFields, frozen=True, kw_only=True):
    """The size of the blocks."""

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = None


class C3AFamily(Renamed):
    """C3A: `c3a_kernel` [out / b, in / b, b]."""

    name = "c3a"
    peft_type = "C3A"
    method = C3A
    fields: ClassVar[Mapping[str, str]] = {"c3a_kernel": "kernel"}
    parts = tuple(fields)
    method_fields: ClassVar[type[MethodFields]] = C3AFields
    read: ClassVar[Mapping[str, str]] = {
        "block_size": "number of rows and columns of a block",
        "block_size_pattern": "block sizes for some modules; a pattern must equal the module's path, or match "
        "everything after a dot in the path",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": "xavier_uniform"}

    @classmethod
    def check(cls, file: File, keys: Mapping[str, Key]) -> None:
        key, config = keys["c3a_kernel"], file.settings.method_fields
        size = size_at(config.block_size, config.block_size_pattern, key.path)
        check_size(key, side(file.tensors[key], 2, 3), size, "block_size")

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        return size_fields({path: int(u.kernel.shape[2]) for path, u in cls.of_it(updates).items()}, "block_size")


class DeLoRAFamily(Renamed):
    """DeLoRA: `delora_A` [r, in], `delora_B` [out, r], `delora_lambda` [1], `delora_w_norm` [in]."""

    name = "delora"
    peft_type = "DELORA"
    method = DeLoRA
    fields: ClassVar[Mapping[str, str]] = {
        "delora_A": "A", "delora_B": "B", "delora_lambda": "strength", "delora_w_norm": "w_norm",
    }  # fmt: skip
    parts = tuple(fields)
    harmless: ClassVar[Mapping[str, str]] = {
        "delora_lambda": "initial value of the tensor delora_lambda",
        "lambda_pattern": "initial values of the tensor delora_lambda for some modules",
        "module_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True, "module_dropout": 0.0}

    @classmethod
    def check(cls, file: File, keys: Mapping[str, Key]) -> None:
        key = keys["delora_A"]
        check_rank(key, file.tensors[key], file.settings.rank(key.path))

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        ranks = {path: (int(update.A.shape[0]), 1.0) for path, update in cls.of_it(updates).items()}
        fields = scaled_numbers(ranks)
        return {name: fields[name] for name in ("r", "rank_pattern")}


class HRAFields(MethodFields, frozen=True, kw_only=True):
    """The rank, and whether the columns of `hra_u` are made orthogonal before they are used."""

    r: int = 8
    apply_GS: bool = False


class HraFamily(Renamed):
    """HRA: `hra_u` [in * k, r]."""

    name = "hra"
    peft_type = "HRA"
    method = HRA
    fields: ClassVar[Mapping[str, str]] = {"hra_u": "u"}
    parts = tuple(fields)
    method_fields: ClassVar[type[MethodFields]] = HRAFields
    read: ClassVar[Mapping[str, str]] = {"apply_GS": "whether hra_u's columns are made orthogonal before they are used"}
    fresh: ClassVar[Mapping[str, Any]] = {"apply_GS": False, "bias": "none", "init_weights": True}

    @classmethod
    def check(cls, file: File, keys: Mapping[str, Key]) -> None:
        key = keys["hra_u"]
        check_rank(key, file.tensors[key], file.settings.method_fields.r, axis=1)

    @classmethod
    def attributes(cls, config: HRAFields) -> dict[str, bool]:
        return {"gram_schmidt": config.apply_GS}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        return {"r": int(some.u.shape[1]), "apply_GS": some.gram_schmidt}


class RoAdFields(MethodFields, frozen=True, kw_only=True):
    """The variant, and the number of outputs in a group."""

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: int = 64


class RoadFamily(Renamed):
    """RoAd: `road_theta` and `road_alpha`, both [out / 2], [out] or [2 * out], depending on the variant."""

    name = "road"
    peft_type = "ROAD"
    method = RoAd
    fields: ClassVar[Mapping[str, str]] = {"road_theta": "theta", "road_alpha": "alpha"}
    parts = tuple(fields)
    method_fields: ClassVar[type[MethodFields]] = RoAdFields
    read: ClassVar[Mapping[str, str]] = {
        "group_size": "number of outputs in a group",
        "variant": "road_1, road_2 or road_4: which entries of a 2 x 2 matrix have the same angle and scale; each pair "
        "of outputs has such a matrix",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True}

    @classmethod
    def attributes(cls, config: RoAdFields) -> dict[str, int]:
        return {"variant": int(config.variant[-1]), "group": config.group_size}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        return {"variant": f"road_{some.variant}", "group_size": some.group}

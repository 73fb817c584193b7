"""MiSS: each module has one tensor `miss_block`, whose shape depends on the config's `init_weights`.

The shape is [r, mini_r] for "mini", [out / r, r, r] for "bat", and [r, out] for all other values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import USE_ITS_CONFIG, ShapeMismatch
from ....io.lazy import as_lazy
from ....methods.miss import MiSS
from ....methods.miss_bat import MiSSBat
from ..file import DecodedUpdate, File, Key, make
from . import Family, MethodFields, check_rank, minority

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

PART = "miss_block"


class MiSSFields(MethodFields, frozen=True, kw_only=True):
    """The config fields that determine the shape of the block."""

    r: int = 64
    mini_r: int = 1
    init_weights: bool | str | None = True


class MissFamily(Family):
    """The family of the peft_type MISS."""

    peft_type = "MISS"
    method = MiSS
    others = (MiSSBat,)
    parts = (PART,)
    method_fields: ClassVar[type[MethodFields]] = MiSSFields
    read: ClassVar[Mapping[str, str]] = {
        "init_weights": "mini: the block is repeated over the outputs; bat: the block has a matrix for every r outputs",
        "mini_r": "number of columns of a mini block",
    }
    harmless: ClassVar[Mapping[str, str]] = {"miss_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "miss_dropout": 0.0}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        key, config = keys[PART], file.settings.method_fields
        tensor, mini = file.tensors[key], config.init_weights == "mini"
        if config.init_weights == "bat":
            if len(tensor.shape) != 3 or tensor.shape[1:] != (config.r, config.r):
                shape = list(tensor.shape)
                why = f"the shape is {shape}, but init_weights and r in the config require [n, {config.r}, {config.r}]"
                raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)
            return DecodedUpdate(key.path, make("miss_bat", {"B": tensor}), {"B": key})
        check_rank(key, tensor, config.r)
        if len(tensor.shape) != 2 or (mini and tensor.shape[1] != config.mini_r):
            why = f"the shape {list(tensor.shape)} does not fit init_weights and mini_r in the config"
            raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)
        field = "mini" if mini else "D"
        return DecodedUpdate(key.path, make("miss", {field: tensor}), {field: key})

    @classmethod
    def encode(cls, update: MiSS | MiSSBat) -> dict[str, tuple[str, Lazy]]:
        return {field: (PART, as_lazy(leaf)) for field, leaf in update.tensors.items()}

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        forms = {
            t: _form(update) for t, group in updates.items() for update in group if isinstance(update, cls.methods())
        }
        for target in minority(forms):
            yield target, "its rank or form differs from that of most miss updates, but the config has only one of each"

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        if isinstance(some, MiSSBat):
            return {"r": int(some.B.shape[2]), "mini_r": 1, "init_weights": "bat"}
        r, width = next(iter(some.tensors.values())).shape
        mini = some.mini is not None
        return {"r": int(r), "mini_r": int(width) if mini else 1, "init_weights": "mini" if mini else True}


def _form(update: Update) -> tuple[str, tuple[int, ...]]:
    """Return the form of the block (whole, mini or bat) and its sizes: (r, mini_r) for mini, (r,) for the others."""
    if isinstance(update, MiSSBat):
        return "bat", (int(update.B.shape[2]),)
    tensors = update.tensors
    if "mini" in tensors:
        return "mini", tuple(tensors["mini"].shape)
    return "whole", (int(tensors["D"].shape[0]),) if "D" in tensors else ()

"""MiSS: `miss_block` [r, out]; [r, mini_r] where `init_weights` is "mini"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch, Unsupported
from ....methods.miss import MiSS
from ....tensors.lazy import as_lazy
from ..file import File, Found, make
from ._family import Family, Own, check_rank, minority

if TYPE_CHECKING:
    from ....adapter import Target
    from ....tensors.checkpoint import Checkpoint
    from ....tensors.lazy import Lazy
    from ....updates import Update
    from ..keys import Key

PART = "miss_block"


class Fields(Own, frozen=True, kw_only=True):
    """Rank, and which form the block has."""

    r: int = 64
    mini_r: int = 1
    init_weights: bool | str | None = True


class MissFamily(Family):
    """MISS."""

    peft_type = "MISS"
    method = MiSS
    parts = (PART,)
    own: ClassVar[type[Own]] = Fields
    read: ClassVar[Mapping[str, str]] = {
        "init_weights": "mini: the block repeats over the outputs; bat: another law, refused",
        "mini_r": "width of a mini block",
    }
    harmless: ClassVar[Mapping[str, str]] = {"miss_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "miss_dropout": 0.0}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        key, own = keys[PART], file.settings.own
        tensor, mini = file.tensors[key], own.init_weights == "mini"
        if own.init_weights == "bat":
            why = "MiSS's bat form multiplies the base's blocks; not known to this version"
            raise Unsupported(why, where="init_weights", cure="Merge it with PEFT itself")
        check_rank(key, tensor, own.r)
        if len(tensor.shape) != 2 or (mini and tensor.shape[1] != own.mini_r):
            why = f"{list(tensor.shape)} is not the block that init_weights and mini_r say"
            raise ShapeMismatch(why, where=key.text, cure="The config is not of this file")
        field = "mini" if mini else "D"
        return Found(key.path, make("miss", {field: tensor}), {field: key})

    @classmethod
    def encode(cls, update: MiSS) -> dict[str, tuple[str, Lazy]]:
        return {field: (PART, as_lazy(leaf)) for field, leaf in update.tensors.items()}

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        said = {t: _form(update) for t, found in updates.items() for update in found if isinstance(update, MiSS)}
        for target in minority(said):
            yield target, "miss of another rank or form than the others: the config has one for all"

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        some = next(iter(cls.of_it(updates).values()))
        r, width = next(iter(some.tensors.values())).shape
        mini = some.mini is not None
        return {"r": int(r), "mini_r": int(width) if mini else 1, "init_weights": "mini" if mini else True}


def _form(update: MiSS) -> tuple[str, tuple[int, ...]]:
    """Which form, and the sizes that the config says of it."""
    if update.mini is not None:
        return "mini", tuple(update.mini.shape)
    return "whole", () if update.D is None else (int(update.D.shape[0]),)

"""C3A: `c3a_kernel` [out / b, in / b, b]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods.c3a import C3A
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts
from ._weights import check_size, side, size_at, size_fields

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update

PART = "c3a_kernel"


class C3AFields(Own, frozen=True, kw_only=True):
    """Size of the blocks."""

    block_size: int = 256
    block_size_pattern: dict[str, int] | None = None


class C3AFamily(Family):
    """The family of the peft_type C3A."""

    peft_type = "C3A"
    method = C3A
    parts = (PART,)
    own: ClassVar[type[Own]] = C3AFields
    read: ClassVar[Mapping[str, str]] = {
        "block_size": "rows and columns of a block",
        "block_size_pattern": "the same of the modules it matches behind a dot, or names whole",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": "xavier_uniform"}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        key, own = keys[PART], file.settings.own
        kernel = file.tensors[key]
        size = size_at(own.block_size, own.block_size_pattern, key.path)
        check_size(key, side(kernel, 2, 3), size, "block_size")
        return Found(key.path, make("c3a", {"kernel": kernel}), {"kernel": key})

    @classmethod
    def encode(cls, update: C3A) -> Parts:
        return {"kernel": (PART, as_lazy(update.kernel))}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        return size_fields({path: int(u.kernel.shape[2]) for path, u in cls.of_it(updates).items()}, "block_size")

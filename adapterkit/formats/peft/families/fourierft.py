"""FourierFT: `fourierft_spectrum` [n]; positions follow from `random_loc_seed` and the weight's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....io.lazy import as_lazy
from ....methods._coefficients import SEED
from ....methods.fourierft import FourierFT
from ..file import File, Found, Key, make
from ._family import Family, Own, Parts
from ._positions import drawn, of_one
from ._weights import check_size, layout, not_linear, side, size_at, size_fields, unlike, weight_shape

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.strict_json import JsonValue

PART = "fourierft_spectrum"


class FourierFTFields(Own, frozen=True, kw_only=True):
    """The number of coefficients, their positions, and the scaling."""

    n_frequency: int = 1000
    n_frequency_pattern: dict[str, int] | None = None
    random_loc_seed: int | None = SEED
    scaling: float = 150.0


class FourierFTFamily(Family):
    """The family of the peft_type FOURIERFT."""

    peft_type = "FOURIERFT"
    method = FourierFT
    parts = (PART,)
    folds = ("spectrum",)
    own: ClassVar[type[Own]] = FourierFTFields
    read: ClassVar[Mapping[str, str]] = {
        "n_frequency": "number of coefficients",
        "n_frequency_pattern": "the number for modules that a pattern matches after a dot, or equals",
        "random_loc_seed": "positions: the first n of torch.randperm(out * in) on the CPU; needs the base",
        "scaling": "factor on the change",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True, "random_loc_seed": SEED}

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        key, own = keys[PART], file.settings.own
        spectrum = file.tensors[key]
        count = size_at(own.n_frequency, own.n_frequency_pattern, key.path)
        check_size(key, side(spectrum, 0, 1), count, "n_frequency")
        out, in_ = weight_shape(file, key, "FourierFT's positions depend on the size of the weight")
        tensors = {"index": drawn(own.random_loc_seed, out, in_, count, key), "spectrum": spectrum}
        update = make("fourierft", tensors, scaling=own.scaling, outputs=out, inputs=in_)
        return Found(key.path, update, {"spectrum": key}, layout(file, key.path))

    @classmethod
    def encode(cls, update: FourierFT) -> Parts:
        return {"spectrum": (PART, as_lazy(update.spectrum))}

    @classmethod
    def why_not(cls, target: Target, update: FourierFT) -> str:
        return not_linear(target, update.method)

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        return unlike({path: float(update.scaling) for path, update in cls.of_it(updates).items()})

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        found = cls.of_it(updates)
        sizes = {path: int(update.spectrum.shape[0]) for path, update in found.items()}
        return size_fields(sizes, "n_frequency") | of_one(updates, cls.method)

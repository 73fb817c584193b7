"""WaveFT: `waveft_spectrum` [n]; positions follow from `random_loc_seed` and the weight's size; a wavelet by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import Unsupported
from ....io.lazy import Lazy, as_lazy
from ....methods._coefficients import SEED
from ....methods.waveft import WaveFT
from ..._format import Departure
from ..file import File, Found, Key, make
from ..patterns import exactly, first_match
from ._family import Family, Own, Parts
from ._positions import drawn, of_one
from ._wavelets import FILTERS, filter_of, name_of
from ._weights import check_size, layout, not_linear, side, size_fields, unlike, weight_shape

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update

PART = "waveft_spectrum"


class WaveFTFields(Own, frozen=True, kw_only=True):
    """The number of coefficients, their positions, their transform, and the factor on the change."""

    n_frequency: int = 2592
    n_frequency_pattern: dict[str, int] | None = None
    proportional_parameters: bool | None = False
    random_loc_seed: int | None = SEED
    scaling: float = 25.0
    use_idwt: bool | None = True
    wavelet_family: str = "db1"


class WaveFTFamily(Family):
    """The family of the peft_type WAVEFT."""

    peft_type = "WAVEFT"
    method = WaveFT
    parts = (PART,)
    folds = ("spectrum",)
    departures: ClassVar[Mapping[str, Departure]] = {
        "waveft_coif4": Departure("PEFT's numbers for coif4, which are no wavelet's", "the Coiflet's numbers")
    }
    own: ClassVar[type[Own]] = WaveFTFields
    read: ClassVar[Mapping[str, str]] = {
        "n_frequency": "how many coefficients there are",
        "n_frequency_pattern": "the same of the modules it matches",
        "proportional_parameters": "coefficients by the share of each weight; the tensors say how many",
        "random_loc_seed": "positions: the first n of torch.randperm(out * in) on the CPU; needs the base",
        "scaling": "factor on the change",
        "use_idwt": "whether the coefficients are of a wavelet transform, or elements",
        "wavelet_family": "whose filter",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_weights": True,
        "random_loc_seed": SEED,
        "use_idwt": True,
    }

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        key, own = keys[PART], file.settings.own
        spectrum = file.tensors[key]
        count = side(spectrum, 0, 1)
        said = first_match(own.n_frequency_pattern or {}, key.path, own.n_frequency)
        check_size(key, count, max(count, 0) if own.proportional_parameters else said, "n_frequency")
        out, in_ = weight_shape(file, key, "WaveFT's positions depend on the size of the weight")
        tensors = {"index": drawn(own.random_loc_seed, out, in_, count, key), "spectrum": spectrum}
        if own.use_idwt:
            tensors["low_pass"] = _filter(own.wavelet_family, _dtype(file, key.path), file.by_formula)
        update = make("waveft", tensors, scaling=own.scaling, outputs=out, inputs=in_)
        return Found(key.path, update, {"spectrum": key}, layout(file, key.path))

    @classmethod
    def encode(cls, update: WaveFT) -> Parts:
        return {"spectrum": (PART, as_lazy(update.spectrum))}

    @classmethod
    def why_not(cls, target: Target, update: Any) -> str:
        unknown = update.low_pass is not None and name_of(as_lazy(update.low_pass)) is None
        return "waveft of a wavelet that PEFT has no name for" if unknown else not_linear(target, update.method)

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        return unlike({path: float(update.scaling) for path, update in cls.of_it(updates).items()})

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, Any]:
        found = cls.of_it(updates)
        sizes = {path: int(update.spectrum.shape[0]) for path, update in found.items()}
        fields = size_fields(sizes, "n_frequency")
        fields["n_frequency_pattern"] = {exactly(path): n for path, n in fields["n_frequency_pattern"].items()}
        taps = next(iter(found.values())).low_pass
        name = None if taps is None else name_of(as_lazy(taps))
        wavelet = {"use_idwt": name is not None} | ({"wavelet_family": name} if name else {})
        return fields | of_one(updates, cls.method) | wavelet | {"proportional_parameters": False}


def _dtype(file: File, path: str) -> str:
    """Return the element type of a filter: the one of the update to write, if there is one."""
    known = file.known[path].tensors.get("low_pass") if path in file.known else None
    return "F64" if known is None else as_lazy(known).dtype.name


def _filter(name: str, dtype: str, by_formula: bool) -> Lazy:
    if name not in FILTERS:
        raise Unsupported(f"the wavelet {name}", where="wavelet_family", cure=f"Known: {', '.join(FILTERS)}")
    return filter_of(name, dtype, by_formula)

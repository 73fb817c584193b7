"""Read and write ReFT.

In a file, `units.0` changes the first positions, and `units.1` changes the last positions. If the config has
`tied_weights`, the file has only `units.0`, which changes the first and the last positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....core.adapter import Target, Updates
from ....errors import USE_ITS_CONFIG, ShapeMismatch, Unsupported
from ....io.inputs import decimal_number
from ....io.lazy import Lazy, as_array, as_lazy
from ....linalg.activations import ACTIVATIONS
from .. import REFT
from ..file import AGAIN, AdapterHubUpdate, KeptKey, make, take
from . import AdapterHubFamily, FamilyFields, Size

if TYPE_CHECKING:
    import numpy as np

    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Array
    from ....io.strict_json import JsonValue
    from ..file import AdapterHubKey, AdapterHubNaming, AdapterHubPart, Findings


KIND, LAYER = "refts", ".reft_layer"
ORIGINAL, BASE = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
FIELDS = {"learned_source.weight": "source", "learned_source.bias": "source_bias", "projection.weight": "projection"}
"""A map from a unit's slots to the fields of the method `reft`. Fields of `units.1` also have the prefix `suffix_`."""


class ReftFields(FamilyFields, frozen=True, kw_only=True):
    """The config fields that determine the meaning of the tensors."""

    prefix_positions: int
    suffix_positions: int
    r: Size
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection: bool | None = None
    non_linearity: str | None = None


class ReftFamily(AdapterHubFamily):
    """Converts files whose `architecture` is `reft`."""

    methods = frozenset({"reft"})
    fields = ReftFields
    read: ClassVar[Mapping[str, str]] = {
        "non_linearity": "the activation; null means none",
        "orthogonality": "whether Householder vectors parametrize the projection",
        "prefix_positions": "how many positions at the start of the sequence are changed",
        "r": "rank",
        "subtract_projection": "whether the input's projection is subtracted; releases up to 1.3 do not write this",
        "suffix_positions": "how many positions at the end of the sequence are changed",
        "tied_weights": "whether one unit changes both the first and the last positions",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "dropout": "training only",
        "dtype": "the dtype, which the tensors already show",
        "init_weights_seed": "initial values",
        "layers": "lists the adapted layers, which the keys already show",
        "output_reft": "selects the adapted modules, which the keys already show",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "architecture": "reft",
        "dropout": 0.05,
        "dtype": None,
        "init_weights_seed": None,
        "output_reft": True,
    }

    @classmethod
    def decode(cls, part: AdapterHubPart) -> Findings:
        _check(part)
        for path, slots in part.groups(KIND).items():
            tensors: dict[str, Lazy] = {}
            keys: list[AdapterHubKey] = []
            for unit in range(1 if part.method_fields.tied_weights else 2):
                unit_tensors, used = _unit(part, slots, unit)
                tensors |= {f"suffix_{field}" if unit else field: leaf for field, leaf in unit_tensors.items()}
                keys += used
            update = make("reft", tensors, **_attributes(part))
            yield AdapterHubUpdate(Target(path.removesuffix(LAYER)), update, tuple(keys))
            yield from (KeptKey(key) for slot, key in slots.items() if slot.endswith((ORIGINAL, BASE)))

    @classmethod
    def spell(cls, updates: Updates, naming: AdapterHubNaming) -> Iterator[tuple[str, Lazy]]:
        for target, group in updates.items():
            for update in group:
                for unit, prefix in ((0, ""), (1, "suffix_")):
                    for slot, leaf in _spelled(update, prefix):
                        yield naming.key(target.path + LAYER, KIND, f"units.{unit}.{slot}"), leaf

    @classmethod
    def compose(cls, updates: Updates, base: Checkpoint | None) -> dict[str, JsonValue]:
        some: Any = next(iter(updates.values()))[0]
        return {
            "layers": sorted({_layer(target.path) or 0 for target in updates}),
            "non_linearity": None if some.non_linearity == "linear" else some.non_linearity,
            "orthogonality": some.orthogonality,
            "prefix_positions": some.prefix_positions,
            "r": int(some.projection.shape[0]),
            "subtract_projection": some.subtract_projection,
            "suffix_positions": some.suffix_positions,
            "tied_weights": some.suffix_projection is None,
        }

    @classmethod
    def losses(cls, updates: Updates, base: Checkpoint | None) -> Iterator[tuple[Target, int, str]]:
        first = _form(next(iter(updates.values()))[0])
        for target, group in updates.items():
            for position, update in enumerate(group):
                if _form(update) != first:
                    why = "its settings or shapes differ from the first update, but one config applies to all updates"
                elif any(f"{prefix}source" in update.tensors and f"{prefix}source_bias" not in update.tensors
                         for prefix in ("", "suffix_")):  # fmt: skip
                    why = "it has no source_bias, but AdapterHub's format requires one"
                elif not update.attributes["subtract_projection"]:
                    why = "it is DiReFT (no subtract_projection), but the adapters library would read it as NoReFT"
                elif _layer(target.path) is None:
                    why = "its target's path does not end in a layer number"
                else:
                    why = "the module has a second update" if position else ""
                if why:
                    yield target, position, f"{update.method}: {why}"

    @classmethod
    def stale(cls, updates: Updates, naming: AdapterHubNaming, kept: Mapping[str, Lazy]) -> Iterator[str]:
        for target, group in updates.items():
            for update, unit in ((update, unit) for update in group for unit in (0, 1)):
                pair = [naming.key(target.path + LAYER, KIND, f"units.{unit}.{end}") for end in (ORIGINAL, BASE)]
                matrix = update.tensors.get("suffix_projection" if unit else "projection")
                if all(key in kept for key in pair):
                    same = matrix is not None and update.attributes["orthogonality"]
                    if not same or not says(kept[pair[0]], kept[pair[1]], as_lazy(matrix)):  # type: ignore[arg-type]
                        yield from pair


def _check(part: AdapterHubPart) -> None:
    word = part.method_fields.non_linearity
    if word is not None and word.lower() not in ACTIVATIONS:
        why = f"the non_linearity {word[:60]!r} is unknown"
        raise Unsupported(why, where=f"{part.at}.non_linearity", cure=f"Known: {', '.join(ACTIVATIONS)}")
    if (
        part.method_fields.subtract_projection is None
        and not part.method_fields.orthogonality
        and part.compat not in REFT
    ):
        why = "the adapter may be NoReFT or DiReFT: its config does not say whether the projection is subtracted"
        cure = (
            "State the method with --compat noreft or --compat direft (compat=), or write subtract_projection into "
            "`config`: true for NoReFT, false for DiReFT"
        )
        raise Unsupported(why, where=f"{part.at}.subtract_projection", cure=cure)


def _attributes(part: AdapterHubPart) -> dict[str, JsonValue]:
    fields = part.method_fields
    return {
        "prefix_positions": fields.prefix_positions,
        "suffix_positions": fields.suffix_positions,
        "subtract_projection": part.compat != "direft"
        if fields.subtract_projection is None
        else fields.subtract_projection,
        "non_linearity": "linear" if fields.non_linearity is None else fields.non_linearity.lower(),
        "orthogonality": fields.orthogonality,
    }


def _unit(
    part: AdapterHubPart, slots: Mapping[str, AdapterHubKey], unit: int
) -> tuple[dict[str, Lazy], list[AdapterHubKey]]:
    unit_slots = {
        slot.removeprefix(f"units.{unit}."): key for slot, key in slots.items() if slot.startswith(f"units.{unit}.")
    }
    fields = {
        slot: field for slot, field in FIELDS.items() if field != "projection" or not part.method_fields.orthogonality
    }
    tensors = take(part, unit_slots or slots, fields)
    keys = [unit_slots[slot] for slot in fields]
    if part.method_fields.orthogonality:
        halves = take(part, unit_slots, {ORIGINAL: "original", BASE: "base"})
        _check_halves(unit_slots[ORIGINAL], **halves)
        tensors["projection"] = composed(**halves)
    for field in ("source", "projection"):
        if tensors[field].shape[:1] != (part.method_fields.r,):
            why = f"{field} has shape {list(tensors[field].shape)}, but the config states rank {part.method_fields.r}"
            raise ShapeMismatch(why, where=keys[0].text, cure=USE_ITS_CONFIG)
    return tensors, keys


def _check_halves(key: AdapterHubKey, original: Lazy, base: Lazy) -> None:
    n = original.shape[-1] if original.shape else 0
    if len(original.shape) != 2 or original.shape[0] >= n or base.shape != (n, n):
        why = (
            f"original has the shape {list(original.shape)}, and base {list(base.shape)}; "
            "the shapes must be [r, n] and [n, n] with r < n"
        )
        raise ShapeMismatch(why, where=key.text, cure=AGAIN)


def _spelled(update: Update, prefix: str) -> Iterator[tuple[str, Lazy]]:
    for slot, field in FIELDS.items():
        leaf = update.tensors.get(prefix + field)
        if leaf is not None and field == "projection" and update.attributes["orthogonality"]:
            yield from zip((ORIGINAL, BASE), taken_apart(as_lazy(leaf)), strict=True)
        elif leaf is not None:
            yield slot, as_lazy(leaf)


def _form(update: Update) -> tuple[object, ...]:
    return update.attributes, {name: tuple(leaf.shape) for name, leaf in update.tensors.items()}


def _layer(path: str) -> int | None:
    return decimal_number(path.rpartition(".")[2])


# torch's orthogonal parametrization stores a matrix `[r, n]` with r < n as `original` `[r, n]` and `base` `[n, n]`.
# Row i of the matrix is column i of `base @ H_1 @ ... @ H_r`, times the sign `original[i, i]`. Each `H_i` is a
# Householder reflection. Its vector has zeros before entry i, and a 1 as entry i. The later entries are
# `original[i, i + 1:]`.
# Source: torch/nn/utils/parametrizations.py (`_Orthogonal`), LAPACK's orgqr.


NEAR = 1e-6
"""The largest difference that `says` accepts in each entry of the matrix. It allows for rounding to float32."""


def composed(original: Lazy, base: Lazy) -> Lazy:
    """Compute the matrix `[r, n]` that `original` and `base` parametrize, in the dtype of `original`."""

    def fetch() -> bytes:
        return bytes(_rows(original, base).astype(original.dtype.array).tobytes())

    return Lazy(original.shape, original.dtype, fetch)


def taken_apart(matrix: Lazy) -> tuple[Lazy, Lazy]:
    """Return `original` and `base` for a matrix `[r, n]` with orthonormal rows, as torch would create them."""
    r, n = matrix.shape

    def minus_one() -> bytes:
        import numpy as np

        return bytes((-np.eye(r, n)).astype(matrix.dtype.array).tobytes())

    def completed() -> bytes:
        import numpy as np

        columns = as_array(matrix).astype(np.float64).T
        whole, _ = np.linalg.qr(columns, mode="complete")
        whole[:, :r] = columns
        return bytes(whole.astype(matrix.dtype.array).tobytes())

    return Lazy((r, n), matrix.dtype, minus_one), Lazy((n, n), matrix.dtype, completed)


def says(original: Lazy, base: Lazy, matrix: Lazy) -> bool:
    """Whether `original` and `base` parametrize the matrix, up to rounding."""
    import numpy as np

    near = np.abs(_rows(original, base) - as_array(matrix).astype(np.float64)) <= NEAR
    return original.shape == matrix.shape and bool(near.all())


def _rows(original: Lazy, base: Lazy) -> Array:
    import numpy as np

    X = as_array(original).astype(np.float64).T
    Q = np.eye(*X.shape)
    for position in reversed(range(X.shape[1])):
        v = np.zeros(len(X))
        v[position], v[position + 1 :] = 1, X[position + 1 :, position]
        Q -= 2 / (v @ v) * np.outer(v, v @ Q)
    rows: np.ndarray[Any, Any] = (as_array(base).astype(np.float64) @ (Q * X.diagonal().astype(np.int64))).T
    return rows

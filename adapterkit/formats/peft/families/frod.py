"""FRoD: `frod_lambda_l` [in], `frod_lambda_s_values` [n], and tensors that all modules of a kind share.

The shared tensors are `frod_V.<kind>` [in, in], `frod_s_indices.<kind>` [2, n] and `frod_s_size.<kind>` [2].
`frod_s_size` contains the shape of `frod_V`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch, Unsupported
from ....io.lazy import as_lazy, from_numpy
from ....methods.frod import FRoD
from ..file import DecodedUpdate, File, Key, make
from . import Family, MethodFields, Parts, check_parts
from ._weights import not_embedded

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue

FIELDS = {"frod_lambda_l": "l", "frod_lambda_s_values": "values"}
"""A map from the endings of keys to fields of the update."""

SHARED = {"V": "frod_V", "index": "frod_s_indices", "index.size": "frod_s_size"}
"""A map from a field of the update to the prefix of its shared key. The key is `<prefix>.<kind of module>`."""


class FRoDFields(MethodFields, frozen=True, kw_only=True):
    """The fraction of a matrix's positions that PEFT trains, and whether the file contains the basis."""

    save_projection: bool = True
    sparse_rate: float = 0.01

    def places(self, size: int) -> int:
        """Return the number of off-diagonal values that PEFT trains in a matrix with `size` rows and columns."""
        count = min(int(size * size * self.sparse_rate), size * size - size)
        return max(count, 1) if self.sparse_rate > 0 and size > 1 else max(count, 0)


class FrodFamily(Family):
    """The family of the peft_type FROD."""

    peft_type = "FROD"
    method = FRoD
    parts = tuple(FIELDS)
    shared = tuple(f"{word}.*" for word in SHARED.values())
    method_fields: ClassVar[type[MethodFields]] = FRoDFields
    empty = True
    read: ClassVar[Mapping[str, str]] = {
        "save_projection": "whether the basis is in the file; must be true",
        "sparse_rate": "number of trained off-diagonal positions, as a fraction of all positions",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "frod_dropout": "training only",
        "progressbar": "affects only the running process, not the result",
        "projection_prng_key": "the seed that selected the trained positions; the file contains these positions",
        "regularization_alpha": "a setting for computing the basis; the file contains the basis",
        "runtime_offload_base_weight": "affects only the running process, not the result",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none", "fan_in_fan_out": False, "frod_dropout": 0.0, "init_weights": True, "save_projection": True,
        "sparse_rate": 0.0,
    }  # fmt: skip

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, FIELDS)
        some = keys["frod_lambda_l"]
        keys_by_field = {FIELDS[part]: key for part, key in keys.items()} | _shared(file, some)
        update = make(
            "frod", {field: file.tensors[key] for field, key in keys_by_field.items() if field != "index.size"}
        )
        dims: Any = update.dims()
        if dims["n"] != file.settings.method_fields.places(dims["in"]):
            why = f"the file has {dims['n']} off-diagonal values for {dims['in']} inputs, which contradicts sparse_rate"
            raise ShapeMismatch(why, where=some.text, cure=USE_ITS_CONFIG)
        return DecodedUpdate(
            some.path, update, keys_by_field, "in out *k" if file.settings.fan_in_fan_out else "out *in"
        )

    @classmethod
    def encode(cls, update: FRoD) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        import numpy as np

        for target, group in updates.items():
            for update in (update for update in group if isinstance(update, FRoD)):
                size = from_numpy(np.array([update.V.shape[0]] * 2, np.int64))
                leaves = {"V": as_lazy(update.V), "index": as_lazy(update.index), "index.size": size}
                shared = {field: (f"{SHARED[field]}.{kind(target.path)}", leaf) for field, leaf in leaves.items()}
                yield cls.encode(update) | shared

    @classmethod
    def why_not(cls, target: Target, update: FRoD) -> str:

        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        counts = [(int(u.values.shape[0]), int(u.V.shape[0]) ** 2) for u in cls.of_it(updates).values()]
        least, most = max(n / all_ for n, all_ in counts), min((n + 1) / all_ for n, all_ in counts)
        turned = any(target.layout == "in out *k" and target.path in cls.of_it(updates) for target in updates)
        return {"sparse_rate": (least + most) / 2 if least else 0.0, "fan_in_fan_out": turned}


def kind(path: str) -> str:
    """Return a module's kind: the last two names in its path, joined with `_`. All modules of a kind share one basis.

    If the path has only one name, or a number comes directly before the last name, the kind is the last name. A
    path that ends with `attention.output.dense` is an exception: its kind is `attention_output`, not `output_dense`.
    """
    words = path.split(".")
    if len(words) == 1 or words[-2].isdigit():
        return words[-1]
    if words[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{words[-2]}_{words[-1]}"


def _shared(file: File, some: Key) -> dict[str, Key]:
    words = {field: f"{word}.{kind(some.path)}" for field, word in SHARED.items()}
    if not file.settings.method_fields.save_projection:
        why = "the basis is not in the file: PEFT computes it from all adapted weights of the base"
        raise Unsupported(why, where="save_projection", cure="Save the adapter again with save_projection=True")
    missing = next((word for word in words.values() if word not in file.shared), None)
    if missing:
        raise Malformed(f"the file lacks a tensor that this one needs: {missing}", where=some.text, cure=SAVE_WITH_PEFT)
    shared_keys = {field: file.shared[word] for field, word in words.items()}
    size, V = file.tensors[shared_keys["index.size"]], file.tensors[shared_keys["V"]]
    if size.shape != (2,) or size.dtype.floating or size.numpy().tolist() != list(V.shape):
        raise ShapeMismatch(
            f"the tensor must contain the shape of the basis, {list(V.shape)}",
            where=shared_keys["index.size"].text,
            cure=SAVE_WITH_PEFT,
        )
    return shared_keys

"""Families whose factors are computed from values that all modules share: Uni-LoRA and VB-LoRA.

Uni-LoRA: one shared `unilora_theta_d` [d]. With `save_indices`, each module also has `unilora_indices_A`,
`unilora_scales_A`, `unilora_indices_B` and `unilora_scales_B`.

Without `save_indices`, the file omits the indices, which are positions in theta. PEFT draws the positions for all
modules at once, in the order in which the model defines its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from ....errors import (
    PASS_BASE,
    SAVE_WITH_PEFT,
    USE_ITS_CONFIG_AND_BASE,
    Malformed,
    ShapeMismatch,
    Unsupported,
    UsageError,
)
from ....io.lazy import DTYPES, Lazy, as_array, as_lazy
from ....methods.unilora import UniLoRA
from ....methods.vblora import VBLoRA
from ..file import DecodedUpdate, File, Findings, Key, make, names_module
from . import Family, MethodFields, Parts, check_parts
from ._weights import check_size, declared_by, in_order, layout, not_linear, side, weight_shape

if TYPE_CHECKING:
    import torch

    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Buffer
    from ....io.strict_json import JsonValue

THETA = "unilora_theta_d"
FIELDS = {f"unilora_{kind}_{name}": f"{kind}_{name}" for name in "AB" for kind in ("indices", "scales")}
"""A map from the endings of keys to fields of the update."""


class UniLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The sizes, the seed of the positions, and the fields that select modules."""

    r: int = 4
    theta_d_length: int = 256
    proj_seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 42
    save_indices: bool | None = False
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None


class UniLoRAFamily(Family):
    """The family of the peft_type UNILORA."""

    name = "unilora"
    peft_type = "UNILORA"
    method = UniLoRA
    parts = tuple(FIELDS)
    shared = (THETA,)
    method_fields: ClassVar[type[MethodFields]] = UniLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "proj_seed": "seed with which numpy's default_rng shuffles the positions in theta, for all modules together",
        "save_indices": "whether the file has the positions in theta; if not, they follow from proj_seed, and from the "
        "order and sizes of the base's modules",
        "theta_d_length": "number of trained values",
    }
    harmless: ClassVar[Mapping[str, str]] = {"init_theta_d_bound": "initial values", "unilora_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True, "unilora_dropout": 0.0}

    @classmethod
    def decode(cls, file: File) -> Findings:
        if THETA not in file.shared:
            raise Malformed(f"the file lacks {THETA}", where=THETA, cure=SAVE_WITH_PEFT)
        theta = file.shared[THETA]
        check_size(theta, side(file.tensors[theta], 0, 1), file.settings.method_fields.theta_d_length, "theta_d_length")
        yield from super().decode(file) if file.settings.method_fields.save_indices else _regenerated(file)

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, FIELDS)
        key = keys["unilora_indices_A"]
        check_size(key, side(file.tensors[key], 0, 2), file.settings.method_fields.r, "r")
        tensors = {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        places = {"theta": file.shared[THETA]} | {FIELDS[part]: key for part, key in keys.items()}
        update = make("unilora", {"theta": file.tensors[file.shared[THETA]], **tensors})
        return DecodedUpdate(key.path, update, places, layout(file, key.path))

    @classmethod
    def encode(cls, update: UniLoRA) -> Parts:
        leaves = {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}
        return {"theta": (THETA, as_lazy(update.theta)), **leaves}

    @classmethod
    def omitted(cls, config: Mapping[str, JsonValue], updates: Mapping[Target, tuple[Update, ...]]) -> frozenset[str]:
        return frozenset() if config.get("save_indices") else frozenset(FIELDS.values())

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        return not_linear(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        turned = any(target.layout == "in out *k" for target in updates)
        sizes = {"r": int(some.indices_A.shape[0]), "theta_d_length": int(some.theta.shape[0])}
        return {**sizes, "save_indices": True, "fan_in_fan_out": turned}


def _regenerated(file: File) -> Findings:
    """Yield the updates of all modules if the file omits indices and scales.

    The omitted tensors are computed when their values are loaded.
    """
    theta, config = file.shared[THETA], file.settings.method_fields
    shapes = {path: weight_shape(file, Key(path, path), _WHY) for path in _modules(file)}
    total = config.r * sum(out + in_ for out, in_ in shapes.values())
    if not 0 < config.r <= LARGEST or total > LARGEST:
        raise ShapeMismatch(
            f"with r = {config.r}, the factors of all modules would have {total} elements",
            where="r",
            cure=USE_ITS_CONFIG_AND_BASE,
        )
    drawn, start = _drawn(total, config.theta_d_length, config.proj_seed), 0
    for path, (out, in_) in shapes.items():
        scale = _scale_dtype(file, path)
        tensors = {"theta": file.tensors[theta]}
        for name, shape in (("A", (config.r, in_)), ("B", (out, config.r))):
            stop = start + shape[0] * shape[1]
            tensors |= {f"indices_{name}": _part(drawn, "I64", start, stop, shape)}
            tensors |= {f"scales_{name}": _part(drawn, scale, start, stop, shape)}
            start = stop
        yield DecodedUpdate(path, make("unilora", tensors), {"theta": theta}, layout(file, path))


def _modules(file: File) -> list[str]:
    """Return the paths of the adapted modules, in the order in which the model defines its modules.

    Raises:
        UsageError: no base is given.
        Unsupported: the order is unknown, or fields other than `target_modules` select modules.
    """
    if file.known:
        return list(file.known)
    settings, base = file.settings, file.base
    if base is None:
        raise UsageError(f"{_WHY}, and no base is given", where=THETA, cure=PASS_BASE)
    if settings.method_fields.exclude_modules or settings.method_fields.layers_to_transform is not None:
        why = "the file omits the positions in theta, and adapterkit cannot compute the positions if the config "
        why += "sets exclude_modules or layers_to_transform"
        raise Unsupported(why, where=THETA, cure="Save the adapter from PEFT with save_indices=True")
    weights = (name for name, tensor in base.tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2)
    paths = [name.removesuffix(".weight") for name in weights]
    named = [path for path in paths if names_module(settings.target_modules, path)]
    ordered = in_order(named, base.config, declared_by(base)) if named else None
    if ordered is None:
        why = "the file omits the positions in theta, and the order of the modules is unknown"
        cure = "Pass the base as a torch file of its state dict, which keeps the order (--base model.bin, base=), or "
        cure += "save the adapter from PEFT with save_indices=True"
        raise Unsupported(why, where=THETA, cure=cure)
    return ordered


def _scale_dtype(file: File, path: str) -> str:
    """Return the dtype of PEFT's scales: the dtype of the base's weight, or F32 if the weight has no float dtype."""
    if path in file.known:
        return as_lazy(file.known[path].tensors["scales_A"]).dtype.name
    assert file.base is not None
    weight = file.base.tensors.get(f"{path}.weight")
    return weight.dtype.name if weight is not None and weight.dtype.floating else "F32"


@lru_cache(maxsize=4)
def _drawn(total: int, length: int, seed: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that draws a random position in theta for each element of all factors.

    The function returns (positions `[total]`, counts `[length]`). `counts[i]` is the number of elements whose position
    is i.
    """

    @cache
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        import numpy as np
        import torch

        generator = np.random.default_rng(seed)
        some = np.repeat(np.arange(length), total // length)
        rest = generator.choice(length, size=total % length, replace=False) if total % length else some[:0]
        positions = np.concatenate([some, rest])
        generator.shuffle(positions)
        drawn = torch.from_numpy(positions)
        return drawn, torch.bincount(drawn, minlength=length)

    return draw


def _part(
    drawn: Callable[[], tuple[torch.Tensor, torch.Tensor]], dtype: str, start: int, stop: int, shape: tuple[int, int]
) -> Lazy:
    kind = DTYPES[dtype]

    def fetch() -> Buffer:
        import torch

        positions, counts = drawn()
        part = positions[start:stop]
        values = counts[part].float().rsqrt().to(getattr(torch, kind.torch)) if kind.floating else part
        return as_lazy(values.reshape(shape)).fetch()

    return Lazy(shape, kind, fetch)


LARGEST = 1 << 33
"""The largest allowed number of elements of all factors together. The limit protects against hostile files."""
_WHY = "Uni-LoRA's positions depend on the order and sizes of the base's weights"


# VB-LoRA: `vblora_logits_A` [r, in / b, n], `vblora_logits_B` [out / b, r, n], and one `vblora_vector_bank` [n, b].
#
# With `save_only_topk_weights`, the file has no logits. Each factor has keys that end with `_topk_indices` and
# `_topk_weights` instead. The last weight of each mixture is omitted, because the weights of a mixture sum to 1.


BANK = "vblora_vector_bank"
LOGITS = {"vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B"}
CHOSEN = {
    "vblora_logits_A_topk_indices": "indices_A",
    "vblora_logits_A_topk_weights": "weights_A",
    "vblora_logits_B_topk_indices": "indices_B",
    "vblora_logits_B_topk_weights": "weights_B",
}
"""Maps from the endings of keys to fields of the update, for files with logits and for files without logits."""


class VBLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The sizes of the vector bank, the number of vectors in each mixture, and whether the file has logits."""

    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool | None = False


class VBLoRAFamily(Family):
    """The family of the peft_type VBLORA."""

    name = "vblora"
    peft_type = "VBLORA"
    method = VBLoRA
    parts = (*LOGITS, *CHOSEN)
    shared = (BANK,)
    method_fields: ClassVar[type[MethodFields]] = VBLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "num_vectors": "number of vectors in the bank",
        "save_only_topk_weights": "whether the file has indices and weights instead of logits",
        "topk": "number of vectors in each mixture",
        "vector_length": "number of elements of each vector",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "init_logits_std": "initial values",
        "init_vector_bank_bound": "initial values",
        "vblora_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "vblora_dropout": 0.0}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config, fields = (
            file.settings.method_fields,
            CHOSEN if file.settings.method_fields.save_only_topk_weights else LOGITS,
        )
        check_parts(keys, fields)
        if BANK not in file.shared:
            some = next(iter(keys.values()))
            raise Malformed(f"the file lacks {BANK}", where=some.text, cure=SAVE_WITH_PEFT)
        bank = file.shared[BANK]
        _check_sizes(file, keys, bank)
        tensors = {fields[part]: _whole(part, file.tensors[key]) for part, key in keys.items()}
        update = make("vblora", {"bank": file.tensors[bank], **tensors}, topk=config.topk)
        path = next(iter(keys.values())).path
        places = {"bank": bank, **{fields[part]: key for part, key in keys.items()}}
        return DecodedUpdate(path, update, places, layout(file, path))

    @classmethod
    def encode(cls, update: VBLoRA) -> Parts:
        fields = LOGITS if update.logits_A is not None else CHOSEN
        tensors = {f: (part, _stored(part, as_lazy(update.tensors[f]))) for part, f in fields.items()}
        return {**tensors, "bank": (BANK, as_lazy(update.bank))}

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        weights = [leaf for field, leaf in update.tensors.items() if field.startswith("weights")]
        if not all(_sums_to_one(as_lazy(leaf)) for leaf in weights):
            return "the weights of this vblora do not sum to 1"
        return not_linear(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        chosen = some.indices_A is not None
        return {
            "r": int((some.indices_A if chosen else some.logits_A).shape[0]),
            "num_vectors": int(some.bank.shape[0]),
            "vector_length": int(some.bank.shape[1]),
            "topk": int(some.indices_A.shape[2]) if chosen else int(some.topk),
            "save_only_topk_weights": chosen,
            "fan_in_fan_out": any(target.layout == "in out *k" for target in updates),
        }


def _check_sizes(file: File, keys: Mapping[str, Key], bank: Key) -> None:
    config = file.settings.method_fields
    check_size(bank, side(file.tensors[bank], 0, 2), config.num_vectors, "num_vectors")
    check_size(bank, side(file.tensors[bank], 1, 2), config.vector_length, "vector_length")
    for part, key in keys.items():
        tensor = file.tensors[key]
        check_size(key, side(tensor, 0 if "_A" in part else 1, 3), file.settings.r, "r")
        if part in CHOSEN:
            check_size(key, side(tensor, 2, 3), config.topk - part.endswith("weights"), "topk")


def _whole(part: str, tensor: Lazy) -> Lazy:
    """Append the last weight of each mixture, which is 1 minus the sum of the other weights.

    If `part` does not end with `weights`, return `tensor` unchanged.
    """
    if not part.endswith("weights"):
        return tensor

    def fetch() -> bytes:
        import numpy as np

        values = as_array(tensor)
        last = (1 - values.sum(-1, keepdims=True)).astype(values.dtype)
        return np.concatenate([values, last], -1).tobytes()

    return Lazy((*tensor.shape[:-1], tensor.shape[-1] + 1), tensor.dtype, fetch)


def _stored(part: str, tensor: Lazy) -> Lazy:
    if not part.endswith("weights"):
        return tensor
    return tensor.map(lambda values: values[..., :-1], (*tensor.shape[:-1], tensor.shape[-1] - 1))


def _sums_to_one(weights: Lazy) -> bool:
    return weights.shape[-1] > 0 and bytes(_whole("weights", _stored("weights", weights)).fetch()) == bytes(
        weights.fetch()
    )

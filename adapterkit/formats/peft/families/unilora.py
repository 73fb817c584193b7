"""Uni-LoRA: one `unilora_theta_d` [d]; with `save_indices`, also `unilora_indices_A`, `unilora_scales_A` etc.

Without `save_indices`, the positions are drawn for all modules together, in the order in which the model declares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from ....errors import Malformed, ShapeMismatch, Unsupported, UsageError
from ....io.lazy import DTYPES, Lazy, as_lazy
from ....methods.unilora import UniLoRA
from ....naming.orders import declared_by, in_order
from ..file import File, Findings, Found, Key, make
from ..settings import names_module
from ._family import Family, Own, Parts, check_parts
from ._weights import check_size, layout, not_linear, side, weight_shape

if TYPE_CHECKING:
    import torch

    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.lazy import Buffer
    from ....io.strict_json import JsonValue

THETA = "unilora_theta_d"
FIELDS = {f"unilora_{kind}_{name}": f"{kind}_{name}" for name in "AB" for kind in ("indices", "scales")}
"""A map from a word in the keys to the update's field."""


class UniLoRAFields(Own, frozen=True, kw_only=True):
    """The sizes, the seed of the positions, and the fields that select modules."""

    r: int = 4
    theta_d_length: int = 256
    proj_seed: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 42
    save_indices: bool | None = False
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None


class UniLoRAFamily(Family):
    """The family of the peft_type UNILORA."""

    peft_type = "UNILORA"
    method = UniLoRA
    parts = tuple(FIELDS)
    shared = (THETA,)
    own: ClassVar[type[Own]] = UniLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "proj_seed": "seed with which numpy's default_rng shuffles the positions of all modules together",
        "save_indices": "whether the file has the positions; if not, the base's model_type or torch file decides",
        "theta_d_length": "number of trained values",
    }
    harmless: ClassVar[Mapping[str, str]] = {"init_theta_d_bound": "initial values", "unilora_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"bias": "none", "init_weights": True, "unilora_dropout": 0.0}

    @classmethod
    def decode(cls, file: File) -> Findings:
        if THETA not in file.shared:
            raise Malformed(f"the file lacks {THETA}", where=THETA, cure="Save the adapter again with PEFT")
        theta = file.shared[THETA]
        check_size(theta, side(file.tensors[theta], 0, 1), file.settings.own.theta_d_length, "theta_d_length")
        yield from super().decode(file) if file.settings.own.save_indices else _regenerated(file)

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        check_parts(keys, FIELDS)
        key = keys["unilora_indices_A"]
        check_size(key, side(file.tensors[key], 0, 2), file.settings.own.r, "r")
        tensors = {FIELDS[part]: file.tensors[key] for part, key in keys.items()}
        places = {"theta": file.shared[THETA]} | {FIELDS[part]: key for part, key in keys.items()}
        update = make("unilora", {"theta": file.tensors[file.shared[THETA]], **tensors})
        return Found(key.path, update, places, layout(file, key.path))

    @classmethod
    def encode(cls, update: UniLoRA) -> Parts:
        own = {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}
        return {"theta": (THETA, as_lazy(update.theta)), **own}

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
    """Yield the updates of all modules, with positions and scales that are computed when they are read."""
    theta, own = file.shared[THETA], file.settings.own
    shapes = {path: weight_shape(file, Key(path, path), _WHY) for path in _modules(file)}
    total = own.r * sum(out + in_ for out, in_ in shapes.values())
    if not 0 < own.r <= LARGEST or total > LARGEST:
        raise ShapeMismatch(
            f"the factors would have {total} elements", where="r", cure="The config does not belong to this base"
        )
    drawn, start = _drawn(total, own.theta_d_length, own.proj_seed), 0
    for path, (out, in_) in shapes.items():
        scale = _scale_dtype(file, path)
        tensors = {"theta": file.tensors[theta]}
        for name, shape in (("A", (own.r, in_)), ("B", (out, own.r))):
            stop = start + shape[0] * shape[1]
            tensors |= {f"indices_{name}": _part(drawn, "I64", start, stop, shape)}
            tensors |= {f"scales_{name}": _part(drawn, scale, start, stop, shape)}
            start = stop
        yield Found(path, make("unilora", tensors), {"theta": theta}, layout(file, path))


def _modules(file: File) -> list[str]:
    """Return the paths of the adapted modules, in the order in which the model declares them.

    Raises:
        UsageError: no base is given.
        Unsupported: the order is unknown, or other fields than `target_modules` select modules.
    """
    if file.known:
        return list(file.known)
    settings, base = file.settings, file.base
    if base is None:
        raise UsageError(f"{_WHY}, and no base is given", where=THETA, cure="Give the base with --base (base=)")
    if settings.own.exclude_modules or settings.own.layers_to_transform is not None:
        why = "other fields than target_modules select the adapted modules"
        raise Unsupported(why, where=THETA, cure="Save the adapter from PEFT with save_indices=True")
    weights = (name for name, tensor in base.tensors.items() if name.endswith(".weight") and len(tensor.shape) == 2)
    paths = [name.removesuffix(".weight") for name in weights]
    named = [path for path in paths if names_module(settings.target_modules, path)]
    ordered = in_order(named, base.config, declared_by(base)) if named else None
    if ordered is None:
        why = "the file omits the positions, and the order of the modules is unknown"
        cure = "Give the base as a torch file of its state dict, which keeps the order (--base model.bin, base=), or "
        cure += "save the adapter from PEFT with save_indices=True"
        raise Unsupported(why, where=THETA, cure=cure)
    return ordered


def _scale_dtype(file: File, path: str) -> str:
    """Return the dtype of the base's weight, in which PEFT keeps the scales."""
    if path in file.known:
        return as_lazy(file.known[path].tensors["scales_A"]).dtype.name
    assert file.base is not None
    held = file.base.tensors.get(f"{path}.weight")
    return held.dtype.name if held is not None and held.dtype.floating else "F32"


@lru_cache(maxsize=4)
def _drawn(total: int, length: int, seed: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Return a function that returns every element's position in theta, and the number of uses of each position."""

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
"""The limit on the elements of all factors together, against hostile files."""
_WHY = "Uni-LoRA's positions depend on the order and sizes of the base's weights"

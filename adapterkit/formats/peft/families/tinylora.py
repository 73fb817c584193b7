"""TinyLoRA: `tinylora_A`, `tinylora_B`, `tinylora_P` per module, and `tinylora_v.<group>` per group of modules.

A group consists of consecutive modules, in the order in which the model defines its modules. The keys do not show a
module's index in this order, but P shows it, because PEFT draws P from the seed `projection_seed` + index.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import msgspec

from ....errors import PASS_BASE, SAVE_WITH_PEFT, Malformed, ShapeMismatch, Unsupported, UsageError
from ....io.lazy import DTYPES, Lazy, as_lazy
from ....methods.tinylora import TinyLoRA
from ..file import DecodedUpdate, File, Findings, Key, make
from . import Family, MethodFields, Parts, check_parts
from ._weights import check_size, declared_by, in_order, layout, side

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Buffer
    from ....io.strict_json import JsonValue

FIELDS = {"tinylora_A": "A", "tinylora_B": "B", "tinylora_P": "P"}
"""A map from the endings of keys to fields of the update."""
SEED = 42


class TinyLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The sizes `r` and `u`, the fraction that determines the number of groups, and the seed of P."""

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: Annotated[int, msgspec.Meta(ge=-(1 << 62), le=1 << 62)] = SEED
    save_projection: bool | None = True


class TinyLoRAFamily(Family):
    """The family of the peft_type TINYLORA."""

    peft_type = "TINYLORA"
    method = TinyLoRA
    parts = tuple(FIELDS)
    shared = ("tinylora_v.*",)
    method_fields: ClassVar[type[MethodFields]] = TinyLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "projection_seed": "P of module i is drawn with the seed projection_seed + i, by torch's generator on the CPU",
        "save_projection": "whether the file has P; if not, P is drawn, and the base shows the order of the modules",
        "u": "number of elements of each v",
        "weight_tying": "the number of groups is round(modules * (1 - weight_tying)), at least 1",
    }
    harmless: ClassVar[Mapping[str, str]] = {"init_v_bound": "initial values", "tinylora_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_weights": True,
        "projection_seed": SEED,
        "save_projection": True,
        "tinylora_dropout": 0.0,
        "weight_tying": 0.0,
    }

    @classmethod
    def decode(cls, file: File) -> Findings:
        decoded = [each for each in super().decode(file) if isinstance(each, DecodedUpdate)]
        numbers = _numbers({each.path: cast(TinyLoRA, each.update) for each in decoded}, file)
        for each in decoded:
            number = None if numbers is None else numbers[each.path]
            yield _completed(file, each, number, len(decoded))

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        check_parts(keys, FIELDS if config.save_projection else [part for part in FIELDS if part != "tinylora_P"])
        A, B = (file.tensors[keys[part]] for part in ("tinylora_A", "tinylora_B"))
        key, most = keys["tinylora_A"], min(config.r, side(A, 1, 2), side(B, 0, 2))
        check_size(key, side(A, 0, 2), max(most, 0), "r")
        # v depends on all modules, and so does P if the file omits P. Leave them None here; `_completed` sets them.
        tensors: dict[str, Any] = {"P": None, "v": None} | {FIELDS[part]: file.tensors[k] for part, k in keys.items()}
        update = make("tinylora", tensors)
        return DecodedUpdate(
            key.path, update, {FIELDS[part]: key for part, key in keys.items()}, layout(file, key.path)
        )

    @classmethod
    def encode(cls, update: TinyLoRA) -> Parts:
        return {field: (part, as_lazy(update.tensors[field])) for part, field in FIELDS.items()}

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        members: dict[str, Any] = cls.of_it(updates)
        by_P = _by_projection({path: as_lazy(update.P) for path, update in members.items()}, SEED)
        ordered = sorted(members, key=by_P.__getitem__) if by_P else in_order(members, base.config if base else None)
        groups: dict[int, int] = {}
        for path in ordered or members:
            groups.setdefault(id(members[path].v), len(groups))
        for group_updates in updates.values():
            for update in group_updates:
                if isinstance(update, TinyLoRA):
                    group = groups.get(id(update.v), 0)
                    yield {**cls.encode(update), "v": (f"tinylora_v.{group}", as_lazy(update.v))}

    @classmethod
    def omitted(cls, config: Mapping[str, JsonValue], updates: Mapping[Target, tuple[Update, ...]]) -> frozenset[str]:
        return frozenset() if config.get("save_projection", True) else frozenset({"P"})

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        return (
            ""
            if target.layout in ("out *in", "in out *k")
            else f"PEFT does not support {update.method} on stacked experts"
        )

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        groups = len({id(update.v) for update in members.values()})
        return {
            "r": max(int(update.A.shape[0]) for update in members.values()),
            "u": int(next(iter(members.values())).v.shape[0]),
            "weight_tying": 1 - groups / len(members),
            "save_projection": True,
            "fan_in_fan_out": any(target.layout == "in out *k" for target in updates),
        }


def _numbers(updates: Mapping[str, TinyLoRA], file: File) -> dict[str, int] | None:
    """Return a map from module paths to indices; None if the indices are unknown.

    The indices count the adapted modules in the order in which the model defines its modules.
    """
    known: Mapping[str, Any] = file.known or updates
    projections = {path: as_lazy(known[path].P) for path in updates if path in known and known[path].P is not None}
    projections = {path: P for path, P in projections.items() if len(P.shape) == 3 and P.shape[2]}
    by_P = (
        _by_projection(projections, file.settings.method_fields.projection_seed)
        if len(projections) == len(updates)
        else None
    )
    if by_P is not None:
        return by_P
    ordered = in_order(updates, None if file.base is None else file.base.config, declared_by(file.base))
    return None if ordered is None else {path: number for number, path in enumerate(ordered)}


def _by_projection(projections: Mapping[str, Lazy], seed: int) -> dict[str, int] | None:
    """Return a map from module paths to indices, found by drawing P for each possible index.

    Return None if a module's P is not among the drawn P, or if two modules have the same index.
    """
    drawn: dict[tuple[Any, ...], dict[bytes, int]] = {}
    for tensor in projections.values():
        kind = tensor.shape, tensor.dtype.name
        if kind not in drawn:
            drawn[kind] = {bytes(_drawn(seed + i, *kind).fetch()): i for i in range(len(projections))}
    numbers = {path: drawn[P.shape, P.dtype.name].get(bytes(P.fetch())) for path, P in projections.items()}
    known = {path: number for path, number in numbers.items() if number is not None}
    return known if len(set(known.values())) == len(projections) else None


def _drawn(seed: int, shape: tuple[int, ...], dtype: str) -> Lazy:
    """Return P `[u, r, r]`. When the values of P are loaded, they are drawn in the same way as in PEFT."""
    kind = DTYPES[dtype]

    def fetch() -> Buffer:
        import torch

        generator = torch.Generator().manual_seed(seed)
        P = torch.normal(mean=0.0, std=1.0 / shape[-1] ** 0.5, size=shape, generator=generator)
        return as_lazy(P.to(getattr(torch, kind.torch))).fetch()

    return Lazy(shape, kind, fetch)


def _completed(file: File, decoded: DecodedUpdate, number: int | None, count: int) -> DecodedUpdate:
    """Return a module's update with the v of the module's group. If the file omits P, draw P and add it, too.

    `number` is the module's index in the model, and `count` is the number of adapted modules.

    Raises:
        UsageError: the module's index depends on the base, and no base is given.
        Unsupported: even the base does not show the module's index.
        Malformed: the v of the module's group is missing.
    """
    config, update = file.settings.method_fields, decoded.update
    groups = max(1, round(count * (1 - config.weight_tying)))
    if number is None and (groups > 1 or update.tensors.get("P") is None):
        why = "v or P depends on the module's index in the model, and the file does not show this index"
        if file.base is None:
            raise UsageError(why, where=decoded.path, cure=PASS_BASE)
        cure = "Save the adapter from PEFT with save_projection=True, or add model_type to the base's config"
        raise Unsupported(f"{why}; the base does not show it, either", where=decoded.path, cure=cure)
    group = min((number or 0) // max(1, count // groups), groups - 1)
    key = file.shared.get(f"tinylora_v.{group}")
    if key is None:
        raise Malformed(f"the file lacks tinylora_v.{group}", where=decoded.path, cure=SAVE_WITH_PEFT)
    v = file.tensors[key]
    check_size(key, side(v, 0, 1), config.u, "u")
    changes: dict[str, Any] = {"v": v}
    if update.tensors.get("P") is None:
        rank = update.tensors["A"].shape[0]
        if config.u * rank * rank > LARGEST:
            raise ShapeMismatch(
                f"P would have the shape [{config.u}, {rank}, {rank}], which is too large",
                where=key.text,
                cure="Correct u in the config",
            )
        changes["P"] = _drawn(config.projection_seed + (number or 0), (config.u, rank, rank), "F32")
    return DecodedUpdate(decoded.path, update.replace(**changes), {**decoded.keys, "v": key}, decoded.layout)


LARGEST = 1 << 33
"""The largest allowed number of elements of P. The limit protects against hostile files."""

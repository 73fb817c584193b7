"""Families with random projections that all modules share: VeRA, PVeRA and RandLoRA.

In VeRA and PVeRA, each module has two vectors. The projections are in the file, or are drawn from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import msgspec

from ....errors import (
    PASS_BASE,
    SAVE_WITH_PEFT,
    USE_ITS_BASE,
    USE_ITS_CONFIG,
    Malformed,
    ShapeMismatch,
    Unsupported,
    UsageError,
)
from ....io.lazy import DTYPES, Lazy, as_lazy
from ....methods.pvera import PVeRA
from ....methods.randlora import RandLoRA
from ....methods.vera import VeRA
from ..file import DecodedUpdate, File, Findings, Key, make
from ..patterns import exact_alpha
from . import Family, MethodFields, Rank, check_parts, check_rank, check_stem, minority, stored_inputs
from ._weights import not_embedded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue
    from ..file import File, Findings
    from . import MethodFields


Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class ProjectionFields(MethodFields, frozen=True, kw_only=True):
    """The rank, the seed, and whether the projections are in the file."""

    r: Rank = 256
    projection_prng_key: Seed = 0
    save_projection: bool = True


class Projections(Family):
    """The code that VeRA and PVeRA share.

    The keys of the vectors b and d end with the strings in `parts`. The keys of the projections A and B are in
    `shared`. A has `halves * r` rows.
    """

    halves: ClassVar[int] = 1
    method_fields: ClassVar[type[MethodFields]] = ProjectionFields
    read: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "seed from which the projections are drawn if they are not in the file",
        "save_projection": "whether the projections are in the file",
    }

    @classmethod
    def decode(cls, file: File) -> Findings:
        modules = {}
        for stem, keys in file.modules(cls.parts).items():
            check_stem(stem, next(iter(keys.values())))
            check_parts(keys, cls.parts)
            modules[next(iter(keys.values())).path] = keys
        A, B = cls._given(file) if file.settings.method_fields.save_projection else cls._drawn(file, modules)
        places = {name: file.shared[word] for name, word in zip("AB", cls.shared, strict=True) if word in file.shared}
        for path, keys in modules.items():
            keys_by_name = {"b": keys[cls.parts[0]], "d": keys[cls.parts[1]]}
            _check(file, keys_by_name, B, cls.halves)
            leaves = {name: file.tensors[key] for name, key in keys_by_name.items()}
            update = make(cls.method.__module__.rpartition(".")[2], {**leaves, "A": A, "B": B})
            layout = "in out *k" if file.settings.fan_in_fan_out else "out *in"
            yield DecodedUpdate(path, update, keys_by_name | places, layout)

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        raise AssertionError("decode reads all modules together")

    @classmethod
    def encode(cls, update: Update) -> dict[str, tuple[str, Lazy]]:
        words = dict(zip("bdAB", (*cls.parts, *cls.shared), strict=True))
        return {field: (word, as_lazy(update.tensors[field])) for field, word in words.items()}

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        return {"r": int(some.B.shape[1]), "save_projection": True, "fan_in_fan_out": cls.turned(updates)}

    @classmethod
    def omitted(cls, config: Mapping[str, object], updates: Mapping[Target, tuple[Update, ...]]) -> frozenset[str]:
        """Return the fields A and B if `save_projection` is false and the config's seed yields the values of A and B.

        Otherwise, return no fields.
        """
        if config.get("save_projection", True):
            return frozenset()
        try:
            seed = msgspec.convert(dict(config), ProjectionFields).projection_prng_key
        except msgspec.ValidationError:
            return frozenset()  # The reader reports an invalid config.
        some = next(iter(cls.of_it(updates).values()))
        leaves = tuple(as_lazy(leaf) for leaf in (some.A, some.B))
        drawn = _draw(seed, (leaves[0].shape, leaves[1].shape))
        same = all(
            one.dtype == other.dtype and one.fetch() == other.fetch() for one, other in zip(leaves, drawn, strict=True)
        )
        return frozenset("AB") if same else frozenset()

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        """Yield (target, reason) for updates whose projections do not have the size that PEFT chooses for the file.

        PEFT creates one pair of projections, sized for the largest module, and cannot load projections of another size.
        """
        members: dict[Target, Any] = {t: u for t, group in updates.items() for u in group if type(u) is cls.method}
        odd = minority({target: (update.A.shape, update.B.shape) for target, update in members.items()})
        yield from ((target, "the sizes of its projections differ from those of most updates") for target in odd)
        kept = {target: update for target, update in members.items() if target not in odd}
        for (_, ins), (outs, _) in {(tuple(update.A.shape), tuple(update.B.shape)) for update in kept.values()}:
            widths = [stored_inputs(base, target) for target in kept]
            other = outs != max(update.b.shape[0] for update in kept.values())
            if other or (None not in widths and ins != max(width for width in widths if width is not None)):
                why = "its projections do not have the size that PEFT chooses for the largest of the adapted weights"
                yield from ((target, why) for target in kept)

    @classmethod
    def _given(cls, file: File) -> tuple[Lazy, Lazy]:
        missing = next((word for word in cls.shared if word not in file.shared), None)
        if missing is not None:
            why = f"the config states that the file has the projections, but the file lacks {missing}"
            raise Malformed(why, where="save_projection", cure=SAVE_WITH_PEFT)
        A, B = (file.tensors[file.shared[word]] for word in cls.shared)
        return A, B

    @classmethod
    def _drawn(cls, file: File, modules: Mapping[str, Mapping[str, Key]]) -> tuple[Lazy, Lazy]:
        if file.omitted:
            A, B = (file.omitted[word] for word in cls.shared)
            return A, B
        if file.shared:
            why = "the config has save_projection = false, but the file contains the projections"
            cure = "Set save_projection to true in the config to use the projections in the file"
            raise Malformed(why, where=next(iter(file.shared.values())).text, cure=cure)
        outs = {path: _outputs(file, keys[cls.parts[0]]) for path, keys in modules.items()}
        ins = max((_inputs(file, path, out) for path, out in outs.items()), default=1)
        r = file.settings.method_fields.r
        shapes = ((cls.halves * r, ins), (max(outs.values(), default=1), r))
        return _draw(file.settings.method_fields.projection_prng_key, shapes)


def _check(file: File, keys: Mapping[str, Key], B: Lazy, halves: int) -> None:
    d, r, out = file.tensors[keys["d"]], file.settings.method_fields.r, _outputs(file, keys["b"])
    if d.shape != (halves * r,):
        why = f"the shape is {list(d.shape)}, but with r = {r} in the config it must be [{halves * r}]"
        raise ShapeMismatch(why, where=keys["d"].text, cure=USE_ITS_CONFIG)
    if len(B.shape) != 2 or B.shape[0] < out:
        why = f"the module has {out} outputs, but the shared projection B has the shape {list(B.shape)}"
        raise ShapeMismatch(why, where=keys["b"].text, cure=SAVE_WITH_PEFT)


def _outputs(file: File, key: Key) -> int:
    shape = file.tensors[key].shape
    if len(shape) != 1:
        raise ShapeMismatch(
            f"the tensor must have one axis, but its shape is {list(shape)}",
            where=key.text,
            cure=SAVE_WITH_PEFT,
        )
    return shape[0]


def _inputs(file: File, path: str, out: int) -> int:
    """Return the number of inputs of a module's weight in the base."""
    shape = file.base_shape(f"{path}.weight")
    if shape is None:
        why = "the projections are not in the file, and only the base shows their sizes"
        raise UsageError(why, where=path, cure=PASS_BASE)
    if len(shape) != 2 or out not in shape:
        raise ShapeMismatch(
            f"the module has {out} outputs, but the base's weight has shape {list(shape)}",
            where=path,
            cure=USE_ITS_BASE,
        )
    turned = shape[1] == out and (file.settings.fan_in_fan_out or shape[0] != out)
    return shape[0] if turned else shape[1]


def _draw(seed: int, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Lazy, Lazy]:
    """Return A and B as lazy tensors.

    The values are drawn when a tensor is loaded. torch's CPU generator, seeded with `seed`, draws first A and then B,
    both from uniform distributions.
    """

    def fetch(position: int) -> bytes:
        import torch

        generator = torch.Generator(device="cpu").manual_seed(seed)
        drawn: list[torch.Tensor] = []
        for shape in shapes[: position + 1]:
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
            drawn = [torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)]
        return drawn[0].numpy().tobytes()

    return Lazy(shapes[0], DTYPES["F32"], partial(fetch, 0)), Lazy(shapes[1], DTYPES["F32"], partial(fetch, 1))


class VeraFamily(Projections):
    """VeRA: `vera_lambda_b` [out] and `vera_lambda_d` [r] per module.

    All modules share `vera_A` [r, inputs] and `vera_B` [outputs, r].
    """

    name = "vera"
    peft_type = "VERA"
    method = VeRA
    parts = ("vera_lambda_b", "vera_lambda_d")
    shared = ("vera_A", "vera_B")
    harmless: ClassVar[Mapping[str, str]] = {"d_initial": "initial values", "vera_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "d_initial": 0.1,
        "init_weights": True,
        "projection_prng_key": 0,
        "vera_dropout": 0.0,
    }


class Drawing(ProjectionFields, frozen=True, kw_only=True):
    """The fields of VeRA, and whether PEFT also draws random values at inference."""

    sample_at_inference: bool = False


class PveraFamily(Projections):
    """PVeRA: like VeRA, but `pvera_lambda_d` has the shape [2r] and `pvera_A` the shape [2r, inputs].

    In both tensors, the first r entries along the first axis are for the mean, and the last r for the variance.
    """

    name = "pvera"
    peft_type = "PVERA"
    method = PVeRA
    parts = ("pvera_lambda_b", "pvera_lambda_d")
    shared = ("pvera_A", "pvera_B")
    halves = 2
    method_fields: ClassVar[type[MethodFields]] = Drawing
    read: ClassVar[Mapping[str, str]] = {
        **Projections.read,
        "sample_at_inference": "must be false; otherwise each forward pass uses a different random change",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "d_initial": "initial values",
        "generator_seed": "training only",
        "pvera_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "d_initial": 0.1,
        "init_weights": True,
        "projection_prng_key": 0,
        "pvera_dropout": 0.0,
    }

    @classmethod
    def decode(cls, file: File) -> Findings:
        if file.settings.method_fields.sample_at_inference:
            why = "PVeRA has no fixed formula if PEFT draws random values in each forward pass"
            raise Unsupported(why, where="sample_at_inference", cure="Set sample_at_inference to false to use the mean")
        yield from super().decode(file)


# RandLoRA: `randlora_lambda` [r, n] and `randlora_gamma` [n, short] per module. `short` is the weight's shorter side.
# All modules share the bases `randlora_A` and `randlora_B`. The file also has a copy of both bases for each module.


SEPARATE = {"randlora_lambda": "lam", "randlora_gamma": "gamma"}
SHARED = {"randlora_A": "A", "randlora_B": "B"}
"""Maps from the endings of keys to fields of the update.

SEPARATE is for the tensors of one module, and SHARED for the tensors that all modules share.
"""


class RandLoRAFields(MethodFields, frozen=True, kw_only=True):
    """The rank, the scaling, and whether the bases are in the file."""

    r: Rank = 32
    randlora_alpha: float = 640
    save_projection: bool = True


class RandloraFamily(Family):
    """The family of the peft_type RANDLORA."""

    name = "randlora"
    peft_type = "RANDLORA"
    method = RandLoRA
    parts = (*SEPARATE, *SHARED)
    shared = tuple(SHARED)
    method_fields: ClassVar[type[MethodFields]] = RandLoRAFields
    read: ClassVar[Mapping[str, str]] = {
        "randlora_alpha": "scaling = randlora_alpha / r",
        "save_projection": "whether the bases are in the file; must be true",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "projection_prng_key": "the seed from which the bases were drawn; the file contains the bases",
        "randlora_dropout": "training only",
        "sparse": "how the bases were drawn; the file contains the bases",
        "very_sparse": "how the bases were drawn; the file contains the bases",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none",
        "init_weights": True,
        "projection_prng_key": 0,
        "randlora_dropout": 0.0,
    }
    folds = ("lam",)

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        if not config.save_projection:
            why = "the file omits RandLoRA's bases, and the precision in which PEFT draws them depends on the machine"
            raise Unsupported(why, where="save_projection", cure="Save the adapter from PEFT with save_projection=True")
        missing = next((word for word in SHARED if word not in file.shared), None)
        if missing is not None:
            raise Malformed(f"the file lacks the shared basis {missing}", where="save_projection", cure=SAVE_WITH_PEFT)
        copies = {part: key for part, key in keys.items() if part in SHARED}
        check_parts({part: key for part, key in keys.items() if part not in copies}, SEPARATE)
        for part, key in copies.items():
            _check_copy(file, key, file.shared[part])
        check_rank(keys["randlora_lambda"], file.tensors[keys["randlora_lambda"]], config.r)
        places = {field: keys[part] for part, field in SEPARATE.items()}
        places |= {field: file.shared[part] for part, field in SHARED.items()}
        update = make(
            "randlora", {n: file.tensors[key] for n, key in places.items()}, scaling=config.randlora_alpha / config.r
        )
        places |= {f"{SHARED[part]}.copy": key for part, key in copies.items()}
        layout = "in out *k" if file.settings.fan_in_fan_out else "out *in"
        return DecodedUpdate(keys["randlora_lambda"].path, update, places, layout)

    @classmethod
    def encode(cls, update: RandLoRA) -> dict[str, tuple[str, Lazy]]:
        leaves = {field: as_lazy(leaf) for field, leaf in update.tensors.items()}
        words = {field: (part, leaves[field]) for part, field in (SEPARATE | SHARED).items()}
        return words | {f"{field}.copy": (f".{part}", leaves[field]) for part, field in SHARED.items()}

    @classmethod
    def why_not(cls, target: Target, update: Update) -> str:
        return not_embedded(target, update.method)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        r = int(some.lam.shape[0])
        alpha = exact_alpha((r, some.scaling), rslora=False)
        turned = cls.turned(updates)
        return {"r": r, "randlora_alpha": alpha, "save_projection": True, "fan_in_fan_out": turned}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        members = cls.of_it(updates)
        return [p for p, u in members.items() if exact_alpha((int(u.lam.shape[0]), u.scaling), rslora=False) is None]

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        """Yield (target, reason) for updates that PEFT cannot load from the same file as the other updates.

        A file has one rank and one scaling. Two numbers determine the sizes of PEFT's bases: the largest number of
        outputs among the adapted weights, and the largest number of inputs. The second axis of B has the length
        ceil(shorts / rank), where `shorts` is the smaller of the two numbers.
        """
        members = {t: u for t, group in updates.items() for u in group if isinstance(u, RandLoRA)}
        settings_of = {t: (u.scaling, tuple(u.A.shape), tuple(u.B.shape)) for t, u in members.items()}
        odd = minority(settings_of)
        yield from (
            (target, "its scaling or the shapes of its A and B differ from those of most updates") for target in odd
        )
        kept = {target: update for target, update in members.items() if target not in odd}
        for target, update in kept.items():
            n, short = update.gamma.shape
            if n != -(-short // update.lam.shape[0]):
                yield (
                    target,
                    f"its gamma has {n} rows, but PEFT creates {-(-short // update.lam.shape[0])} for this weight",
                )
        for longs, bases, r, shorts in {(*u.B.shape, u.A.shape[-1]) for u in kept.values()}:
            needed = _needed(base, kept)
            if bases != -(-shorts // r) or (needed is not None and (shorts, longs) != needed):
                yield from (
                    (target, "the sizes of its bases differ from those that PEFT creates for these weights")
                    for target in kept
                )


def _needed(base: Checkpoint | None, members: Mapping[Target, RandLoRA]) -> tuple[int, int] | None:
    """Return the largest number of outputs and the largest number of inputs among the adapted weights.

    The smaller of these two numbers comes first. Return None if no base is given, or if the base lacks a weight.
    """
    widths = {target: stored_inputs(base, target) for target in members}
    if base is None or None in widths.values():
        return None
    outs = [base.tensors[f"{t.path}.weight"].shape[1 if t.layout == "in out *k" else 0] for t in members]
    sides = sorted((max(outs), max(width for width in widths.values() if width is not None)))
    return sides[0], sides[1]


def _check_copy(file: File, copy: Key, original: Key) -> None:
    """Check that a module's copy of a basis equals the shared basis, because PEFT loads both into one tensor."""
    one, other = file.tensors[copy], file.tensors[original]
    same = one is other or ((one.shape, one.dtype) == (other.shape, other.dtype) and one.fetch() == other.fetch())
    if not same:
        why = f"this copy differs from {original.text}, but PEFT loads both into one tensor"
        raise Malformed(why, where=copy.text, cure=SAVE_WITH_PEFT)

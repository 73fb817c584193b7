"""Families of rotations: OFT, BOFT and PSOFT.

OFT: `oft_R.weight` [blocks, b * (b - 1) / 2] rotates a layer's inputs. `oft_embedding_R.weight` has the same shape and
rotates an embedding's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import msgspec

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, Malformed, ShapeMismatch
from ....io.inputs import decimal_number
from ....io.lazy import as_lazy
from ....linalg.rotations import block_size
from ....methods.boft import BOFT
from ....methods.oft import OFT
from ....methods.oft_patches import OFTPatches
from ....methods.psoft import PSOFT
from ..._format import Departure
from ..decoders import on_patches, turns_patches
from ..file import DecodedUpdate, File, Key, make
from . import Family, MethodFields, Parts, check_parts

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

PLAIN, EMBEDDING = "oft_R.weight", "oft_embedding_R.weight"


class OFTFields(MethodFields, frozen=True, kw_only=True):
    """The size of the blocks, the number of terms of the Cayley-Neumann series, and the limit on the rotation."""

    r: int = 0
    oft_block_size: int = 32
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    peft_version: str | None = None


class OftFamily(Family):
    """The family of the peft_type OFT."""

    name = "oft"
    peft_type = "OFT"
    method = OFT
    others = (OFTPatches,)
    parts = (PLAIN, EMBEDDING)
    method_fields: ClassVar[type[MethodFields]] = OFTFields
    empty = True
    departures: ClassVar[Mapping[str, Departure]] = {
        "oft_series_before_0_18": Departure(
            "with use_cayley_neumann, PEFT releases before 0.18 multiply the last term of the series by 2, like the "
            "terms before it",
            "the last term is not multiplied by 2; PEFT 0.18 and later also read these files in this way",
        ),
        "oft_of_overlapping_patches": Departure(
            "oft_patches on a Conv2d with a kernel larger than 1 x 1: PEFT rotates the input's patches and adds them "
            "up, so no change of the weight is equivalent; the file does not show the kernel's size, but the base or "
            "the loaded layer does",
            "oft: the weight is rotated, as in PEFT's merge",
            on_patches,
        ),
    }
    read: ClassVar[Mapping[str, str]] = {
        "block_share": "whether all blocks have the same rotation",
        "coft": "whether eps limits the norm of each block's Q",
        "eps": "with coft, the limit for all n blocks together; the limit for one block is eps / sqrt(n)",
        "num_cayley_neumann_terms": "number of terms of the Cayley-Neumann series",
        "oft_block_size": "size of a block, rounded to the nearest divisor of the layer's width; if it is 0, r is "
        "the number of blocks",
        "use_cayley_neumann": "whether a series replaces the exact Cayley transform; PEFT 0.18 changed the last term",
    }
    harmless: ClassVar[Mapping[str, str]] = {"module_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none", "block_share": False, "coft": False, "init_weights": True, "module_dropout": 0.0,
        "peft_version": "0.18.0", "use_cayley_neumann": False,
    }  # fmt: skip

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        part = EMBEDDING if EMBEDDING in keys else PLAIN
        check_parts(keys, (part,))
        key, config = keys[part], file.settings.method_fields
        _check(config, key, file.tensors[key])
        terms = max(config.num_cayley_neumann_terms, 1) if config.use_cayley_neumann else 0
        side = "out" if part == EMBEDDING else "in"
        leaves: Any = {"pairs": file.tensors[key]}
        doubled = terms > 0 and _before_018(config.peft_version) and not file.by_formula
        if part == PLAIN and not file.by_formula and _of_patches(file, key):
            turned = OFTPatches(**leaves, terms=terms, doubled=doubled, coft=config.coft, eps=config.eps)
            return DecodedUpdate(key.path, turned, {"pairs": key})
        update = OFT(**leaves, side=side, terms=terms, doubled=doubled, coft=config.coft, eps=config.eps)
        return DecodedUpdate(key.path, update, {"pairs": key}, "in out *k" if part == EMBEDDING else "out *in")

    @classmethod
    def encode(cls, update: OFT | OFTPatches) -> Parts:
        part = EMBEDDING if isinstance(update, OFT) and update.side == "out" else PLAIN
        return {field: (part, as_lazy(leaf)) for field, leaf in update.tensors.items()}

    @classmethod
    def why_not(cls, target: Target, update: OFT | OFTPatches) -> str:
        if isinstance(update, OFTPatches):
            return super().why_not(target, update)
        if update.pairs is None or update.rescale is not None or update.constraint:
            return "this oft has LyCORIS's form, which PEFT does not support"
        if update.doubled and not update.terms:
            return "this oft has doubled = true, which needs a series, but terms is 0"
        stored = "in out *k" if update.side == "out" else "out *in"
        return (
            ""
            if target.layout == stored
            else "PEFT supports oft only on the inputs of a layer or the outputs of an embedding"
        )

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        for target, group in updates.items() if base is None else ():
            if any(isinstance(update, OFTPatches) for update in group):
                yield (
                    target,
                    "only the base shows that oft_patches adapts a convolution; pass --base BASE (base=)",
                )

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        members = list(cls.of_it(updates).values())
        some, shapes = members[0], [tuple(map(int, update.pairs.shape)) for update in members]
        return {
            **_blocks([(n, block_size(pairs)) for n, pairs in shapes]),
            "coft": some.coft,
            "eps": float(some.eps),
            "use_cayley_neumann": some.terms > 0,
            "num_cayley_neumann_terms": some.terms or 5,
        }


def _of_patches(file: File, key: Key) -> bool:
    """Whether the module is known to be a Conv2d with a kernel larger than 1 x 1."""
    if key.path in file.known:
        return isinstance(file.known[key.path], OFTPatches)
    shape = file.base_shape(f"{key.path}.weight")
    return shape is not None and turns_patches(tuple(shape))


def _check(config: OFTFields, key: Key, tensor: Lazy) -> None:
    if (config.r > 0) == (config.oft_block_size > 0) or min(config.r, config.oft_block_size) < 0:
        why = f"one of r ({config.r}) and oft_block_size ({config.oft_block_size}) must be 0, and the other positive"
        raise Malformed(why, where="oft_block_size", cure=SAVE_WITH_PEFT)
    n, size = (tensor.shape[0], block_size(tensor.shape[1])) if len(tensor.shape) == 2 else (0, 0)
    width = n * size
    shared = n == 1 and config.block_share
    if not width or (config.block_share and n > 1) or not (shared or (n, size) == _expected(config, width)):
        why = f"the shape {list(tensor.shape)} does not fit r, oft_block_size and block_share in the config"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)


def _before_018(version: str | None) -> bool:
    numbers = (version or "0").split("@")[0].split(".")[:2]
    return [decimal_number(number) or 0 for number in numbers] < [0, 18]


def _expected(config: OFTFields, width: int) -> tuple[int, int]:
    """Return the number and the size of the blocks that PEFT creates for a layer of this width."""
    divisor = nearest_divisor(width, config.oft_block_size or config.r)
    return (width // divisor, divisor) if config.oft_block_size else (divisor, width // divisor)


def nearest_divisor(width: int, wanted: int) -> int:
    """Return the divisor of `width` that is nearest to `wanted`; if two are equally near, the smaller one."""
    if wanted >= width:
        return width
    steps = range(wanted)
    return next(n for step in steps for n in (wanted - step, wanted + step) if width % n == 0)


def _blocks(blocks: list[tuple[int, int]]) -> dict[str, JsonValue]:
    """Return `block_share`, `r` and `oft_block_size`. `blocks` has (number of blocks, block size) for each layer."""
    if all(n == 1 for n, _ in blocks) and len({size for _, size in blocks}) == 1:
        return {"block_share": True, "r": 0, "oft_block_size": blocks[0][1]}
    size, number = _fitting(blocks, 1), _fitting(blocks, 0)
    if size is None and number is not None:
        return {"block_share": False, "r": number, "oft_block_size": 0}
    return {"block_share": False, "r": 0, "oft_block_size": size or max(size for _, size in blocks)}


def _fitting(blocks: list[tuple[int, int]], which: int) -> int | None:
    """Return a number of blocks (`which` 0) or a block size (`which` 1) for the config; None if no value fits.

    For each layer, PEFT rounds the value in the config to a divisor of the layer's width. The rounded value must equal
    the layer's actual value.
    """
    tried = sorted({each[which] for each in blocks}, reverse=True)
    widths = [(n * size, (n, size)[which]) for n, size in blocks]
    return next((c for c in tried if all(nearest_divisor(width, c) == wanted for width, wanted in widths)), None)


# BOFT: `boft_R` [factors, blocks, b, b] and `boft_s`. For a convolution, `boft_s` is [1, out]; otherwise [out, 1].


class BOFTFields(MethodFields, frozen=True, kw_only=True):
    """The size of a block, the number of blocks, and the number of factors."""

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1


class BoftFamily(Family):
    """The family of the peft_type BOFT."""

    name = "boft"
    peft_type = "BOFT"
    method = BOFT
    parts = ("boft_R", "boft_s")
    method_fields: ClassVar[type[MethodFields]] = BOFTFields
    read: ClassVar[Mapping[str, str]] = {
        "boft_block_num": "number of blocks; if it is 0, boft_block_size determines it",
        "boft_block_size": "size of a block; if it is 0, boft_block_num determines it",
        "boft_n_butterfly_factor": "number of factors; without its CUDA extension, PEFT always creates one factor",
    }
    harmless: ClassVar[Mapping[str, str]] = {"boft_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {
        "bias": "none", "boft_block_num": 0, "boft_block_size": 0, "boft_dropout": 0.0, "init_weights": True,
    }  # fmt: skip

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        check_parts(keys, cls.parts)
        R, s, config = file.tensors[keys["boft_R"]], file.tensors[keys["boft_s"]], file.settings.method_fields
        _check_boft(config, keys["boft_R"], R)
        if len(s.shape) != 2 or 1 not in s.shape:
            raise ShapeMismatch(
                f"the shape is {list(s.shape)}, but boft_s must have two axes, one of them of length 1",
                where=keys["boft_s"].text,
                cure=USE_ITS_CONFIG,
            )
        update = make("boft", {"R": R, "s": s.reshape(-1)})
        return DecodedUpdate(keys["boft_R"].path, update, {"R": keys["boft_R"], "s": keys["boft_s"]})

    @classmethod
    def encode(cls, update: BOFT) -> Parts:
        return {"R": ("boft_R", as_lazy(update.R)), "s": ("boft_s", as_lazy(update.s).reshape(-1, 1))}

    @classmethod
    def encode_at(cls, update: BOFT, shape: tuple[int, ...] | None) -> Parts:
        turned = {"s": ("boft_s", as_lazy(update.s).reshape(1, -1))} if shape is not None and len(shape) > 2 else {}
        return cls.encode(update) | turned

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        shapes = [tuple(map(int, update.R.shape)) for update in cls.of_it(updates).values()]
        factors, blocks, sizes = ({shape[axis] for shape in shapes} for axis in (0, 1, 2))
        by_size = len(sizes) == 1
        return {
            "boft_block_size": sizes.pop() if by_size else 0,
            "boft_block_num": 0 if by_size else max(blocks),
            "boft_n_butterfly_factor": factors.pop() if len(factors) == 1 else 0,
        }


def _check_boft(config: BOFTFields, key: Key, R: Lazy) -> None:
    if (config.boft_block_size > 0) == (config.boft_block_num > 0):
        why = "one of boft_block_size and boft_block_num must be 0, and the other must be positive"
        raise Malformed(why, where="boft_block_size", cure=SAVE_WITH_PEFT)
    factors, blocks, size = R.shape[:3] if len(R.shape) == 4 else (0, 0, 0)
    fits = size == config.boft_block_size if config.boft_block_size else blocks == config.boft_block_num
    if not fits or not config.boft_n_butterfly_factor or factors not in (1, config.boft_n_butterfly_factor):
        why = f"the shape {list(R.shape)} does not fit boft_block_size, boft_block_num and boft_n_butterfly_factor"
        raise ShapeMismatch(why, where=key.text, cure=USE_ITS_CONFIG)


# PSOFT: `psoft_R.weight` is [r * (r - 1) / 2] for a rotation, and [r, r] for any other matrix. `psoft_R.vector_a` and
# `psoft_R.vector_b` are [r].


WEIGHT, VECTOR_A, VECTOR_B = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"


class PSOFTFields(MethodFields, frozen=True, kw_only=True):
    """The rank, how PEFT computes R from the stored tensors, and how PEFT computes A and B from the base's weight."""

    r: int = 32
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, msgspec.Meta(ge=0, le=999)] = 10
    random_seed: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] = 0
    psoft_orth: bool = True
    psoft_mag_a: bool = True
    psoft_mag_b: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the endings of the keys that each module must have if the config has these fields."""
        return (WEIGHT, *[VECTOR_A] * self.psoft_mag_a, *[VECTOR_B] * self.psoft_mag_b)


class PsoftFamily(Family):
    """The family of the peft_type PSOFT."""

    name = "psoft"
    peft_type = "PSOFT"
    method = PSOFT
    parts = (WEIGHT, VECTOR_A, VECTOR_B)
    method_fields: ClassVar[type[MethodFields]] = PSOFTFields
    empty = True
    read: ClassVar[Mapping[str, str]] = {
        "ab_svd_init": "psoft_init: B contains the singular values; pissa_init: A and B contain their square roots",
        "cayley_neumann_eps": "with use_cayley_neumann, the limit on the norm of Q",
        "num_cayley_neumann_terms": "number of terms of the Cayley-Neumann series",
        "psoft_mag_a": "whether each module has psoft_R.vector_a",
        "psoft_mag_b": "whether each module has psoft_R.vector_b",
        "psoft_orth": "whether R is a rotation; otherwise R is any matrix",
        "psoft_svd": "full or lowrank; with lowrank, A and B are computed by torch.svd_lowrank on the CPU",
        "psoft_svd_lowrank_niter": "the argument niter of torch.svd_lowrank",
        "random_seed": "the seed of the random numbers in torch.svd_lowrank",
        "use_cayley_neumann": "whether a truncated series replaces the exact Cayley transform",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "psoft_alpha": "no effect: the field sets a factor on the change, but B is divided by the same factor",
        "psoft_dropout": "training only",
    }
    fresh: ClassVar[Mapping[str, Any]] = {
        "ab_svd_init": "psoft_init", "fan_in_fan_out": False, "init_weights": True, "psoft_dropout": 0.0,
        "psoft_mag_a": True, "psoft_mag_b": True, "psoft_orth": True, "psoft_svd": "full",
        "use_cayley_neumann": False,
    }  # fmt: skip

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        config = file.settings.method_fields
        check_parts(keys, config.parts)
        fields: dict[str, str] = {WEIGHT: "pairs" if config.psoft_orth else "R", VECTOR_A: "a", VECTOR_B: "b"}
        shape = file.tensors[keys[WEIGHT]].shape
        wanted = (config.r * (config.r - 1) // 2,) if config.psoft_orth else (config.r, config.r)
        if shape != wanted:
            why = f"the shape is {list(shape)}, but with rank {config.r} in the config it must be {list(wanted)}"
            raise ShapeMismatch(why, where=keys[WEIGHT].text, cure=USE_ITS_CONFIG)
        keys_by_field = {fields[part]: key for part, key in keys.items()}
        series = config.psoft_orth and config.use_cayley_neumann
        leaves: Any = {field: file.tensors[key] for field, key in keys_by_field.items()}
        terms = max(config.num_cayley_neumann_terms, 1) if series else 0
        eps = config.cayley_neumann_eps or 0.0 if series else 0.0
        sketched = config.psoft_svd == "lowrank"
        update = PSOFT(
            **leaves, symmetric=config.ab_svd_init == "pissa_init", terms=terms, eps=eps,
            steps=config.psoft_svd_lowrank_niter + 1 if sketched else 0, seed=config.random_seed if sketched else 0,
        )  # fmt: skip
        return DecodedUpdate(keys[WEIGHT].path, update, keys_by_field)

    @classmethod
    def encode(cls, update: PSOFT) -> Parts:
        parts = {"pairs": WEIGHT, "R": WEIGHT, "a": VECTOR_A, "b": VECTOR_B}
        return {field: (parts[field], as_lazy(leaf)) for field, leaf in update.tensors.items() if field in parts}

    @classmethod
    def why_not(cls, target: Target, update: PSOFT) -> str:
        if update.A is not None:
            return (
                "this psoft stores A and B, but PEFT computes them from the base, with signs that depend on the machine"
            )
        if update.seed and not update.steps:
            return "this psoft has a seed, but its decomposition is exact and needs no seed"
        if update.eps and not update.terms:
            return "this psoft limits the norm of Q, but PEFT limits this norm only with use_cayley_neumann"
        return super().why_not(target, update)

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        some = next(iter(cls.of_it(updates).values()))
        rank = int(some.R.shape[0]) if some.pairs is None else block_size(int(some.pairs.shape[0]))
        return {
            "r": rank,
            "ab_svd_init": "pissa_init" if some.symmetric else "psoft_init",
            "psoft_svd": "lowrank" if some.steps else "full",
            **({"psoft_svd_lowrank_niter": some.steps - 1, "random_seed": some.seed} if some.steps else {}),
            "psoft_orth": some.R is None,
            "psoft_mag_a": some.a is not None,
            "psoft_mag_b": some.b is not None,
            "use_cayley_neumann": some.terms > 0,
            "num_cayley_neumann_terms": some.terms or 5,
            "cayley_neumann_eps": float(some.eps) or None,
        }

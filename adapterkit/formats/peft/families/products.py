"""Families of products: LoKr (Kronecker), LoHa (Hadamard), and HiRA (Hadamard product with the base's weight).

LoKr has `lokr_w1` [a, c] and `lokr_w2` [b, d, *k]. The file may contain `lokr_w1_a` and `lokr_w1_b` instead of
`lokr_w1`, and `lokr_w2_a` and `lokr_w2_b` instead of `lokr_w2`. For a convolution, there may also be a core `lokr_t2`.

PEFT's config does not contain the sizes a, b, c, d. PEFT computes the sizes from `decompose_factor`. The number of
outputs is a * b, and the number of inputs is c * d. If the rank is small, PEFT decomposes w2 (with `decompose_both`,
also w1) into two tensors. PEFT can load a file only if the tensors have exactly the shapes that PEFT computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import SAVE_WITH_PEFT, USE_ITS_CONFIG, ShapeMismatch
from ....io.lazy import Lazy, as_lazy
from ....linalg.products import even_split
from ....methods.hira import HiRA
from ....methods.loha import LoHa
from ....methods.lokr import LoKr
from ..._format import Departure
from ..file import DecodedUpdate, File, Key, make
from . import Family, MethodFields, Parts, ScaledFields, check_parts, check_rank, inexact_alphas, scaled_numbers

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.lazy import Lazy
    from ....io.strict_json import JsonValue

FIRST = {"lokr_w1": "w1"}, {"lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b"}
SECOND = (
    {"lokr_w2": "w2"}, {"lokr_t2": "t2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_in"},
    {"lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b"},
)  # fmt: skip
"""FIRST lists the possible maps from the endings of keys to fields for w1; SECOND lists the possible maps for w2.

A map applies if the module has a key with the first ending in the map. The reader uses the first map that applies.
"""


class LoKrFields(ScaledFields, frozen=True, kw_only=True):
    """The config fields that determine the scaling and the sizes of the factors."""

    decompose_factor: int = -1
    decompose_both: bool = False


class LokrFamily(Family):
    """The family of the peft_type LOKR."""

    name = "lokr"
    peft_type = "LOKR"
    method = LoKr
    parts = tuple(dict.fromkeys(part for form in (*FIRST, *SECOND) for part in form))
    method_fields: ClassVar[type[MethodFields]] = LoKrFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / r",
        "decompose_both": "whether w1 is also decomposed into two tensors if the rank is small; the tensors show it",
        "decompose_factor": "how the numbers of outputs and inputs are split into a * b and c * d; the tensors show it",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "module_dropout": "training only",
        "rank_dropout": "training only",
        "rank_dropout_scale": "training only",
        "use_effective_conv2d": "whether convolutions have a core; the keys show it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0}
    folds = ("w1", "w1_a")
    departures: ClassVar[Mapping[str, Departure]] = {
        "lokr_kernel_of_one_axis": Departure(
            "PEFT treats a full lokr_w2 [b, d, k] on nn.Conv1d as a stack of b matrices [d, k]: torch.kron multiplies "
            "lokr_w1 with each matrix, and the result is reshaped to the shape of the weight",
            "each kernel position is the Kronecker product of lokr_w1 and lokr_w2 at this position",
        )
    }

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        fields = _form(keys, FIRST) | _form(keys, SECOND)
        check_parts(keys, fields)
        some = next(iter(keys.values()))
        tensors = {fields[part]: _turned(fields[part], file.tensors[key], fields) for part, key in keys.items()}
        scaling = file.settings.method_fields.scaling(file.settings, some.path)
        stacked = "w2" in tensors and len(tensors["w2"].shape) == 3 and not file.by_formula
        update = make("lokr", tensors, scaling=scaling, stacked=stacked)
        assert isinstance(update, LoKr)
        weight = file.base_shape(f"{some.path}.weight")
        _check(update, file, some, math.prod(weight[2:]) if weight else None)
        return DecodedUpdate(some.path, update, {fields[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: LoKr) -> dict[str, tuple[str, Lazy]]:
        tensors = update.tensors
        forms = next(form for form in FIRST if tensors.keys() >= {*form.values()}) | next(
            form for form in SECOND if tensors.keys() >= {*form.values()}
        )
        return {field: (part, _turned(field, as_lazy(tensors[field]), forms)) for part, field in forms.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        return cls.numbers_at(updates, None)

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, JsonValue]:
        members = cls.of_it(updates)
        factor, both = next(_splits(members, base), (-1, False))
        scales = {path: (_rank(update, both), float(update.scaling)) for path, update in members.items()}
        cored = any(update.t2 is not None for update in members.values())
        words = {"decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": cored}
        return {**scaled_numbers(scales), **words}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        members = cls.of_it(updates)
        _, both = next(_splits(members, None), (-1, False))
        return inexact_alphas({path: (_rank(update, both), float(update.scaling)) for path, update in members.items()})

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        members = cls.of_it(updates)
        if members and next(_splits(members, base), None) is None:
            why = "no single pair of decompose_factor and decompose_both yields the sizes of all lokr factors"
            yield from ((target, why) for target in updates if target.path in members)
            return
        cored = any(update.t2 is not None for update in members.values())
        for target in updates if cored else ():
            kernel = _kernel(base, target.path)
            if target.path in members and members[target.path].w2_b is not None and kernel > 1:
                yield target, "this lokr has no core, but others do, and use_effective_conv2d applies to all modules"


class LokrSizes:
    """The sizes of one update's factors, for a comparison with the sizes that PEFT would choose.

    Args:
        update: the update.
        kernel: the number of elements of the convolution's kernel; None if unknown. If it is unknown, the shape of
            `w2_b`, [r, d * kernel], does not determine d.

    Attributes:
        sides: the pairs (a * b, a) and (c * d, c); only the first pair if d is unknown.
        first: a pair of two values. The first value is true if w1 is decomposed into two tensors. The second value is
            the larger of a and c.
        second: a pair of two values. The first value is true if w2 is decomposed into two tensors. The second value is
            the larger of b and d, or infinity if d is unknown.
        rank: the rank of the decomposed w1 or w2; None if neither is decomposed.
    """

    def __init__(self, update: LoKr, kernel: int | None) -> None:
        shapes = {name: tuple(leaf.shape) for name, leaf in update.tensors.items()}
        a, c = shapes["w1"] if "w1" in shapes else (shapes["w1_a"][0], shapes["w1_b"][1])
        b = shapes["w2" if "w2" in shapes else "w2_a"][0]
        d = next((shapes[name][1] for name in ("w2", "w2_in") if name in shapes), None)
        if d is None and kernel is not None:
            d = shapes["w2_b"][1] // kernel
        self.sides = ((a * b, a),) if d is None else ((a * b, a), (c * d, c))
        self.first = ("w1_a" in shapes, max(a, c))
        self.second = ("w2" not in shapes, math.inf if d is None else max(b, d))
        ranks = [shape[1] for name, shape in shapes.items() if name in ("w1_a", "w2_a")]
        self.rank: int | None = ranks[0] if ranks else None

    def smallest(self, both: bool) -> int:
        """Return the smallest rank at which PEFT does not decompose any factor that this update stores as one tensor.

        `both` is the config's `decompose_both`. If `both` is false, PEFT never decomposes w1.
        """
        needed = [self.second] if not both else [self.first, self.second]
        return max((-(-int(size) // 2) for apart, size in needed if not apart), default=1)

    def made_by(self, factor: int, both: bool, rank: int) -> bool:
        """Return whether PEFT chooses these sizes for the given rank, `decompose_factor` and `decompose_both`."""
        apart = (both and rank < self.first[1] / 2, rank < self.second[1] / 2)
        split = all(even_split(size, factor)[0] == part for size, part in self.sides)
        return split and apart == (self.first[0], self.second[0])


def _form(keys: Mapping[str, Key], forms: tuple[dict[str, str], ...]) -> dict[str, str]:
    return next((form for form in forms if any(part in keys for part in list(form)[:1])), forms[0])


def _turned(field: str, tensor: Lazy, forms: Mapping[str, str]) -> Lazy:
    """If there is a core, transpose w2_a: [b, r] becomes [r, b], or the reverse. Return all other tensors unchanged."""
    if field != "w2_a" or "t2" not in forms.values() or len(tensor.shape) != 2:
        return tensor
    return tensor.map(lambda values: values.T, tensor.shape[::-1])


def _check(update: LoKr, file: File, key: Key, kernel: int | None) -> None:
    config, rank = file.settings.method_fields, file.settings.rank(key.path)
    update.dims()
    if any(0 in leaf.shape for leaf in update.tensors.values()):
        raise ShapeMismatch("a tensor of this module has no elements", where=key.text, cure=SAVE_WITH_PEFT)
    sizes = LokrSizes(update, kernel)
    if sizes.rank not in (None, rank) or not sizes.made_by(config.decompose_factor, config.decompose_both, rank):
        why = f"PEFT does not create these factors with rank {rank}, decompose_factor {config.decompose_factor}"
        cure = USE_ITS_CONFIG
        raise ShapeMismatch(f"{why} and decompose_both {config.decompose_both}", where=key.text, cure=cure)


def _rank(update: LoKr, both: bool) -> int:
    sizes = LokrSizes(update, 1)
    return sizes.smallest(both) if sizes.rank is None else sizes.rank


def _splits(members: Mapping[str, LoKr], base: Checkpoint | None) -> Iterator[tuple[int, bool]]:
    """Yield each (decompose_factor, decompose_both) with which PEFT would choose the factor sizes of all `members`.

    If no base is given, first assume that all weights belong to linear layers. Then search again without this
    assumption. If the second search cannot determine a weight's number of inputs, it does not check this number.
    """
    yield from _splits_of([LokrSizes(update, _kernel(base, path)) for path, update in members.items()])
    if base is None:
        yield from _splits_of([LokrSizes(update, None) for update in members.values()])


def _splits_of(sizes_of: list[LokrSizes]) -> Iterator[tuple[int, bool]]:
    parts = sorted({part for sizes in sizes_of for _, part in sizes.sides})
    widest = max((math.isqrt(size) for sizes in sizes_of for size, _ in sizes.sides), default=1)
    for factor in dict.fromkeys((-1, *parts, *range(1, widest + 1))):
        if all(even_split(size, factor)[0] == part for sizes in sizes_of for size, part in sizes.sides):
            for both in (False, True):
                if all(each.made_by(factor, both, each.rank or each.smallest(both)) for each in sizes_of):
                    yield factor, both


def _kernel(base: Checkpoint | None, path: str) -> int:
    """Return the number of elements of a convolution's kernel; 1 for a linear layer, or if the weight is unknown."""
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    return 1 if weight is None else math.prod(weight.shape[2:])


# LoHa: `hada_w1_a` [out, r] and `hada_w1_b` [r, in * k]. With a core `hada_t1`, the shapes are [r, out] and [r, in].
# `hada_w2_a`, `hada_w2_b` and `hada_t2` have the same shapes as `hada_w1_a`, `hada_w1_b` and `hada_t1`.


PLAIN = {"hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b"}
CORED = PLAIN | {"hada_t1": "t1", "hada_w1_b": "w1_in", "hada_t2": "t2", "hada_w2_b": "w2_in"}
"""Maps from the endings of keys to fields of the update, for files without cores and with cores."""


class LohaFamily(Family):
    """The family of the peft_type LOHA."""

    name = "loha"
    peft_type = "LOHA"
    method = LoHa
    parts = tuple(CORED)
    method_fields: ClassVar[type[MethodFields]] = ScaledFields
    read: ClassVar[Mapping[str, str]] = {"alpha": "scaling = alpha / r"}
    harmless: ClassVar[Mapping[str, str]] = {
        "module_dropout": "training only",
        "rank_dropout": "training only",
        "use_effective_conv2d": "whether convolutions have a core; the keys show it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0}
    folds = ("w1_a",)

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        fields = CORED if "hada_t1" in keys or "hada_t2" in keys else PLAIN
        check_parts(keys, fields)
        some = keys["hada_w1_b"]
        check_rank(some, file.tensors[some], file.settings.rank(some.path))
        tensors = {fields[part]: _loha_turned(part, file.tensors[key], fields) for part, key in keys.items()}
        update = make("loha", tensors, scaling=file.settings.method_fields.scaling(file.settings, some.path))
        return DecodedUpdate(some.path, update, {fields[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: LoHa) -> dict[str, tuple[str, Lazy]]:
        fields = PLAIN if update.t1 is None else CORED
        return {
            field: (part, _loha_turned(part, as_lazy(update.tensors[field]), fields)) for part, field in fields.items()
        }

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        cored = any(update.t1 is not None for update in cls.of_it(updates).values())
        return {**scaled_numbers(cls.scales(updates)), "use_effective_conv2d": cored}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        return inexact_alphas(cls.scales(updates))

    @classmethod
    def scales(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, tuple[int, float]]:
        """Return (rank, scaling) of each update, by path."""
        members = cls.of_it(updates)
        return {path: (int(update.w1_a.shape[1]), float(update.scaling)) for path, update in members.items()}


def _loha_turned(part: str, tensor: Lazy, fields: Mapping[str, str]) -> Lazy:
    """If there are cores, transpose w1_a or w2_a: [out, r] becomes [r, out], or the reverse.

    Return all other tensors unchanged.
    """
    if fields is PLAIN or part not in ("hada_w1_a", "hada_w2_a") or len(tensor.shape) != 2:
        return tensor
    return tensor.map(lambda values: values.T, tensor.shape[::-1])


# HiRA: `hira_A` [r, in, *k] and `hira_B` [out, r, 1, ...]. For each axis of the kernel, `hira_B` has one axis, whose
# length is 1. For an embedding, the keys end with `hira_embedding_A` and `hira_embedding_B`.


HIRA_PLAIN = {"A": "hira_A", "B": "hira_B"}
EMBEDDING = {"A": "hira_embedding_A", "B": "hira_embedding_B"}
"""Maps from fields of the update to the endings of keys."""


class HiraFamily(Family):
    """The family of the peft_type HIRA."""

    name = "hira"
    peft_type = "HIRA"
    method = HiRA
    parts = (*HIRA_PLAIN.values(), *EMBEDDING.values())
    harmless: ClassVar[Mapping[str, str]] = {"hira_dropout": "training only"}
    fresh: ClassVar[Mapping[str, Any]] = {"fan_in_fan_out": False, "hira_dropout": 0.0, "init_weights": True}

    @classmethod
    def decode_keys(cls, file: File, keys: Mapping[str, Key]) -> DecodedUpdate:
        fields = EMBEDDING if EMBEDDING["A"] in keys else HIRA_PLAIN
        check_parts(keys, fields.values())
        key_of = {field: keys[part] for field, part in fields.items()}
        A, B = (file.tensors[key_of[field]] for field in ("A", "B"))
        # PEFT ignores `rank_pattern` for a model's first adapter. So accept the config's `r` even if `rank_pattern` has
        # another rank for the module.
        if file.settings.r not in A.shape[:1]:
            check_rank(key_of["A"], A, file.settings.rank(key_of["A"].path))
        if math.prod(B.shape[:2]) != math.prod(B.shape):
            why = f"the shape is {list(B.shape)}, but B must be [out, r], followed only by axes of length 1"
            raise ShapeMismatch(why, where=key_of["B"].text, cure=SAVE_WITH_PEFT)
        update = make("hira", {"A": A, "B": B.reshape(*B.shape[:2])})
        turned = fields is EMBEDDING or (file.settings.fan_in_fan_out and len(A.shape) == 2)
        return DecodedUpdate(key_of["A"].path, update, key_of, "in out *k" if turned else "out *in")

    @classmethod
    def encode(cls, update: HiRA) -> Parts:
        B = as_lazy(update.B)
        return {
            "A": (HIRA_PLAIN["A"], as_lazy(update.A)),
            "B": (HIRA_PLAIN["B"], B.reshape(*B.shape, *[1] * _kernel_of(update))),
        }

    @classmethod
    def encode_all(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> Iterator[Parts]:
        from ..spelling import is_embedding  # Not at the top: `spelling` imports this package.

        for target, group in updates.items():
            for update in (update for update in group if isinstance(update, HiRA)):
                fields = EMBEDDING if is_embedding(target) else HIRA_PLAIN
                yield {field: (fields[field], leaf) for field, (_, leaf) in cls.encode(update).items()}

    @classmethod
    def guesses(cls, target: Target) -> bool:
        from ..spelling import is_embedding  # Not at the top: `spelling` imports this package.

        return is_embedding(target) is None

    @classmethod
    def why_not(cls, target: Target, update: HiRA) -> str:
        return (
            "PEFT does not support hira on a transposed convolution"
            if target.layout == "in out *k" and _kernel_of(update)
            else ""
        )

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        from ..spelling import is_embedding  # Not at the top: `spelling` imports this package.

        paths = cls.of_it(updates)
        turned = any(t.path in paths and t.layout == "in out *k" and not is_embedding(t) for t in updates)
        rank = int(next(iter(paths.values())).B.shape[1])
        return {"r": rank, "rank_pattern": {}, "fan_in_fan_out": turned}


def _kernel_of(update: HiRA) -> int:
    return len(update.A.shape) - 2

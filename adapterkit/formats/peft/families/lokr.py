"""LoKr: `lokr_w1` [a, c], or `lokr_w1_a` and `lokr_w1_b`; also `lokr_w2` [b, d, *k], with a core `lokr_t2`.

PEFT's config does not state the four sizes. PEFT splits a weight's sides by `decompose_factor`, and decomposes a factor
if the rank is small. A file that PEFT can load has exactly these shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from ....errors import ShapeMismatch
from ....io.lazy import Lazy, as_lazy
from ....linalg.products import even_split
from ....methods.lokr import LoKr
from ..._format import Departure
from ..file import File, Found, Key, make
from ._family import Family, Own, Scaled, check_parts, inexact_alphas, scaled_numbers

if TYPE_CHECKING:
    from ....core.adapter import Target
    from ....core.updates import Update
    from ....io.checkpoint import Checkpoint
    from ....io.strict_json import JsonValue

FIRST = {"lokr_w1": "w1"}, {"lokr_w1_a": "w1_a", "lokr_w1_b": "w1_b"}
SECOND = (
    {"lokr_w2": "w2"}, {"lokr_t2": "t2", "lokr_w2_a": "w2_a", "lokr_w2_b": "w2_in"},
    {"lokr_w2_a": "w2_a", "lokr_w2_b": "w2_b"},
)  # fmt: skip
"""Maps from key parts to fields, for the forms of each factor; the first form with a part in the file is used."""


class LoKrFields(Scaled, frozen=True, kw_only=True):
    """The settings for splitting a weight's sides."""

    decompose_factor: int = -1
    decompose_both: bool = False


class LokrFamily(Family):
    """The family of the peft_type LOKR."""

    peft_type = "LOKR"
    method = LoKr
    parts = tuple(dict.fromkeys(part for form in (*FIRST, *SECOND) for part in form))
    own: ClassVar[type[Own]] = LoKrFields
    read: ClassVar[Mapping[str, str]] = {
        "alpha": "scaling = alpha / r",
        "decompose_both": "whether the first factor is decomposed if the rank is small; the tensors show it",
        "decompose_factor": "how a side is split in two; the tensors show it",
    }
    harmless: ClassVar[Mapping[str, str]] = {
        "module_dropout": "training only",
        "rank_dropout": "training only",
        "rank_dropout_scale": "training only",
        "use_effective_conv2d": "whether kernels have a core; the keys show it",
    }
    fresh: ClassVar[Mapping[str, Any]] = {"init_weights": True, "module_dropout": 0.0, "rank_dropout": 0.0}
    folds = ("w1", "w1_a")
    departures: ClassVar[Mapping[str, Departure]] = {
        "lokr_kernel_of_one_axis": Departure(
            "a full lokr_w2 [b, d, k] on nn.Conv1d is a stack of b matrices [d, k]: torch.kron multiplies "
            "lokr_w1 with each of them, and the result is reshaped to the shape of the weight",
            "each kernel position is the Kronecker product of lokr_w1 and lokr_w2 at this position",
        )
    }

    @classmethod
    def found(cls, file: File, keys: Mapping[str, Key]) -> Found:
        fields = _form(keys, FIRST) | _form(keys, SECOND)
        check_parts(keys, fields)
        some = next(iter(keys.values()))
        tensors = {fields[part]: _turned(fields[part], file.tensors[key], fields) for part, key in keys.items()}
        scaling = file.settings.own.scaling(file.settings, some.path)
        stacked = "w2" in tensors and len(tensors["w2"].shape) == 3 and not file.by_formula
        update = make("lokr", tensors, scaling=scaling, stacked=stacked)
        assert isinstance(update, LoKr)
        weight = file.base_shape(f"{some.path}.weight")
        _check(update, file, some, math.prod(weight[2:]) if weight else None)
        return Found(some.path, update, {fields[part]: key for part, key in keys.items()})

    @classmethod
    def encode(cls, update: LoKr) -> dict[str, tuple[str, Lazy]]:
        held = update.tensors
        forms = next(form for form in FIRST if held.keys() >= {*form.values()}) | next(
            form for form in SECOND if held.keys() >= {*form.values()}
        )
        return {field: (part, _turned(field, as_lazy(held[field]), forms)) for part, field in forms.items()}

    @classmethod
    def numbers(cls, updates: Mapping[Target, tuple[Update, ...]]) -> dict[str, JsonValue]:
        return cls.numbers_at(updates, None)

    @classmethod
    def numbers_at(cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None) -> dict[str, JsonValue]:
        found = cls.of_it(updates)
        factor, both = next(_splits(found, base), (-1, False))
        scales = {path: (_rank(update, both), float(update.scaling)) for path, update in found.items()}
        cored = any(update.t2 is not None for update in found.values())
        words = {"decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": cored}
        return {**scaled_numbers(scales), **words}

    @classmethod
    def inexact(cls, updates: Mapping[Target, tuple[Update, ...]]) -> list[str]:
        found = cls.of_it(updates)
        _, both = next(_splits(found, None), (-1, False))
        return inexact_alphas({path: (_rank(update, both), float(update.scaling)) for path, update in found.items()})

    @classmethod
    def apart(
        cls, updates: Mapping[Target, tuple[Update, ...]], base: Checkpoint | None
    ) -> Iterator[tuple[Target, str]]:
        found = cls.of_it(updates)
        if found and next(_splits(found, base), None) is None:
            why = "no common decompose_factor yields the sizes of these lokr factors in PEFT"
            yield from ((target, why) for target in updates if target.path in found)
            return
        cored = any(update.t2 is not None for update in found.values())
        for target in updates if cored else ():
            kernel = _kernel(base, target.path)
            if target.path in found and found[target.path].w2_b is not None and kernel > 1:
                yield target, "this lokr has a full kernel and others have cores; the config has one setting for all"


class LokrSizes:
    """The shapes that PEFT creates for one weight. If the kernel size is unknown, the input size may be unknown, too.

    Attributes:
        sides: (size of a side, w1's part of it) for outputs and inputs.
        first: whether w1 is decomposed, and the larger of its sizes.
        second: whether w2 is decomposed, and the larger of its sizes.
        rank: the rank of the decomposed factors; None if neither is decomposed.
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
        """Return the smallest rank at which PEFT decomposes none of the full factors."""
        needed = [self.second] if not both else [self.first, self.second]
        return max((-(-int(size) // 2) for apart, size in needed if not apart), default=1)

    def made_by(self, factor: int, both: bool, rank: int) -> bool:
        """Whether PEFT creates these shapes with these settings."""
        apart = (both and rank < self.first[1] / 2, rank < self.second[1] / 2)
        split = all(even_split(size, factor)[0] == part for size, part in self.sides)
        return split and apart == (self.first[0], self.second[0])


def _form(keys: Mapping[str, Key], forms: tuple[dict[str, str], ...]) -> dict[str, str]:
    return next((form for form in forms if any(part in keys for part in list(form)[:1])), forms[0])


def _turned(field: str, tensor: Lazy, forms: Mapping[str, str]) -> Lazy:
    """Transpose [b, r] to [r, b] or back, if there is a core; return other tensors unchanged."""
    if field != "w2_a" or "t2" not in forms.values() or len(tensor.shape) != 2:
        return tensor
    return tensor.map(lambda values: values.T, tensor.shape[::-1])


def _check(update: LoKr, file: File, key: Key, kernel: int | None) -> None:
    own, rank = file.settings.own, file.settings.rank(key.path)
    update.dims()
    if any(0 in leaf.shape for leaf in update.tensors.values()):
        raise ShapeMismatch("this factor has no elements", where=key.text, cure="Save the adapter again with PEFT")
    sizes = LokrSizes(update, kernel)
    if sizes.rank not in (None, rank) or not sizes.made_by(own.decompose_factor, own.decompose_both, rank):
        why = f"PEFT does not create these factors with rank {rank}, decompose_factor {own.decompose_factor}"
        cure = "The config does not belong to this file, or its rank_pattern is damaged"
        raise ShapeMismatch(f"{why} and decompose_both {own.decompose_both}", where=key.text, cure=cure)


def _rank(update: LoKr, both: bool) -> int:
    sizes = LokrSizes(update, 1)
    return sizes.smallest(both) if sizes.rank is None else sizes.rank


def _splits(found: Mapping[str, LoKr], base: Checkpoint | None) -> Iterator[tuple[int, bool]]:
    """Yield each (decompose_factor, decompose_both) with which PEFT creates all these shapes.

    Without a base, weights are assumed to be linear layers or, if that is impossible, to have unknown inputs.
    """
    yield from _splits_of([LokrSizes(update, _kernel(base, path)) for path, update in found.items()])
    if base is None:
        yield from _splits_of([LokrSizes(update, None) for update in found.values()])


def _splits_of(made: list[LokrSizes]) -> Iterator[tuple[int, bool]]:
    parts = sorted({part for sizes in made for _, part in sizes.sides})
    widest = max((math.isqrt(size) for sizes in made for size, _ in sizes.sides), default=1)
    for factor in dict.fromkeys((-1, *parts, *range(1, widest + 1))):
        if all(even_split(size, factor)[0] == part for sizes in made for size, part in sizes.sides):
            for both in (False, True):
                if all(each.made_by(factor, both, each.rank or each.smallest(both)) for each in made):
                    yield factor, both


def _kernel(base: Checkpoint | None, path: str) -> int:
    """Return the number of kernel positions, as far as the base shows it; 1 for a linear layer."""
    weight = None if base is None else base.tensors.get(f"{path}.weight")
    return 1 if weight is None else math.prod(weight.shape[2:])

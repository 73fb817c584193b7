"""Check that two groups of updates of one weight compute the same function, without computing dense weight changes.

Additive updates are applied to a few fixed random inputs x. A LoRA, for example, computes `B @ (A @ x)`. If any update
is not additive, the updates are applied to a fixed random weight instead. All computation is in float64. The allowed
error is the error that rounding to the stored element types can cause. The elements' rounding errors are independent,
so the total error is the square root of the sum of their squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..core.updates import Additive, ContextUpdate
from ..errors import PASS_BASE, USE_ITS_BASE, AdapterkitError, ShapeMismatch, UsageError
from ..io.lazy import as_array, as_lazy
from ..methods.lora import LoRA
from ..naming.binding.fitting import biasless

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..core.adapter import Target, Updates
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from ..io.lazy import Leaf

    Array = np.ndarray[Any, Any]

PROBES = 4
"""The number of random inputs to which additive updates are applied."""

SIGMAS = 8.0
"""The allowed error, in standard deviations of the rounding error. About 5 of a million correct runs exceed it."""

ALONE = 2.0**-20
"""The relative error that is always allowed, because scalings and alphas may be rounded to float32 several times."""

BLOCK = 1 << 16
"""The number of elements that are compared in one step: a block and its intermediate results fit the L2 cache."""

FLOAT32 = 2.0**-22
"""The relative rounding error of a float32 multiplication and the float32 subtraction that follows."""

UNSQUARED = 2.0**-30
"""The allowed rounding error, as a fraction of the largest value, if squares of the values would overflow."""

NOTHING = 2.0**-1000
"""Weight changes below this size count as zero: float64 loses precision there, and no real weight is so small."""

_BITS = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
_LEAST = {"F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14, "F8_E4M3": 2.0**-6, "F8_E5M2": 2.0**-14}
"""The smallest normal value of each type; smaller values are subnormal and have a constant spacing."""


def unlike(asked: Updates, got: Updates, base: Checkpoint | None, dtypes: frozenset[str]) -> str:
    """Return the reason why two groups of updates of one weight compute different functions; empty if they are equal.

    Args:
        asked: the updates that were to be written, by target.
        got: the updates that were read back, by target.
        base: the base, for shapes that the updates' tensors do not show.
        dtypes: the element types that the format supports; empty if it supports all. Writers round tensors of
            other types to one of these types.

    Raises:
        ShapeMismatch: the updates in `asked` do not fit the base.
    """
    import numpy as np

    targets = [*asked, *got]
    layouts = {target.layout for target in targets}
    if len(layouts) > 1:
        return f"the weight is stored as [{targets[-1].layout}], not [{targets[0].layout}]"
    unit, least = _rounding(asked, got, dtypes)
    updates = [update for group in (asked, got) for updates_there in group.values() for update in updates_there]
    if any(update.kind not in ("additive", "weight") for update in updates):
        return _unlike_values([*_in_order(asked)], [*_in_order(got)], unit, least)
    weight = _WeightAnswers(asked, got, base, unit, least)
    if base is not None:
        weight.check_base()
    if _same_but_folded(asked, got, unit, least):
        return ""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return _compared(weight.answers(asked), weight.answers(got))
    except AdapterkitError as error:
        return f"the written update cannot be compared with the update that was read back ({error.why})"
    except ValueError as error:  # Some formulas raise this for wrong shapes.
        return f"the written update cannot be compared with the update that was read back ({error})"


def _same_but_folded(asked: Updates, got: Updates, unit: float, least: float) -> bool:
    """Whether both groups contain only LoRAs, and these LoRAs have equal A and equal `scaling * B`.

    If False, the groups may still compute the same function. Writers often fold a scaling into B. This check is fast
    because it multiplies no matrices; the general check with random inputs would take ten times as long as the
    conversion.
    """
    from ._proof import equal

    if asked.keys() != got.keys() or any(len(group) != len(got[target]) for target, group in asked.items()):
        return False
    for one, other in zip(_in_order(asked), _in_order(got), strict=True):
        if type(one) is not LoRA or type(other) is not LoRA or one.bias is not None or other.bias is not None:
            return False
        if not equal(one.A, other.A) or not _near_scaled(one, other, unit + ALONE, least):
            return False
    return True


def _near_scaled(one: LoRA, other: LoRA, unit: float, least: float) -> bool:
    """Whether two LoRAs have the same `scaling * B`, up to rounding. False does not prove a difference.

    The first B is multiplied by the quotient of the two scalings and compared with the second B, element by element.
    `scaling * B` is not computed, because it can overflow or underflow. Values of at most 32 bits are multiplied in
    float32, and the rounding error of float32 is subtracted from the allowed error. The arrays are compared in blocks
    that fit the processor's cache: a comparison of whole arrays in float64 took longer than the rest of a conversion.
    """
    import numpy as np

    ours, theirs = (as_array(update.B).reshape(-1) for update in (one, other))
    quotient = one.scaling / other.scaling if other.scaling else 0.0
    if one.B.shape != other.B.shape or not 0 < abs(quotient) < math.inf:
        return False
    wide = "F64" in {as_lazy(update.B).dtype.name for update in (one, other)}
    kind: Any = np.float64 if wide else np.float32
    bound, least = kind(2 * unit - (0 if wide else FLOAT32)), least / abs(other.scaling)
    if least > np.finfo(kind).max:
        return False
    least = kind(least)
    with np.errstate(over="ignore", invalid="ignore"):
        for at in range(0, ours.size, BLOCK):
            mine, its = (each[at : at + BLOCK].astype(kind) for each in (ours, theirs))
            mine *= kind(quotient)
            np.abs(np.subtract(mine, its, out=its), out=its)
            np.abs(mine, out=mine)
            if least:
                np.maximum(mine, least, out=mine)
            if not (its <= np.multiply(mine, bound, out=mine)).all():
                return False
    return True


def _in_order(group: Updates) -> Iterator[Update]:
    return (update for group in group.values() for update in group)


def _rounding(asked: Updates, got: Updates, dtypes: frozenset[str]) -> tuple[float, float]:
    """Return `(unit, least)`: stored values of at least `least` have a relative rounding error of at most `unit`.

    A writer rounds a computed tensor to the tensor's dtype. If the format does not support this dtype, the writer
    rounds to a dtype that the format supports.
    """
    kinds = _kinds(asked) or _kinds(got)
    if dtypes and not kinds <= dtypes:
        kinds |= _kinds(got) & dtypes
    bits = min((_BITS[kind] for kind in kinds if kind in _BITS), default=23)
    return 2.0 ** -(bits + 1), max((_LEAST.get(kind, 0.0) for kind in kinds), default=0.0)


def _kinds(group: Updates) -> set[str]:
    leaves = (as_lazy(leaf) for update in _in_order(group) for leaf in update.tensors.values())
    return {leaf.dtype.name for leaf in leaves if leaf.dtype.floating}


@dataclass(slots=True, eq=False)
class _Answer:
    """A group's outputs for the random inputs, one row per output, and the expected squares of the rounding errors."""

    value: Array
    squares: Array


@dataclass(frozen=True, slots=True, eq=False)
class _WeightAnswers:
    """Compute the outputs of `asked` and `got`, two groups of updates of one weight, for random inputs."""

    asked: Updates
    got: Updates
    base: Checkpoint | None
    unit: float
    least: float

    def check_base(self) -> None:
        """Refuse updates in `asked` that do not fit the base's shapes. The writer may not have checked the shapes.

        Raises:
            ShapeMismatch: an update does not fit.
        """
        for target, updates in self.asked.items():
            shape = self._shape(target)
            for update in updates:
                dims = update.dims(target.stacked)
                for axis, size in zip(("out", "in"), shape, strict=False):
                    if isinstance(dims.get(axis), int) and dims[axis] != size:
                        why = f"this {update.method} has {axis}={dims[axis]}, but the base's weight has {axis}={size}"
                        cure = USE_ITS_BASE
                        raise ShapeMismatch(why, where=str(target), cure=cure)

    def answers(self, group: Updates) -> dict[tuple[str, int], _Answer]:
        """Return the outputs of a group, keyed by ("weight" or "bias", expert number).

        Targets that change different rows of the weight share one entry.
        """
        answers: dict[tuple[str, int], _Answer] = {}
        for target, updates in group.items():
            loaded = [update.map(_values) for update in updates]
            experts = int(updates[0].dims(True)["e"]) if target.stacked else 1  # type: ignore[arg-type]
            for expert in range(experts):
                each = [update.expert(expert) for update in loaded] if target.stacked else loaded
                for part, answer in self._answers(target, each):
                    self._place(answers, (part, expert), target, answer)
        return answers

    def _answers(self, target: Target, updates: Sequence[Update]) -> Iterator[tuple[str, _Answer]]:
        shape = self._shape(target)
        changing = [update for update in updates if update.changes_weight]
        if changing:
            yield (
                "weight",
                self._sum(cast("Sequence[Additive]", changing), shape)
                if self._additive
                else self._change(changing, _random(shape)),
            )
        if any(update.changes_bias for update in updates) and self._has_bias(target, updates):
            b = _random(shape[:1])
            new, W = cast("tuple[torch.Tensor, torch.Tensor]", (b, _random(shape)))
            for update in updates:
                settled = update.settled(W) if update.bias_sees_weight else update
                new = settled.new_bias(new)
            changed = cast("Array", new)
            yield "bias", self._rounded(changed - b, changed)

    def _has_bias(self, target: Target, updates: Sequence[Update]) -> bool:
        """Whether to compare biases. If a layer has no bias, updates that only transform a bias do not add one."""
        adds = any(update.changes_bias and update.needs_bias for update in updates)
        return adds or self.base is None or not biasless(self.base, target.path)

    @property
    def _additive(self) -> bool:
        return all(isinstance(update, Additive) for group in (self.asked, self.got) for update in _in_order(group))

    def _sum(self, updates: Sequence[Additive], shape: tuple[int, ...]) -> _Answer:
        """Compute `D @ x`. D is the sum of the updates' weight changes.

        Low-rank updates are applied factor by factor.
        """
        import numpy as np

        x = _random((math.prod(shape[1:]), PROBES))
        answer = _Answer(np.zeros((shape[0], PROBES)), np.zeros((shape[0], PROBES)))
        for update in updates:
            factors = cast("tuple[Array, ...]", update.pair(shape) or (update.delta(shape).reshape(shape[0], -1),))
            value, squares = x, x * x
            for factor in reversed(factors):
                value, squares = factor @ value, np.maximum(factor * factor, self.least**2) @ squares
            answer.value += value
            answer.squares += squares * self.unit**2
        return answer

    def _change(self, updates: Sequence[Update], W: Array) -> _Answer:
        """Compute `W' - W` for updates that depend on the weight."""
        new = cast("torch.Tensor", W)
        for update in updates:
            new = update.new_weight(new)
        changed = cast("Array", new)
        return self._rounded((changed - W).reshape(len(W), -1), changed)

    def _rounded(self, value: Array, numbers: Array) -> _Answer:
        import numpy as np

        rounding = self.unit * float(np.abs(numbers).max(initial=0.0))
        # Use `*`, not `**`: if the square overflows, `**` raises OverflowError, but `*` returns infinity.
        return _Answer(value, np.full(value.shape, rounding * rounding))

    def _place(
        self, answers: dict[tuple[str, int], _Answer], key: tuple[str, int], target: Target, answer: _Answer
    ) -> None:
        import numpy as np

        start = 0 if target.rows is None else target.rows[0]
        size = (self._outputs, *answer.value.shape[1:])
        whole = answers.setdefault(key, _Answer(np.zeros(size), np.zeros(size)))
        whole.value[start : start + len(answer.value)] += answer.value
        whole.squares[start : start + len(answer.value)] += answer.squares

    @property
    def _outputs(self) -> int:
        """Return the weight's number of outputs. If all targets are slices of rows, return the last slice's end."""
        targets = (target for group in (self.asked, self.got) for target in group)
        return max(self._shape(t)[0] if t.rows is None else t.rows[1] for t in targets)

    def _shape(self, target: Target) -> tuple[int, ...]:
        from ..naming.binding import weight_shape

        every = [update for group in (self.asked, self.got) for update in _in_order(group)]
        for updates in (self.asked.get(target, ()), self.got.get(target, ()), every):
            shape = weight_shape(target, updates, self.base) if updates else None
            if shape is not None:
                return shape
        # VeRA and RandLoRA use slices of shared tensors, so they fit weights of many sizes. Use the largest size.
        for update in every:
            if (shape := update.largest_shape()) is not None:
                return shape
        # A method with one factor per input fits any number of outputs, and a method with one factor per output fits
        # any number of inputs. So choose an arbitrary size, 3.
        dims = [update.dims(target.stacked) for update in every]
        known = {axis: n for each in dims for axis, n in each.items() if axis in ("out", "in") and isinstance(n, int)}
        if known and all(isinstance(each.get("out"), int) or isinstance(each.get("in"), int) for each in dims):
            return known.get("out", 3), known.get("in", 3)
        why = f"the adapter's tensors do not determine the shape of the weight of {target}"
        raise UsageError(why, cure=PASS_BASE)


def _random(shape: tuple[int, ...]) -> Array:
    import numpy as np

    return np.random.default_rng(7).normal(size=shape)


def _values(leaf: Leaf) -> torch.Tensor:
    """Load a tensor as a numpy array, annotated as `torch.Tensor` because the methods' formulas are annotated so."""
    array = as_array(leaf)
    return cast("torch.Tensor", array.astype("<f8") if as_lazy(leaf).dtype.floating else array)


def _compared(ours: dict[tuple[str, int], _Answer], theirs: dict[tuple[str, int], _Answer]) -> str:
    import numpy as np

    for key in dict.fromkeys((*ours, *theirs)):
        # If only one group changes the weight or the bias, the other group's change is zero.
        known = ours.get(key) or theirs[key]
        none = _Answer(np.zeros_like(known.value), np.zeros_like(known.squares))
        one, other = ours.get(key, none), theirs.get(key, none)
        if one.value.shape != other.value.shape:
            return f"the shape of the {key[0]} is {list(other.value.shape)}, not {list(one.value.shape)}"
        a, b = one.value, other.value
        error = np.abs(a - b)
        # Squares of values above 1e154 overflow to infinity, and infinity times 0 is NaN. If an allowed error is
        # infinite or NaN, replace it with a fraction of the largest value.
        rounding = SIGMAS * np.sqrt(np.maximum(one.squares, other.squares))
        rounding = np.where(np.isfinite(rounding), rounding, UNSQUARED * np.abs(a).max(initial=0.0))
        allowed = rounding + ALONE * np.maximum(np.abs(a), np.abs(b)) + NOTHING
        if not ((error <= allowed) | (a == b) | (np.isnan(a) & np.isnan(b))).all():
            size, worst = float(np.nan_to_num(np.abs(a)).max()), float(np.nan_to_num(error).max())
            return (
                f"the change of the {key[0]} differs by {worst / size if size else math.inf:.1e}, "
                "relative to its largest value"
            )
    return ""


def _unlike_values(asked: list[Update], got: list[Update], unit: float, least: float) -> str:
    """Return the reason why two groups of output or context updates differ; empty if they are equal.

    If the methods differ, the virtual tokens are compared, because writers may replace a prompt network by its output.
    """
    if [update.method for update in asked] == [update.method for update in got]:
        return _unlike_fields(asked, got, unit, least)
    ours, theirs = _tokens(asked), _tokens(got)
    if ours is None or theirs is None:
        return f"the file has {' and '.join(update.method for update in got) or 'nothing'} instead"
    for place in dict.fromkeys((*ours, *theirs)):
        if place not in ours or place not in theirs:
            return f"the file {'has no' if place in ours else 'has unexpected'} virtual tokens ({place})"
        if not _near(ours[place], theirs[place], unit, least):
            return f"the values of {place} differ"
    return ""


def _tokens(updates: list[Update]) -> dict[str, Array] | None:
    """Return the virtual tokens by place: `embeddings`, `decoder_embeddings` or `past`.

    The tokens of several updates are concatenated in the updates' order. Return None if the virtual tokens are
    not fixed, for example because they depend on a task.
    """
    import numpy as np

    tokens: dict[str, list[Any]] = {}
    for update in updates:
        several = update.dims().get("tasks", 1) != 1
        if not isinstance(update, ContextUpdate) or update.place not in ("embeddings", "past") or several:
            return None
        values: Any = update.map(_values)
        for place in ("embeddings", "decoder_embeddings", "past"):
            if (each := getattr(values, place)()) is not None:
                tokens.setdefault(place, []).append(each)
    # In embeddings and in past keys and values, the second-to-last axis is the axis of the tokens.
    try:
        return {place: np.concatenate(each, axis=-2) for place, each in tokens.items()}
    except ValueError:
        return None


def _near(one: Array, other: Array, unit: float, least: float) -> bool:
    import numpy as np

    if one.shape != other.shape:
        return False
    return bool((np.abs(one - other) <= 2 * unit * np.maximum(np.abs(one), least)).all())


def _unlike_fields(asked: list[Update], got: list[Update], unit: float, least: float) -> str:
    """Return the reason why updates with equal methods differ; empty if they are equal."""
    for one, other in zip(asked, got, strict=True):
        if one.attributes != other.attributes:
            return "an attribute differs"
        if one.tensors.keys() != other.tensors.keys():
            return "the names of the tensors differ"
        for name, leaf in one.tensors.items():
            if not _near(*cast("tuple[Array, Array]", (_values(leaf), _values(other.tensors[name]))), unit, least):
                return f"the values of {name} differ"
    return ""

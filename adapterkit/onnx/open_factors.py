"""Slots for updates whose own tensors cannot be slots. The slots hold factors, scales and a bias.

Slots need default values that leave the base unchanged, and a formula that nodes can compute. Some updates lack one of
the two: DoRA divides by the norm of the changed weight, OFT solves a linear system, a saved module replaces a weight.
If the base's weight is known, such an update can be converted to a change of the weight (usually low-rank), a scale of
the outputs and a change of the bias; any of the three may be absent. If the change of the weight has full rank, the
adapter file becomes at least as large as the weights. The graph's default values stay small, because their rank is 0
or 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..core.updates import Additive, OutputUpdate, Update, WeightUpdate, tensor
from ..errors import Unsupported
from ..io.lazy import from_numpy
from .building import Array, Branch, Building
from .folding import part_of, seen_by
from .heads import in_packed
from .resolved import through, wide
from .values import Unsayable

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from ..core.adapter import Adapter, Target
    from ..core.updates.update import Layer as FormulaLayer
    from .reading import Base
    from .resolved import ResolvedTarget

FACTORS = ("A", "B", "s")
"""Fields of the slots. If an update changes a bias, the additional field `d` holds the change."""


class OpenFactors(Additive):
    """`y' = y + (y - b) * (s - 1) + B @ A @ x * s + d`, i.e. `W' = s * (W + B @ A)` and `b' = b + d`.

    If the layer's output `y` is not `W @ x + b` (`adds_more`), the formula computes `W @ x` itself instead of using
    `y - b`; see `computes_apart`.
    """

    A: Tensor = tensor("r in *k")
    B: Tensor = tensor("out r")
    s: Tensor = tensor("out")
    d: Tensor | None = tensor("out", optional=True)
    adds_more: bool = False

    neutral: ClassVar[Mapping[str, float]] = {"A": 0.0, "B": 0.0, "s": 1.0, "d": 0.0}

    @property
    def changes_bias(self) -> bool:
        return self.d is not None

    def forward(self, x: Tensor, layer: FormulaLayer) -> Tensor:
        y, b = layer(x), layer.bias
        core = layer.op(x, layer.weight) if self.adds_more else y if b is None else y - layer.per_channel(b)
        h = layer.mix(layer.op(x, self.A), self.B)
        out = y + core * layer.per_channel(self.s - 1) + h * layer.per_channel(self.s)
        return out if self.d is None else out + layer.per_channel(self.d)

    def new_weight(self, W: Tensor) -> Tensor:
        V = W.reshape(W.shape[0], -1) + self.B @ self.A.reshape(self.A.shape[0], -1)
        return (V * self.s[:, None]).reshape(W.shape)

    def bias_delta(self) -> Tensor | None:
        return self.d


def template(update: Update, place: ResolvedTarget) -> OpenFactors | None:
    """Return factors that change nothing, with the shapes of an update's slots.

    Return None if factors cannot express the update. Factors can only express updates that change a layer's weight or
    bias.
    """
    if isinstance(update, OutputUpdate) or place.turned or not place.spots or getattr(update, "asks", None):
        return None
    rows = place.target.rows
    out = place.shape[0] if rows is None else rows[1] - rows[0]
    A, into = update.tensors.get("A"), place.shape[1:] or (1,)  # The weight of a norm is a vector.
    rank = min(out, math.prod(into)) if A is None or _factors_of(update) is None else A.shape[0]
    # Broadcast a single zero, because only the shapes of these arrays are read.
    arrays_by_name: dict[str, Array] = {
        "A": np.broadcast_to(0.0, (rank, *into)), "B": np.broadcast_to(0.0, (out, rank)), "s": np.ones(out),
    }  # fmt: skip
    if update.changes_bias:
        arrays_by_name["d"] = np.zeros(out)
    return _open_factors(arrays_by_name)


def _open_factors(arrays_by_name: Mapping[str, Array]) -> OpenFactors:
    leaves: dict[str, Any] = {name: from_numpy(array) for name, array in arrays_by_name.items()}
    return OpenFactors(**leaves)


def _factors_of(update: Update) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor] | None] | None:
    """Return the update's function that computes scales and factors from a weight; None if it has no such function."""
    if not isinstance(update, WeightUpdate) or type(update).scaled_factors is WeightUpdate.scaled_factors:
        return None
    return update.scaled_factors


def is_worked_out(update: Update, fields: Mapping[str, str]) -> bool:
    """Whether the slots of an update hold factors that are computed from the base's weight."""
    return {*FACTORS} <= {*fields} and not isinstance(update, OpenFactors)


def worked_out(
    model: ir.Model, adapter: Adapter, target: Target, named: Target, base: Base | None
) -> list[OpenFactors]:  # fmt: skip
    """Return a list of one element: the factors of a target's update, computed from the weight of the graph's layer.

    Args:
        model: the graph with slots.
        adapter: the adapter.
        target: the target, with its name in the adapter.
        named: the target, with its name in the graph's list of slots.
        base: the base's weights.

    Raises:
        TargetNotFound: the graph has no such layer.
        Unsupported: the target has several updates. The factors of the second update would depend on the weight that
            the first update changed.
    """
    from ..io.checkpoint import opened as opened_base
    from .resolving import by_name, resolve, spots_of
    from .tying import Tying

    packed = in_packed(named, by_name(spots_of(model)))
    whole = adapter.replace(updates={target if packed is named else packed: adapter.updates[target]})
    held_by = None if base is None else opened_base(base)
    # If the target's name contains `encoder` in the adapter but not in the graph, the graph holds only the encoder. The
    # same is true for `decoder`.
    omitted = {"encoder", "decoder"} & ({*target.path.split(".")} - {*named.path.split(".")})
    tying = replace(Tying.of(held_by, None), role=next(iter(omitted), None))
    (place, *_) = resolve(model, whole, held_by, tying)
    if place.target.stacked:
        from .selected import stack_factors

        return [_open_factors(stack_factors(place))]
    update, *more = place.updates
    if more:
        methods = ", ".join(update.method for update in place.updates)
        raise Unsupported(
            f"the updates of one target ({methods}) cannot share slots",
            where=str(target),
            cure="Inject the adapter with --mode constant (mode='constant')",
        )
    spot = place.spots[0]
    norm = place.norm
    weight = seen_by(spot.kind.stored_array(spot.node).astype(np.float64), spot) if norm is None else norm.weight
    W = part_of(weight, place)
    bias = spot.kind(spot.node, Branch(Building(model), "bias")).bias if update.changes_bias and norm is None else None
    b = (None if norm is None else norm.bias) if bias is None else bias.numbers().astype(np.float64)
    rows = place.target.rows
    return [_factors(place, W, b if b is None or rows is None else b[slice(*rows)])]


def _factors(place: ResolvedTarget, W: Array, b: Array | None) -> OpenFactors:
    (update,) = place.updates
    factors: dict[str, Array] = {}
    f: Any = _factors_of(wide(update))
    scaled = None if f is None else f(W)
    after, new_b = through(place, W, b)
    if scaled is not None:
        s, B, A = (np.asarray(one, np.float64) for one in scaled)
        factors = {"A": A.reshape(len(A), *W.shape[1:]), "B": B, "s": s}
    else:
        D, out, into = after - W, W.shape[0], math.prod(W.shape[1:])
        short = out <= into
        factors = {
            "A": D if short else np.eye(into).reshape(into, *(W.shape[1:] or (1,))),
            "B": np.eye(out) if short else D.reshape(out, -1), "s": np.ones(out),
        }  # fmt: skip
    if update.changes_bias:
        if b is None and not isinstance(update, Additive):
            raise Unsayable("the update changes a bias that the layer does not have")
        added = update.bias_delta() if isinstance(update, Additive) else None
        factors["d"] = new_b - b if b is not None else np.asarray(added, np.float64)
    return _open_factors(factors)

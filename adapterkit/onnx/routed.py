"""Map an adapter's targets in experts to the single experts inside a graph's `MoE` and `QMoE` nodes; see experts.py.

An adapter changes single experts, such as `mlp.experts.3.gate_proj`, or stacks of experts, such as
`mlp.experts.gate_up_proj`. Updates of a stack are split into updates of single experts. The architecture file of the
model's family shows which weights are fused in a stack, and in which order the stack stores these weights' rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..core.metadata import model_types_of
from ..errors import USE_EXPORTED_BASE, USE_ITS_BASE, ShapeMismatch, TargetNotFound, Unsupported
from ..io.arrange import item
from ..io.inputs import decimal_number
from ..io.lazy import as_array
from ..naming.architectures import Architecture, WeightPlace, architecture_of
from ..naming.binding.moving import moved
from ..naming.moves import Move, NamesByEnd, PathPart
from .experts import LAYER, ExpertStack, holds_experts, layer_of, path_of, stacks_of, stem_of, unknown_layout
from .operands import nodes_of
from .reading import GENAI_TYPE
from .resolved import NEAR

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..core.adapter import Adapter, Target
    from ..core.updates import Update
    from ..io.checkpoint import Checkpoint
    from .building import Array
    from .resolved import ResolvedTarget

TYPES = {"gptoss": "gpt_oss", "qwen3_5_moe_text": "qwen3_5_moe"}
"""A map from a model type in onnxruntime-genai to the model type in transformers, for models whose two types differ."""

PARTS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj", "w1": "gate_proj", "w3": "up_proj",
         "w2": "down_proj"}  # fmt: skip
"""A map from the name of an expert's weight in a base model to the weight's name in a graph, for base models that store
gate, up and down as separate weights."""

FAMILY = "adapterkit.model_type"
"""Metadata key of a graph that has slots and experts. Its value is the model type; see `remember_family`."""

Config = Mapping[str, object] | None


@dataclass(frozen=True, slots=True)
class _Reading:
    """The weight that a target's path refers to, in one expert or in all experts.

    Attributes:
        part: the weight's name in a graph: one of the values of `PARTS`, or `gate_up_proj` for gate and up together.
        expert: the index of the expert; None if the target is a stack of all experts.
        rows: the rows of the target that belong to this weight; None if all rows belong to it.
    """

    part: str
    expert: int | None
    rows: PathPart | None


def by_expert(
    adapter: Adapter, model: ir.Model, config: Config, refused: list[Target] | None = None
) -> tuple[Adapter, dict[Target, Target]]:
    """Rename targets in experts to the graph's names, and split updates of stacks into updates of single experts.

    A target is renamed only if the experts of its layer are in a `MoE` or `QMoE` node of the graph, or in the nodes
    that replace such a node in a graph with slots.

    Args:
        adapter: the adapter.
        model: the graph.
        config: the base's config, whose `model_type` selects the family.
        refused: a list that receives the targets whose experts cannot be changed in the graph; the result does not
            contain these targets. If `refused` is None, such a target raises `Unsupported`.

    Returns:
        the adapter with the new targets, and a map. The map's keys are the new targets. The map's value for a new
        target is the target in `adapter` that the new target replaces.

    Raises:
        Unsupported: the experts of a target cannot be changed in the graph, for example because the layout of the
            node's weights or the model's family is unknown.
        ShapeMismatch: the adapter and the graph have different numbers of experts.
    """
    nodes = [node for node in nodes_of(model) if holds_experts(node)]
    if not nodes:
        return adapter, {}
    stacks, model_type = stacks_of(nodes), _type_of(adapter, config, model)
    family = None if model_type is None else architecture_of({"model_type": model_type})
    updates: dict[Target, tuple[Update, ...]] = {}
    whole: dict[Target, Target] = {}
    for target, given in adapter.updates.items():
        number = layer_of(target.path)
        readings = () if number is None else _readings(target.path, family)
        named = "experts" in target.path.split(".")
        if number is None or not (readings or named) or not _in_layer(nodes, number):
            updates[target] = given
            continue
        try:
            stack = stacks.get(number)
            if stack is None:
                node = next(node for node in nodes if (stem := stem_of(node)) and layer_of(stem) == number)
                raise _refused(target, node, unknown_layout(node) or "no name in the graph shows the node's layer")
            _check(target, given, stack, readings, model)
        except Unsupported:
            if refused is None:
                raise
            refused.append(target)
            continue
        moves = [move for reading in readings for move in _moves(reading, stack)]
        for _, there, part in moved({target: given}, {target.path: tuple(moves)}, {}):
            updates[there] = (*updates.get(there, ()), *part)
            whole[there] = target
    return adapter.replace(updates=updates), whole


def compare_experts(places: Sequence[ResolvedTarget], whole: Mapping[Target, Target], base: Checkpoint) -> None:
    """Check that the experts in a graph have the base's weights.

    A target's weight in the base is found by the target's path in the adapter.

    Args:
        places: the targets of an adapter, found in the graph.
        whole: the map that `by_expert` returned, from each new target to the adapter's target.
        base: the weights that the graph was exported from.

    Raises:
        TargetNotFound: an expert's weight differs from the base's weight by more than quantization explains.
    """
    read: dict[tuple[str, int], Array] = {}
    by_path: dict[str, list[str]] = {}
    for name in base.tensors:
        by_path.setdefault(name.removesuffix(".weight"), []).append(name)
    paths = NamesByEnd(by_path)
    weights: dict[tuple[ir.Node, object], Array] = {}
    for place in places:
        asked = whole.get(place.asked)
        if asked is None or place.target.rows is None:
            continue
        names = [name for path in paths.of(asked.path) for name in by_path[path]]
        if len(names) != 1 or not base.tensors[names[0]].dtype.floating:
            continue
        number, spot = int(place.target.path.split(".")[-2]), place.spots[0]
        if (names[0], number) not in read:
            tensor = base.tensors[names[0]]
            stored = item(tensor, number) if len(tensor.shape) == 3 else tensor
            read[names[0], number] = as_array(stored).astype(np.float32)
        if (spot.node, spot.kind) not in weights:
            weights[spot.node, spot.kind] = spot.kind.stored_array(spot.node).astype(np.float32)
        first, stop = spot.rows or place.target.rows
        V, W = weights[spot.node, spot.kind][first:stop], read[names[0], number]
        half = [way for U in (W, W.T) for way in (U, U[: len(U) // 2], U[len(U) // 2 :], U[::2], U[1::2])]
        far = min((float(np.linalg.norm(V - U)) for U in half if U.shape == V.shape), default=float("inf"))
        if far > NEAR * max(float(np.linalg.norm(V)), 1e-30):
            why = f"expert {number} in the graph differs from the base's weight {names[0]}"
            raise TargetNotFound(why, where=str(asked), cure=USE_EXPORTED_BASE)


def _in_layer(nodes: Sequence[ir.Node], number: str) -> bool:
    return any((stem := stem_of(node)) is not None and layer_of(stem) == number for node in nodes)


def _check(
    target: Target, updates: Sequence[Update], stack: ExpertStack, readings: Sequence[_Reading], model: ir.Model
) -> None:
    if not readings:
        why = "the order of rows in this stack of experts depends on the model's family, which is unknown"
        cure = "Pass the model's folder, whose config.json names the family: --base-weights DIR (base_weights=DIR)"
        raise Unsupported(why, where=str(target), cure=cure)
    count = updates[0].dims(True).get("e") if target.stacked else stack.experts
    if count != stack.experts:
        why = f"the adapter has {count} experts, but the graph has {stack.experts}"
        raise ShapeMismatch(why, where=str(target), cure=USE_ITS_BASE)
    # onnxruntime-genai's builder multiplies Gemma 4's `down_proj` weights by one scale per expert. An adapter's change
    # would have to be multiplied by the same scale, which is not implemented.
    scale = f"{stack.stem}.moe.router.scale"
    if any(reading.part == "down_proj" for reading in readings) and scale in model.graph.initializers:
        raise _refused(target, stack.node, "the export multiplied each expert's down_proj by a scale")
    if not stack.fused and any(reading.part == "gate_proj" for reading in readings):
        raise _refused(target, stack.node, "these experts have no gate_proj")
    loose = [update.method for update in updates if update.changes_bias and target.stacked]
    if loose:
        raise _refused(target, stack.node, f"{loose[0]} changes a bias, but the experts' biases are in another stack")


def _refused(target: Target, node: ir.Node, why: str) -> Unsupported:
    """Return the error for a target that cannot be changed because its experts are inside a node."""
    text = f"the target's experts are inside the node {node.name or node.outputs[0].name} ({node.op_type}), and {why}"
    return Unsupported(text, where=str(target), cure=OTHERWISE)


OTHERWISE = (
    "Merge the adapter into the base (adapterkit merge BASE A -o OUT), and build the graph from the result; or omit "
    "such targets: --allow-partial (allow_partial=True)"
)
"""The cure in errors about targets that cannot be changed because they are inside a node."""


def remember_family(model: ir.Model, adapter: Adapter, config: Config) -> None:
    """Store the model type in a graph that has slots and experts.

    `fit` can then match other adapters with the slots, even if it finds no config.
    """
    kind = _type_of(adapter, config, model)
    if kind is not None and any(holds_experts(node) for node in nodes_of(model)):
        model.metadata_props[FAMILY] = kind


def _type_of(adapter: Adapter, config: Config, model: ir.Model) -> str | None:
    """Return the first known model type, searching the base's config, then the graph, then the adapter."""
    text = (config or {}).get("text_config")
    named = [(config or {}).get("model_type"), (config or {}).get(GENAI_TYPE)]
    named += [text.get("model_type")] if isinstance(text, Mapping) else []
    for kind in (*named, model.metadata_props.get(FAMILY), *model_types_of(adapter)):
        if isinstance(kind, str) and architecture_of({"model_type": TYPES.get(kind, kind)}) is not None:
            return TYPES.get(kind, kind)
    return None


def _readings(path: str, family: Architecture | None) -> tuple[_Reading, ...]:
    """Return the weights of experts that a target's path refers to.

    The result is empty if the path refers to no expert, or if the path refers to a stack and the family is unknown.
    Only the segments after the layer's number are compared, because the segments before it differ between the classes
    of a family.
    """
    layer = LAYER.match(path)
    inner = "" if layer is None else path[layer.end() :].strip(".")
    words = inner.split(".")
    expert = decimal_number(words[-2]) if len(words) > 2 and words[-3] == "experts" else None
    if expert is not None and words[-1] in PARTS:
        return (_Reading(PARTS[words[-1]], expert, None),)
    readings: dict[str, _Reading] = {}
    for weight in family.record.weights if family is not None else ():
        part = PARTS.get(weight.rpartition(".")[2])
        if family is None or part is None or "{e}" not in weight:
            continue
        for naming in family.namings:
            place = family.place(weight, naming)
            if place is not None and place.stacked and place.name.partition("{n}.")[2] == inner:
                readings.setdefault(part, _Reading(part, None, _rows(place)))
    if {reading.rows for reading in readings.values()} == {PathPart(0, 2), PathPart(1, 2)}:
        return (_Reading("gate_up_proj", None, None),)
    return tuple(readings.values())


def _rows(place: WeightPlace) -> PathPart | None:
    if place.part is None or place.of is None:
        return None
    return PathPart(place.part, place.of, place.interleaved)


def _moves(reading: _Reading, stack: ExpertStack) -> list[Move]:
    if reading.expert is not None:
        return [Move(path_of(stack.stem, reading.expert, reading.part))]
    return [
        Move(path_of(stack.stem, expert, reading.part), take=reading.rows, expert=expert)
        for expert in range(stack.experts)
    ]

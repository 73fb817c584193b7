"""Add Shadow's side network to a graph, and pass the network's state from block to block.

torch's exporter traces the network, whose class and sizes come from the base's `config.json`. The network reads the
graph's inputs. If the graph has a past, each call passes the past's tokens to the network again, because the cache
does not contain the network's states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx_ir as ir

from ..errors import Malformed, TargetNotFound, Unsupported, UsageError, first_line
from .building import Branch, Copies, between, copied, element_type
from .modules import module_at, modules_of
from .operands import input_behind
from .reading import config_of
from .resolving import spots_of
from .tokens import (
    CALL,
    EMBEDS,
    MASK,
    POSITIONS,
    TOKENS,
    every_position,
    every_token,
    of_call,
    past_inputs,
    whole_numbers,
)
from .values import Sizes, Value, plain

if TYPE_CHECKING:
    from torch import nn

    from ..io.lazy import Leaf
    from ..methods.shadow import Shadow
    from .calls import CallWords, Heard
    from .layers import GraphLayer
    from .outlets import Ended
    from .pretrained_types import PretrainedModel

SHADOW = "shadow"

Fixed = tuple[int, int] | None
"""The numbers of rows and positions, if they are the same in every call; None if they are dynamic."""


class Shadows:
    """Adds Shadow's side network to a graph, and keeps the network's state for the next block.

    Args:
        words: the inputs of the model's call.
        config: returns the base's config, from which the network is created.
    """

    def __init__(self, words: CallWords, config: Callable[[], Mapping[str, object]] | None) -> None:
        self.words, self.config = words, config
        self.value = words.input(SHADOW)
        self.waiting: tuple[Branch, ir.Value, ir.Value] | None = None

    def reached(self, update: Shadow, heard: Heard) -> ir.Value:
        """Return the state that a block gets.

        A block gets the state from the previous block. The first block gets the graph's input for `shadow`; if the
        graph has no such input, the first block gets the network's output.
        """
        if self.waiting is not None:
            branch, y, state = self.waiting
            last, self.waiting, self.value = y.producer(), None, state
            assert last is not None
            assert last.graph is not None
            last.graph.insert_after(last, branch.waiting([state]))
            branch.close()
        return self.value if self.value is not None else _network(update, heard, self._model())

    def close(self) -> None:
        """Drop the last block's state, because there is no next block that reads it."""
        if self.waiting is not None:
            self.waiting[0].close()
            self.waiting = None

    def _model(self) -> PretrainedModel:
        """Create the side network: a model of the base's architecture, without weights."""
        if find_spec("transformers") is None:
            cure = "pip install 'adapterkit[transformers]'"
            raise UsageError("creating the side network needs transformers, which is not installed", cure=cure)
        config = config_of(None, None) if self.config is None else self.config()
        auto, torch = import_module("transformers.models.auto"), import_module("torch")
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in auto.CONFIG_MAPPING:
            raise Unsupported(
                f"transformers has no model type {kind!r}, which the side network needs",
                cure="Install a newer transformers",
            )
        from .tracing import quiet

        try:
            # The adapter contains the network's weights, so create the model on the meta device, which uses no memory.
            with quiet(), torch.device("meta"):
                model: PretrainedModel = auto.AutoModel.from_config(auto.CONFIG_MAPPING[kind].from_dict(dict(config)))
                return model
        except Exception as error:  # transformers raises many types of errors for bad configs.
            why = f"transformers cannot create a model from the base's config.json ({first_line(error)})"
            raise Malformed(why, cure="Download the base's config.json again") from error


class State:
    """Gives the network's state to a block's update, and passes the new state to the next block; see `OutputUpdate`."""

    def __init__(self, shadows: Shadows, heard: Heard) -> None:
        self.shadows, self.heard = shadows, heard
        self.kept: Value | None = None

    def state(self, update: Shadow) -> Value:
        """Return the state that the block gets, in the dtype of the block's input `x`.

        If `x` has three axes, and the state's width is unknown or equals the width of `x`, then the state is declared
        with all sizes of `x`. Otherwise, only the state's width is declared.
        """
        x, branch = self.heard.layer.x, self.heard.layer.branch
        value = self.shadows.reached(update, self.heard)
        width = None if value.shape is None else value.shape[-1]
        sizes = x.shape if x.ndim == 3 and width in (None, x.shape[-1]) else (None, None, width)
        return Value(branch, cast(Sizes, sizes), element_type(value), value).cast(x.dtype)

    def keep(self, value: Value) -> None:
        """Store the state for the next block."""
        self.kept = value

    def hand_on(self, y: ir.Value) -> bool:
        """Pass the stored state (see `keep`) to the next block; return False if no state was stored.

        Args:
            y: the block's output, after which the state's nodes are inserted.
        """
        if self.kept is None:
            return False
        self.shadows.waiting = self.heard.layer.branch, y, self.kept.value
        return True


def _network(update: Shadow, heard: Heard, model: PretrainedModel) -> ir.Value:
    """Append the network's nodes to the block's branch; return the network's output for the call's tokens."""
    given, branch = _given(update, heard), heard.layer.branch
    traced = _traced(model, update, heard.layer, given, _fixed(given, branch.building.model))
    # Give the graph the operator sets that it lacks.
    operators = branch.building.model.graph.opset_imports
    for domain, version in traced.opset_imports.items():
        if (known := operators.setdefault(domain, version)) != version:
            why = f"the side network needs operator set {version} of {domain or 'ONNX'}, but the graph has {known}"
            raise Unsupported(why, cure="Export the graph with a newer operator set")
    copies: Copies = dict(zip(traced.graph.inputs, given.values(), strict=True))
    for path, value in traced.graph.initializers.items():
        assert value.const_value is not None
        key = SHADOW, branch.building.keep(update.network), path
        copies[value] = branch.building.tensor(key, f"shadow.{path}", value.const_value.numpy)
    name = branch.building.name
    branch.nodes += copied(list(traced.graph), copies, lambda wanted: name(f"{branch.name}/network/{wanted}"))
    return of_call(copies[traced.graph.outputs[0]], heard.words, branch, _rows_of(heard))


def _traced(
    model: PretrainedModel, update: Shadow, layer: GraphLayer | Ended, given: Mapping[str, ir.Value], sizes: Fixed
) -> ir.Model:
    """Trace the network into a separate graph. If `sizes` is None, the graph has dynamic sizes."""
    import torch

    from ..torch.call_recorder import Standing
    from .tracing import traced

    kind: torch.dtype = getattr(torch, layer.dtype.name)

    def known(value: Leaf) -> torch.Tensor:
        numbers = cast(Value, value).known  # The update's tensors are graph values here.
        assert numbers is not None
        return torch.tensor(numbers()).to(kind)

    embedded = update.map(known)
    network = Standing(cast("nn.Module", model), embedded, list(given)).eval()
    width = model.get_input_embeddings().weight.shape[1]
    # For dynamic sizes, use two rows and three positions, because torch treats a size of 1 as fixed. Create one tensor
    # per input, because torch would merge two inputs that get the same tensor.
    rows, length = sizes or (2, 3)
    examples = [
        torch.zeros(rows, length, width, dtype=kind) if name == EMBEDS else torch.ones(rows, length, dtype=torch.int64)
        for name in given
    ]
    is_open = (tuple(dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC) for _ in examples),)
    options: dict[str, Any] = {"dynamic_shapes": None if sizes else is_open, "opset_version": layer.branch.opset}
    return traced(network, examples, inside="network", **options)


def _fixed(given: Mapping[str, ir.Value], model: ir.Model) -> Fixed:
    """Return the numbers of rows and positions, if the graph has no past and all inputs have the same fixed sizes.

    Fixed sizes have two advantages: tracing is three times as fast as with dynamic sizes, and devices that do not
    support dynamic sizes can run the graph.
    """
    if past_inputs(model.graph) or any(value.shape is None for value in given.values()):
        return None
    shapes = {tuple(size if isinstance(size, int) else None for size in (value.shape or ()))[:2]
             for value in given.values()}  # fmt: skip
    if len(shapes) != 1:
        return None
    sizes = shapes.pop()
    return None if len(sizes) < 2 or sizes[0] is None or sizes[1] is None else (sizes[0], sizes[1])


def _given(update: Shadow, heard: Heard) -> dict[str, ir.Value]:
    """Return a map from the names of the network's inputs to values of the graph.

    If the graph has a past, these values cover the tokens of the past and of the call.
    """
    words, graph = heard.words, heard.words.building.model.graph
    given = {name: value for name in CALL if (value := words.input(name)) is not None}
    past = past_inputs(graph)
    known = {*given.values(), *past.values(), *words.new_inputs.values()}
    for value in graph.inputs:
        if value not in known and not value.is_initializer():
            why = f"the graph's input {value.name} is not an input of the side network"
            cure = (
                "If the graph only uses another name for an input of the network, map the name, e.g. "
                f"--call {MASK}={value.name} (call={{{MASK!r}: {value.name!r}}})"
            )
            raise Unsupported(why, cure=cure)
    return _tokens(update, heard, given, bool(past)) | _beside(heard, given)


def _tokens(update: Shadow, heard: Heard, given_inputs: Mapping[str, ir.Value], past: bool) -> dict[str, ir.Value]:
    if EMBEDS in given_inputs:
        if past:
            raise Unsupported(
                "the side network needs the past's tokens, but the graph's inputs are embeddings",
                cure="Export the model without past keys and values",
            )
        return {EMBEDS: given_inputs[EMBEDS]}
    ids = every_token(heard.words, heard.layer.branch)
    return {EMBEDS: _embedded(ids, given_inputs[TOKENS], heard)} if update.shared_embeddings else {TOKENS: ids}


def _embedded(ids: ir.Value, own_ids: ir.Value, heard: Heard) -> ir.Value:
    """Return the embeddings of the token ids `ids`.

    `own_ids` are the token ids that the graph embeds. If `ids` is a different value, the nodes of the base's embedding
    are copied, and the copy embeds `ids`.
    """
    building, branch = heard.words.building, heard.layer.branch
    end = _embedding(own_ids, heard)
    if ids is own_ids:
        return building.now(end)
    nodes = between(own_ids, end, list(building.model.graph))
    copies: Copies = {own_ids: ids}
    branch.nodes += copied(nodes, copies, lambda name: building.name(f"{branch.name}/{name}"))
    return copies[end]


def _embedding(ids: ir.Value, heard: Heard) -> ir.Value:
    """Return the output of the module that embeds the graph's tokens."""
    model, width = heard.words.building.model, heard.layer.x.shape[-1]
    spots = [spot for spot in spots_of(model) if spot.kind.op_type == "Gather" and spot.shape[0] == width]
    nodes_found = [spot.node for spot in spots if input_behind(spot.node.inputs[1]) is ids]
    if len(nodes_found) != 1:
        why = f"the graph must have exactly one layer that embeds its token ids, but it has {len(nodes_found)}"
        raise TargetNotFound(why, cure=_EXPORT)
    inside = modules_of(nodes_found[0])
    return module_at(model, inside[-1], inside[-1]).given(width, inside[-1]) if inside else nodes_found[0].outputs[0]


def _beside(heard: Heard, given_inputs: Mapping[str, ir.Value]) -> dict[str, ir.Value]:
    """Return the attention mask and the positions, if the graph has inputs for them."""
    given = {}
    for name in (MASK, POSITIONS):
        if name in given_inputs and (given_inputs[name].shape is None or len(given_inputs[name].shape or ()) != 2):
            raise Unsupported(f"the input for {name} is not a matrix", where=given_inputs[name].name, cure=_EXPORT)
        if name in given_inputs:
            given[name] = whole_numbers(given_inputs[name], heard.layer.branch)
    if POSITIONS in given:
        given[POSITIONS] = every_position(heard.words, heard.layer.branch, given[POSITIONS], _rows_of(heard))
    return given


def _rows_of(heard: Heard) -> Value:
    """Return an integer matrix `[rows, positions]` with one entry for each token of the call, without the past."""
    ids = heard.words.input(TOKENS)
    rows: Value = (heard.layer.x[..., 0] if ids is None else plain(ids, heard.layer.branch)).cast(np.int64)
    return rows


_EXPORT = "Export the model again with torch's exporter"

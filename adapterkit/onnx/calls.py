"""Provide the model inputs that formulas read, such as the token ids.

A formula may read all tokens, but a graph with cached keys and values only gets the new tokens. For such a formula, the
graph gets an extra input for the ids of the cached tokens. The formula then reads the cached and the new tokens' ids;
see tokens.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported, UsageError
from .building import Branch, Building, Copies, between, copied, element_type
from .layers import GraphLayer, MatMul
from .resolving import spots_of
from .shadows import SHADOW, Shadows, State
from .tokens import (
    CALL,
    EARLIER,
    MASK,
    POSITIONS,
    TOKENS,
    every_position,
    every_token,
    first_axis,
    last_columns,
    of_call,
    past_inputs,
    whole_numbers,
)
from .values import SYMBOLS, Value, plain

if TYPE_CHECKING:
    from ..io.strict_json import JsonValue
    from .outlets import Ended
    from .tokens import Size


# Copy the nodes that compute the last layer's output, to also compute this output without the adapter.
# The copy reads the same stored tensors. It does not use the cached keys and values, because these were computed with
# the adapter; instead, it runs on all tokens, including the tokens of the past.


WORD = "hidden_states"

KNOWN = ("last_hidden_state", WORD)
"""Names of graph outputs that hold the last layer's output."""


def first_pass(words: CallWords, output_name: str | None) -> ir.Value:
    """Copy the nodes that compute the last layer's output, and return the output of the copy.

    If the copy also runs on cached tokens, only the part for the tokens in `input_ids` is returned.

    Args:
        words: the inputs of the call. The graph must not have been changed yet.
        output_name: the name of the last layer's output. If None, use the graph output with a name in `KNOWN`, or else
            the input of the layer that computes `logits`.

    Raises:
        UsageError: the graph has no value named `output_name`; or `output_name` is None, and the graph does not show
            which value is the last layer's output.
        Unsupported: a node that must be copied has a subgraph; or the graph has cached keys and values, and one of its
            other inputs has no values for the cached tokens.
    """
    building, graph = words.building, words.building.model.graph
    value, branch = _last(building.model, output_name), Branch(building, _NAME)
    copies = _without_past(words, branch) if past_inputs(graph) else {}
    branch.nodes += copied(between(None, value, list(graph)), copies, lambda name: building.name(f"{_NAME}/{name}"))
    end, ids = copies.get(value, value), words.input(TOKENS)
    if ids is not None:
        end = of_call(end, words, branch, plain(ids, branch))
    # Insert the copy at the start of the graph, because new nodes at any position of the graph may read its result.
    graph.insert_before(graph[0], branch.nodes)
    return end


def _without_past(words: CallWords, branch: Branch) -> Copies:
    """Return a map from graph inputs to the values that the copied nodes read instead.

    The new token ids and positions cover all tokens. The new cached keys and values are empty.
    """
    copies: Copies = {value: _emptied(value, branch) for value in past_inputs(words.building.model.graph).values()}
    ids, positions, mask = (words.input(name) for name in (TOKENS, POSITIONS, MASK))
    tokens = every_token(words, branch)
    assert ids is not None
    for value in words.building.model.graph.inputs:
        if value not in copies and value not in (ids, positions, mask) and not value.is_initializer():
            why = f"the adapter reruns the model on cached tokens, but the input {value.name} has no values for them"
            raise Unsupported(why, cure="Export the model without past keys and values")
    copies[ids] = _like(tokens, ids, branch)
    if positions is not None:
        ids_here = plain(ids, branch).cast(np.int64)
        copies[positions] = _like(every_position(words, branch, positions, ids_here), positions, branch)
    return copies


def _emptied(value: ir.Value, branch: Branch) -> ir.Value:
    """Return an empty slice of cached keys or values, with the shape `[rows, heads, 0, width]`."""
    zero, two = (branch.building.literal(np.array([n], dtype=np.int64)) for n in (0, 2))
    empty = branch.node("Slice", [value, zero, zero, two], None, element_type(value), None)
    empty.shape = None if value.shape is None else ir.Shape([*value.shape[:2], 0, *value.shape[3:]])
    return empty


def _like(value: ir.Value, other: ir.Value, branch: Branch) -> ir.Value:
    """Cast the integer matrix `value` to the dtype of `other`."""
    return plain(value, branch).cast(element_type(other)).value


def _last(model: ir.Model, output_name: str | None) -> ir.Value:
    values = {out.name: out for node in model.graph for out in node.outputs}
    if output_name is not None:
        if output_name not in values:
            raise UsageError(
                f"the graph has no value {output_name}",
                where=f"call: {WORD}",
                cure=f"Pass the name of a node's output: --call {WORD}=NAME (call=)",
            )
        return values[output_name]
    for out in model.graph.outputs:
        if out.name in KNOWN:
            return out
    heads = [spot for spot in spots_of(model) if issubclass(spot.kind, MatMul) and _is_head(spot.node)]
    if len(heads) == 1 and heads[0].node.inputs[0] is not None:
        return heads[0].node.inputs[0]
    why = "the graph does not show which value is the output of its last layer"
    raise UsageError(why, where=f"call: {WORD}", cure=f"Name the value: --call {WORD}=NAME (call={{{WORD!r}: NAME}})")


def _is_head(node: ir.Node) -> bool:
    """Whether a node's output is the graph output `logits`, directly or after Add, Cast and Identity nodes."""
    value = node.outputs[0]
    while not value.is_graph_output():
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type not in ("Add", "Cast", "Identity"):
            return False
        value = uses[0].node.outputs[0]
    return value.name == "logits"


_NAME = "adapterkit/first_pass"


# Some formulas read inputs of the model's call (see `OutputUpdate`). The code below finds these inputs in the graph.
# Graphs of language models have inputs named `input_ids` and `attention_mask`. If a graph's input has another name, the
# caller passes this name. If the graph has no input `task_ids`, one is added. `hidden_states`, the last layer's output
# without the adapter, is computed by `first_pass`.


TASKS, LAST = "task_ids", "hidden_states"


class CallWords:
    """Finds the model inputs that updates read, such as the token ids, in a graph.

    Args:
        building: collects the changes to the model. The graph must not have been changed yet.
        updates: the updates. An update's `asks` and `hears` contain the names of the inputs that the update reads.
        given: a map from the name that `OutputUpdate` uses for an input to the name of a graph value. `task_ids` may
            also map to an integer, the index of one task for all rows.
        config: returns the base's `config.json`. It is needed by formulas that run a side network with the base's
            architecture.

    Raises:
        UsageError: `given` contains an input that no update reads, or the name of a value that the graph lacks.
        Unsupported: the graph lacks an input that an update reads.
    """

    def __init__(
        self, building: Building, updates: Iterable[object], given: Mapping[str, JsonValue] | None = None,
        config: Callable[[], Mapping[str, object]] | None = None,
    ) -> None:  # fmt: skip
        self.building, self.stated = building, dict(given or {})
        asked = {word for update in updates for kind in ("asks", "hears") for word in getattr(update, kind, ())}
        # Side networks and first passes read all inputs in `CALL`. If an update needs a side network or a first pass,
        # `given` may rename any input in `CALL`.
        asked |= set(CALL) if asked & {SHADOW, LAST} else set()
        for word, value in self.stated.items():
            if word not in asked:
                raise UsageError(
                    f"no update reads {word}",
                    where="call",
                    cure=f"Omit --call {word} (call=). The updates read: {', '.join(sorted(asked)) or 'nothing'}",
                )
            if not isinstance(value, str) and not (word == TASKS and type(value) is int and value >= 0):
                cure = (
                    f"Pass the name of a graph value: --call {word}=NAME (call=); {TASKS} may also be a task's number"
                )
                raise UsageError(f"{value!r} is not a valid value for {word}", where=f"call: {word}", cure=cure)
        self.new_inputs: dict[str, ir.Value] = {}
        last = self.stated.get(LAST)
        self.hidden = first_pass(self, last if isinstance(last, str) else None) if LAST in asked else None
        self.shadows = Shadows(self, config)

    @property
    def note(self) -> str:
        """A note about the inputs that were added to the graph. Every run of the graph must pass these inputs."""
        meanings = {TASKS: "a task's number for each row", EARLIER: "the token ids of the past, without new tokens"}
        return "; ".join(f"the input {value.name} takes {meanings[word]}" for word, value in self.new_inputs.items())

    def at(self, layer: GraphLayer | Ended) -> Heard:
        """Return the inputs of the call for the formula of `layer`."""
        return Heard(self, layer)

    def input(self, word: str) -> ir.Value | None:
        """Return the graph input named `given[word]`; if `given` lacks this key, the graph input named `word`.

        Return None if `given[word]` is an integer, or if `given` lacks this key and the graph has no input `word`.

        Raises:
            UsageError: the graph has no input with the name `given[word]`.
        """
        name = self.stated.get(word, word)
        if not isinstance(name, str):
            return None
        existing = next((value for value in self.building.model.graph.inputs if value.name == name), None)
        if existing is None and word in self.stated:
            raise UsageError(
                f"the graph has no input {name}",
                where=f"call: {word}",
                cure=f"Pass the name of an input: --call {word}=NAME (call=)",
            )
        return existing

    def new(self, word: str, axes: Sequence[Size]) -> ir.Value:
        """Return a new integer input of the graph; a later call with the same `word` returns the same input."""
        if word not in self.new_inputs:
            kind = ir.TensorType(ir.DataType.INT64)
            value = ir.Value(name=self.building.name(word), shape=ir.Shape(axes), type=kind)
            self.building.inputs.append(value)
            self.new_inputs[word] = value
        return self.new_inputs[word]


class Heard:
    """The model inputs that a layer's formula reads from `layer.call`.

    Args:
        words: the inputs of the call.
        layer: the layer whose formula reads the inputs.
    """

    def __init__(self, words: CallWords, layer: GraphLayer | Ended) -> None:
        self.words, self.layer = words, layer
        self.shadow = State(words.shadows, self)

    def __getitem__(self, word: str) -> State | Value:
        if word == SHADOW:
            return self.shadow
        formula = {TOKENS: self._tokens, TASKS: self._tasks, LAST: self._last}.get(word)
        if formula is None:
            why = f"the update's formula reads {word} from the model's call, but a graph cannot provide {word}"
            raise Unsupported(why, cure="Keep the adapter in the torch model")
        return formula()

    def get(self, word: str) -> Value | None:
        """Return the optional input `word` as a mask, `[rows, positions]`.

        Return None if the graph has no such input, or if `_mask` returns None.
        """
        value = self.words.input(word)
        return None if value is None else self._mask(value)

    def _tokens(self) -> Value:
        return self._value(every_token(self.words, self.layer.branch))

    def _value(self, ids: ir.Value) -> Value:
        return Value(self.layer.branch, (self._rows, None), np.int64, ids)

    @property
    def _rows(self) -> int | None:
        rows: int | None = self.layer.x.shape[0]
        return rows

    def _tasks(self) -> Value:
        given_tasks = self.words.stated.get(TASKS)
        if isinstance(given_tasks, int):
            return self._for_all_rows(given_tasks)
        existing = self.words.input(TASKS)
        given = self.words.building.model.graph.inputs[0]
        value = (
            self.words.new(TASKS, [first_axis(given)])
            if existing is None
            else whole_numbers(existing, self.layer.branch)
        )
        return Value(self.layer.branch, (self._rows,), np.int64, value)

    def _for_all_rows(self, number: int) -> Value:
        node, literal = self.layer.branch.node, self.layer.branch.building.literal
        sizes = node("Shape", [self.layer.x.value], None, np.int64, None)
        first, second, task = (literal(np.array([each], dtype=np.int64)) for each in (0, 1, number))
        rows = node("Slice", [sizes, first, second], None, np.int64, (1,))
        value = node("Expand", [task, rows], None, np.int64, None)
        return Value(self.layer.branch, (self._rows,), np.int64, value)

    def _last(self) -> Value:
        assert self.words.hidden is not None
        hidden = plain(self.words.hidden, self.layer.branch)
        return Value(self.layer.branch, hidden.sizes, hidden.dtype, hidden.value).cast(self.layer.dtype)

    def _mask(self, value: ir.Value) -> Value | None:
        """Return the mask for the layer's positions, as int64.

        If the mask that is passed to the graph has another shape, for example because it also covers cached tokens, the
        result is all ones. Return None if the graph does not declare a mask with two axes, or if the layer's output
        does not have three axes.
        """
        y = self.layer.y
        if value.shape is None or len(value.shape) != 2 or y.ndim != 3:
            return None
        ones = SYMBOLS.ones_like(y[..., 0]).cast(np.int64)
        # `Where` broadcasts the mask and the ones to one shape, even if it selects only the ones. So if the mask has
        # more columns than the layer has positions, cut the mask to the layer's number of positions.
        cut = last_columns(plain(value, self.layer.branch).cast(np.int64), ones)
        chosen = self.layer.branch.node("Where", [self._alike(value, ones), cut, ones.value], None, np.int64, None)
        return Value(self.layer.branch, ones.sizes, np.int64, chosen)

    def _alike(self, value: ir.Value, ones: Value) -> ir.Value:
        """Return a boolean scalar that the graph computes: True if two matrices have the same shape."""
        node = self.layer.branch.node
        sizes = [node("Shape", [one], None, np.int64, (2,)) for one in (value, ones.value)]
        same = node("Cast", [node("Equal", sizes, None, bool, (2,))], {"to": int(ir.DataType.INT64)}, np.int64, (2,))
        every = node("ReduceMin", [same], {"keepdims": 0}, np.int64, ())
        return node("Cast", [every], {"to": int(ir.DataType.BOOL)}, bool, ())

"""Add nodes that compute the ids and the positions of all tokens, both the past's tokens and the call's tokens.

The cache contains the past's keys and values, but not the past's token ids, so the graph gets a new input for these
ids. With this input, a formula that reads all tokens gives the call's tokens the same results as without a cache.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Branch, Building
from .values import SYMBOLS, Value, concatenated, plain

TOKENS, EMBEDS, MASK, POSITIONS = CALL = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""Names of the inputs of a model's call. A graph may use other names for them; see `Call.input`."""


Size = int | str | ir.SymbolicDim
"""The size of one axis of a graph's value; a dynamic size is given by its name."""


class Call(Protocol):
    """An interface to the inputs of a model's call, with only the members that this module uses.

    Attributes:
        building: the model that is being changed.
        new_inputs: the inputs that `new` added to the graph, by name.
    """

    building: Building
    new_inputs: dict[str, ir.Value]

    def input(self, word: str) -> ir.Value | None:
        """Return the graph input for the call's input `word`; None if the graph has no such input."""

    def new(self, word: str, axes: Sequence[Size]) -> ir.Value:
        """Return a new integer input of the graph; a later call with the same `word` returns the same input."""
        ...


_PAST = re.compile(r"(?:^|[._])(\d+)[._](key|value)s?$")


def past_inputs(graph: ir.Graph) -> Mapping[tuple[int, str], ir.Value]:
    """Return the graph's inputs for the past's keys and values, by `(layer number, "key" or "value")`."""
    inputs_by_layer: dict[tuple[int, str], ir.Value] = {}
    for value in graph.inputs:
        match = _PAST.search(value.name or "") if "past" in (value.name or "") else None
        if match is not None:
            inputs_by_layer[int(match[1]), match[2]] = value
    return inputs_by_layer


EARLIER = "past_input_ids"
"""Name of the new input for the token ids of the past. The input is only added if a formula reads all tokens."""


def whole_numbers(value: ir.Value, branch: Branch) -> ir.Value:
    """Cast a value to int64, the type of token ids in torch."""
    return plain(value, branch).cast(np.int64).value


def every_token(words: Call, branch: Branch) -> ir.Value:
    """Return the token ids of the past and the call, `[rows, positions]`.

    Raises:
        Unsupported: the graph has no input for token ids.
    """
    ids_input = words.input(TOKENS)
    if ids_input is None:
        cure = f"Pass the name of the input for token ids: --call {TOKENS}=NAME (call={{{TOKENS!r}: NAME}})"
        raise Unsupported(f"the graph has no input {TOKENS}", cure=cure)
    ids = whole_numbers(ids_input, branch)
    past = next(iter(past_inputs(words.building.model.graph).values()), None)
    if past is None:
        return ids
    # Declare the new input with the size of the cache's token axis, so that the input and the cache have equal lengths.
    length = "past_tokens" if past.shape is None or len(past.shape) < 3 else past.shape[2]
    earlier = words.new(EARLIER, [first_axis(ids_input), length])
    return branch.node("Concat", [earlier, ids], {"axis": 1}, np.int64, None)


def every_position(words: Call, branch: Branch, value: ir.Value, like: Value) -> ir.Value:
    """Return the positions of all tokens, the past's and the call's, with the shape `[rows, positions]`.

    The past's positions are consecutive and end just before the call's first position. Negative positions become 0.

    Args:
        words: the inputs of the model's call. Run `every_token` before this function, because `every_token` adds the
            input for the past's tokens.
        branch: collects the added nodes.
        value: the positions of the call's tokens, with one row for each text, or a single row for all texts.
        like: an integer matrix with one entry for each token of the call.
    """
    given: Value = plain(value, branch).cast(np.int64) + SYMBOLS.zeros_like(like)
    earlier = words.new_inputs.get(EARLIER)
    if earlier is None:
        return given.value
    ones = SYMBOLS.ones_like(plain(earlier, branch))
    before = SYMBOLS.clip(given[:, :1] + ones.cumsum(1) - ones.sum(1, True) - 1, 0, None)
    return concatenated([before, given], 1).value


def of_call(value: ir.Value, words: Call, branch: Branch, like: Value) -> ir.Value:
    """Return the part of `value`, `[rows, positions, ...]`, that belongs to the call's tokens.

    If `value` also covers the tokens of the past, the call's tokens are the last ones. Their number is the number of
    columns of the matrix `like`.
    """
    if EARLIER not in words.new_inputs:
        return value
    cut = last_columns(plain(value, branch), like)
    cut.shape = None if value.shape is None else ir.Shape([None, None, *list(value.shape)[2:]])
    return cut


def last_columns(value: Value, like: Value) -> ir.Value:
    """Return `value[:, -n:]`, where `n` is the number of columns of the matrix `like`."""
    node, literal = value.branch.node, value.branch.building.literal
    one, most = (literal(np.array([number], dtype=np.int64)) for number in (1, np.iinfo(np.int64).max))
    sizes = node("Shape", [like.value], None, np.int64, (2,))
    count = node("Slice", [sizes, one, most], None, np.int64, (1,))
    # Use a negative start, which counts from the end, because the length of `value` is only known at run time.
    start = node("Neg", [count], None, np.int64, (1,))
    return node("Slice", [value.value, start, most, one], None, value.dtype, None)


def first_axis(value: ir.Value) -> Size:
    """Return the size of a value's first axis. If the shape is unknown, return `rows`, the name of a dynamic size."""
    return "rows" if value.shape is None or not len(value.shape) else value.shape[0]

"""Every token of a call: behind a past those that it is of, which a further input tells, and then the call's own.

What reads all of them computes for the call's own what it would without a past.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ..errors import Unsupported
from .building import Branch
from .past import past_inputs
from .symbols import SYMBOLS
from .values import Value, plain

if TYPE_CHECKING:
    from .calls import Words

TOKENS, EMBEDS, MASK, POSITIONS = CALL = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
"""What models are called with."""

EARLIER = "past_input_ids"
"""The input of the tokens that a graph's past keys and values are of, where a law reads all tokens."""


def whole_numbers(value: ir.Value, branch: Branch) -> ir.Value:
    """A value in 64 bits, the type that token numbers have in torch."""
    return plain(value, branch).cast(np.int64).value


def every_token(words: Words, branch: Branch) -> ir.Value:
    """Token numbers, `[rows, positions]`.

    Raises:
        Unsupported: the graph has no such input.
    """
    found = words.input(TOKENS)
    if found is None:
        cure = f"Tell its name: call={{{TOKENS!r}: NAME}}, --call {TOKENS}=NAME"
        raise Unsupported(f"the graph has no input {TOKENS}", cure=cure)
    ids = whole_numbers(found, branch)
    past = next(iter(past_inputs(words.building.model.graph).values()), None)
    if past is None:
        return ids
    length = "past_tokens" if past.shape is None or len(past.shape) < 3 else past.shape[2]
    earlier = words.new(EARLIER, [first_axis(found), length])
    return branch.node("Concat", [earlier, ids], {"axis": 1}, np.int64, None)


def every_position(words: Words, branch: Branch, value: ir.Value, own: Value) -> ir.Value:
    """Positions, `[rows, positions]`; those of a past are the ones before the first of the call's.

    Args:
        words: those of the call, after its tokens were asked for.
        branch: where nodes are appended.
        value: positions of the call's own tokens; one row may stand for all.
        own: a matrix of whole numbers, one for each of these tokens.
    """
    given: Value = plain(value, branch).cast(np.int64) + SYMBOLS.zeros_like(own)
    earlier = words.made.get(EARLIER)
    if earlier is None:
        return given.value
    ones = SYMBOLS.ones_like(plain(earlier, branch))
    before = SYMBOLS.clip(given[:, :1] + ones.cumsum(1) - ones.sum(1, True) - 1, 0, None)
    every: Value = SYMBOLS.concat([before, given], axis=1)
    return every.value


def of_call(value: ir.Value, words: Words, branch: Branch, own: Value) -> ir.Value:
    """Of what was computed of every token, `[rows, positions, ...]`, that of the call's own."""
    if EARLIER not in words.made:
        return value
    cut = last_columns(plain(value, branch), own)
    cut.shape = None if value.shape is None else ir.Shape([None, None, *list(value.shape)[2:]])
    return cut


def last_columns(value: Value, own: Value) -> ir.Value:
    """As many of a value's last columns, along its second axis, as a matrix has."""
    node, literal = value.branch.node, value.branch.building.literal
    one, most = (literal(np.array([number], dtype=np.int64)) for number in (1, np.iinfo(np.int64).max))
    sizes = node("Shape", [own.value], None, np.int64, (2,))
    count = node("Slice", [sizes, one, most], None, np.int64, (1,))
    start = node("Neg", [count], None, np.int64, (1,))
    return node("Slice", [value.value, start, most, one], None, value.dtype, None)


def first_axis(value: ir.Value) -> Any:
    """The rows of a value: how many, or their name."""
    return "rows" if value.shape is None or not len(value.shape) else value.shape[0]

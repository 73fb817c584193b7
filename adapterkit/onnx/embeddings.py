"""New tokens at a graph's embeddings: numbers after the vocabulary, with vectors from a second table.

They replace looked-up rows, or are inserted after a module that adds positions and token types. There, the positions of
later tokens do not count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core.adapter import Target
from ..errors import ShapeMismatch, TargetNotFound, Unsupported
from .building import Array, Branch, Building, element_type
from .convolutions import Gather
from .copies import between
from .inserting import before, behind
from .modules import Module, module_at
from .operands import input_behind
from .past import past_inputs
from .resolving import Spot, spots_of
from .symbols import SYMBOLS
from .values import plain


@dataclass(frozen=True, slots=True, eq=False)
class NewTokens:
    """Nodes that separate new tokens from those of the vocabulary.

    Attributes:
        ids: the token numbers.
        new: True where a token is new.
        known: the token numbers, 0 where a token is new.
        vectors: the vectors of new tokens.
        said: which numbers the new tokens have, in words.
    """

    ids: ir.Value
    new: ir.Value
    known: ir.Value
    vectors: ir.Value
    said: str

    def instead_of(self, embedded: ir.Value, branch: Branch) -> ir.Value:
        """Return the embedded tokens, with the new tokens' vectors in place."""
        wide = branch.node("Unsqueeze", [self.new, branch.building.literal(np.array([-1]))], None, bool, None)
        return branch.node("Where", [wide, self.vectors, embedded], None, element_type(self.vectors), None)


def new_tokens(spot: Spot, more: Array, target: Target, branch: Branch) -> NewTokens:
    """Add the nodes that separate an embedding's tokens from new ones with the vectors `more`.

    Raises:
        ShapeMismatch: the vectors have another size.
    """
    # Layers see weights as [out, in]: for an embedding, `in` counts the tokens.
    (dim, count), building = spot.shape[:2], branch.building
    if more.shape[-1] != dim:
        raise ShapeMismatch(f"made for embeddings of {more.shape[-1]}; the graph's have {dim}", where=str(target))
    layer = Gather(spot.node, branch)
    ids, kind = layer.given, np.int64 if layer.given.dtype is None else layer.given.dtype.numpy()
    made = ("context", target), f"{target or 'prompt'}.P", lambda: more.astype(element_type(layer.operand))
    table = building.tensor(*made)
    first, zero = (building.literal(np.array(n, dtype=kind)) for n in (count, 0))
    new = branch.node("Not", [branch.node("Less", [ids, first], None, bool, None)], None, bool, None)
    # Gather reads both tables for every token, so numbers that are out of range in one are set to 0 first.
    known = branch.node("Where", [new, zero, ids], None, kind, None)
    shifted = branch.node("Sub", [ids, first], None, kind, None)
    row = branch.node("Where", [new, shifted, zero], None, kind, None)
    vectors = branch.node("Gather", [table, row], {"axis": 0}, layer.dtype, None)
    return NewTokens(ids, new, known, vectors, f"tokens {count} to {count + len(more) - 1} are the new ones")


def read_by(node: ir.Node) -> str | None:
    """Return the name of the graph input that an embedding looks up, or None."""
    found = input_behind(node.inputs[1])
    return None if found is None else found.name


def with_tokens_behind(target: Target, more: Array, building: Building) -> str:
    """Put new tokens after a module of several embeddings; positions of other tokens do not count them.

    Raises:
        TargetNotFound: the module does not embed tokens, or has no single output of that width.
        ShapeMismatch: the vectors have another size.
        Unsupported: the graph does not show how positions are counted, or it has a past, which would count the tokens.
    """
    where = str(target)
    module = module_at(building.model, target.path, where)
    spots = [spot for spot in spots_of(building.model) if spot.kind is Gather and spot.node in module.nodes]
    tokens = [spot for spot in spots if "input_ids" in (read_by(spot.node) or "")]
    if len(tokens) != 1:
        why = f"{len(tokens)} embeddings of the graph's tokens in the module {module.path}, which has one"
        raise TargetNotFound(why, where=where, cure="Export the graph anew, by torch's own exporter")
    branch = Branch(building, f"adapterkit/{target}")
    new = new_tokens(tokens[0], more, target, branch)
    counted = [spot.node for spot in spots if input_behind(spot.node.inputs[1]) is None]
    if past_inputs(building.model.graph):
        why = "tokens behind the embeddings of a decoder, whose past goes on without them"
        raise Unsupported(why, where=where, cure="Export the model without past keys and values")
    if not counted:
        why = "a module whose positions are no row of a table that the graph counts itself"
        raise Unsupported(why, where=where, cure="Attach it to the torch model")
    end = module.given(more.shape[-1], where)
    before([tokens[0].node], new.ids, new.known, branch)
    for node in counted:
        _uncounted(node, new, end, module, branch)
    behind(end, new.instead_of(end, branch), branch)
    branch.close()
    return f"{new.said}, which positions of the others do not count"


def _uncounted(node: ir.Node, new: NewTokens, end: ir.Value, module: Module, branch: Branch) -> None:
    """Shift position ids by the number of new tokens before each position."""
    at = node.inputs[1]
    assert at is not None
    passed = plain(new.new, branch).cast(np.int64).cumsum(1)
    fewer: Any = SYMBOLS.clip(plain(at, branch).cast(np.int64) - passed, 0, None)
    before([node], at, fewer.value, branch)
    # One row of positions used to serve all rows of the batch. Now each row has its own.
    for one in (node, *between(node.outputs[0], end, module.nodes)):
        for out in one.outputs:
            sizes = None if out.shape is None else list(out.shape)
            out.shape = ir.Shape([None, *sizes[1:]]) if sizes and sizes[0] == 1 else out.shape

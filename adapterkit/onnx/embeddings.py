"""New tokens at a graph's embeddings: numbers behind the last one of the vocabulary, whose vectors are another table's.

They are looked up in the place of a vocabulary's rows, or stand behind a module that adds positions and kinds of tokens
to these: there the tokens that follow them are counted as if they were not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..adapter import Target
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
    """Nodes that tell new tokens from those of a vocabulary.

    Attributes:
        ids: the token numbers.
        new: where they are new.
        known: the numbers, 0 where they are new.
        vectors: those of the new ones.
        said: which numbers they have, in words.
    """

    ids: ir.Value
    new: ir.Value
    known: ir.Value
    vectors: ir.Value
    said: str

    def instead_of(self, embedded: ir.Value, branch: Branch) -> ir.Value:
        """What was embedded, with the new tokens' vectors in it."""
        wide = branch.node("Unsqueeze", [self.new, branch.building.literal(np.array([-1]))], None, bool, None)
        return branch.node("Where", [wide, self.vectors, embedded], None, element_type(self.vectors), None)


def new_tokens(spot: Spot, more: Array, target: Target, branch: Branch) -> NewTokens:
    """Tells the tokens of an embedding from new ones, whose vectors are `more`.

    Raises:
        ShapeMismatch: these are of another width.
    """
    (dim, count), building = spot.shape[:2], branch.building
    if more.shape[-1] != dim:
        raise ShapeMismatch(f"made for embeddings of {more.shape[-1]}; the graph's have {dim}", where=str(target))
    layer = Gather(spot.node, branch)
    ids, kind = layer.given, np.int64 if layer.given.dtype is None else layer.given.dtype.numpy()
    made = ("context", target), f"{target or 'prompt'}.P", lambda: more.astype(element_type(layer.operand))
    table = building.tensor(*made)
    first, zero = (building.literal(np.array(n, dtype=kind)) for n in (count, 0))
    new = branch.node("Not", [branch.node("Less", [ids, first], None, bool, None)], None, bool, None)
    known = branch.node("Where", [new, zero, ids], None, kind, None)
    shifted = branch.node("Sub", [ids, first], None, kind, None)
    row = branch.node("Where", [new, shifted, zero], None, kind, None)
    vectors = branch.node("Gather", [table, row], {"axis": 0}, layer.dtype, None)
    return NewTokens(ids, new, known, vectors, f"tokens {count} to {count + len(more) - 1} are the new ones")


def read_by(node: ir.Node) -> str | None:
    """The name of the graph's input that an embedding looks up."""
    found = input_behind(node.inputs[1])
    return None if found is None else found.name


def with_tokens_behind(target: Target, more: Array, building: Building) -> str:
    """New tokens behind a module of several embeddings; positions of the others do not count them.

    Raises:
        TargetNotFound: the module embeds no tokens, or gives no one value as wide.
        ShapeMismatch: they are of another width.
        Unsupported: the graph does not show how positions are counted, or has a past, whose tokens they would count.
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
    """Has an embedding of positions look up as many fewer as there are new tokens in front."""
    at = node.inputs[1]
    assert at is not None
    passed = plain(new.new, branch).cast(np.int64).cumsum(1)
    fewer: Any = SYMBOLS.clip(plain(at, branch).cast(np.int64) - passed, 0, None)
    before([node], at, fewer.value, branch)
    # One row of positions stood for all rows of the call: each now has its own.
    for one in (node, *between(node.outputs[0], end, module.nodes)):
        for out in one.outputs:
            sizes = None if out.shape is None else list(out.shape)
            out.shape = ir.Shape([None, *sizes[1:]]) if sizes and sizes[0] == 1 else out.shape

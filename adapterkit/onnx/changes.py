"""Merge updates into a graph's stored tensors, block by block, with the engine that also merges checkpoints.

If a node reads a stored weight through Transpose nodes, the merge changes the stored tensor and keeps the Transposes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from threading import Lock

import numpy as np
import onnx_ir as ir

from ..io.lazy import DTYPES, DType, Lazy, Span
from ..merging.arrays import NumpyArrays, Workspace
from ..merging.blocks import blocks
from ..merging.compute import BlockMerger
from ..merging.planned import Output
from ..merging.planned_update import PlannedUpdate
from .building import Array, Building, Dtype, kind_of
from .operands import attribute, numbers, shape_of


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The stored tensor that a node's operand comes from, directly or through Transpose and Identity nodes.

    Attributes:
        value: the stored tensor. If the operand does not come from a stored tensor, `value` is a computed value:
            `stored_behind` sets `value` to the operand itself, and `unturned` sets `value` to the value before the
            Transpose and Identity nodes.
        turned: True if the operand is `value` with its first two axes swapped.
        chain: the nodes from `value` to the operand.
    """

    value: ir.Value
    turned: bool
    chain: tuple[ir.Node, ...]


def stored_behind(operand: ir.Value) -> Stored:
    """Return the stored tensor that an operand comes from, directly or through Transpose and Identity nodes."""
    source = unturned(operand)
    return source if source.value.const_value is not None else Stored(operand, False, ())


def unturned(operand: ir.Value) -> Stored:
    """Return the value, stored or computed, from which Transpose and Identity nodes compute an operand."""
    value, turned, chain = operand, False, list[ir.Node]()
    while value.const_value is None:
        node = value.producer()
        turns = None if node is None else _turns(node)
        if node is None or turns is None or node.inputs[0] is None:
            break
        chain.insert(0, node)
        value, turned = node.inputs[0], turned != turns
    return Stored(value, turned, tuple(chain))


def _turns(node: ir.Node) -> bool | None:
    """Return True if a node swaps the first two axes, False if it keeps their order, None if it does something else."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Identity":
        return False
    if node.op_type != "Transpose" or node.inputs[0] is None:
        return None
    axes = len(shape_of(node.inputs[0]))
    # Without `perm`, a Transpose reverses all axes.
    order = list(attribute(node, "perm", range(axes)[::-1]))
    if order == list(range(axes)):
        return False
    return True if order == [1, 0, *range(2, axes)] else None


@dataclass(frozen=True, slots=True, eq=False)
class StoredChange:
    """A stored tensor, and the updates that the merge applies to it.

    Attributes:
        where: the target, for error messages.
        source: the tensor before the merge.
        folds: the planned updates of the tensor. The target of each update has a layout that states the axis order of
            the stored tensor.
    """

    where: str
    source: Lazy
    folds: tuple[PlannedUpdate, ...]

    def output(self, offset: int) -> Output:
        """Return the plan for writing the merged tensor at `offset` in a file."""
        return Output(self.where, self.source.dtype, self.source.shape, offset, self.source, self.folds)

    def array(self) -> Array:
        """Compute the whole merged tensor in memory."""
        output = self.output(0)
        out: Array = np.empty(self.source.shape, dtype=self.source.dtype.array)
        flat, arrays = out.reshape(-1), NumpyArrays()
        with arrays.quiet():
            folder = BlockMerger(output, Workspace(arrays))
            for block in blocks(output):
                raw: Array = np.frombuffer(self.source.read(block.first, block.elements), dtype=out.dtype)
                folder.compute(raw, flat[block.first : block.first + block.elements], block)
        return out


def lazy_of(value: ir.Value) -> Lazy:
    """Return a constant value as a lazy tensor, which reads external data from its file."""
    tensor = value.const_value
    if isinstance(tensor, ir.ExternalTensor):
        return _outside(tensor, _dtype(tensor.dtype.numpy()), tuple(tensor.shape.numpy()))
    return lazily(lambda: numbers(value), shape_of(value), kind_of(value))


def lazily(make: Callable[[], Array], shape: tuple[int, ...], kind: ir.DataType) -> Lazy:
    """Return a lazy tensor that can be read in blocks; the first read computes the whole tensor."""
    once = _Once(make)
    return Lazy(shape, _dtype(kind.numpy()), once.whole, part=once.part)


def bytes_of(tensor: ir.TensorProtocol) -> Lazy:
    """Return the bytes of a stored tensor of any dtype as a lazy U8 tensor, for copying."""
    kind, shape = DTYPES["U8"], (tensor.nbytes,)
    if isinstance(tensor, ir.ExternalTensor):
        return _outside(tensor, kind, shape)
    once = _Once(lambda: _flat_bytes(tensor))
    return Lazy(shape, kind, once.whole, part=once.part)


def _flat_bytes(tensor: ir.TensorProtocol) -> Array:
    """Return the bytes of a tensor, in the layout in which ONNX stores them."""
    # ONNX packs several 4-bit or 2-bit elements into one byte, but numpy uses one byte for each element. `tobytes`
    # packs the elements again.
    array = tensor.numpy()
    if array.nbytes == tensor.nbytes:
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.frombuffer(tensor.tobytes(), dtype=np.uint8)


def _outside(tensor: ir.ExternalTensor, kind: DType, shape: tuple[int, ...]) -> Lazy:
    span = Span(str(tensor.path), tensor.offset or 0, tensor.nbytes)
    return Lazy(shape, kind, None, span)


class _Once:
    """An array that is computed at the first read, kept while workers read blocks, and freed after the last block."""

    def __init__(self, make: Callable[[], Array]) -> None:
        self.make, self.lock, self.given = make, Lock(), 0
        self.stored_array: Array | None = None

    def whole(self) -> bytes:
        return np.ascontiguousarray(self.make()).tobytes()

    def part(self, first: int, count: int) -> memoryview:
        with self.lock:
            # Together, the workers read each element once. So when the count of read elements reaches the size, no
            # worker needs the array any more, and it can be freed.
            if self.stored_array is None:
                self.stored_array, self.given = np.ascontiguousarray(self.make()).reshape(-1), 0
            data = self.stored_array
            self.given += count
            if self.given >= data.size:
                self.stored_array = None
        return data[first : first + count].view(np.uint8).data


def _dtype(kind: Dtype) -> DType:
    return next(known for known in DTYPES.values() if known.array == kind)


def from_array(make: Callable[[], Array], shape: tuple[int, ...], kind: ir.DataType) -> Lazy:
    """Return a lazy tensor that is computed when it is written."""
    return Lazy(shape, _dtype(kind.numpy()), lambda: np.ascontiguousarray(make()).tobytes())


class Changed(ir.LazyTensor):
    """A tensor that is computed by `change.array()` when it is written."""

    def __init__(self, change: StoredChange, kind: ir.DataType, shape: ir.Shape, name: str) -> None:
        super().__init__(lambda: ir.Tensor(change.array(), dtype=kind, name=name), kind, shape, cache=False, name=name)
        self.change = change


Fresh = dict[Hashable, ir.Value]
"""A map from the key of a changed tensor to the initializer that holds the tensor after the change."""


def fresh_value(building: Building, fresh: Fresh, key: Hashable, old: ir.Value, change: StoredChange) -> ir.Value:
    """Return a new initializer that holds the changed tensor. `old` stays in the graph.

    Calls with the same `key` return the same initializer.
    """
    if key not in fresh:
        shape, kind = ir.Shape(change.source.shape), kind_of(old)
        name = building.name(f"{old.name}.merged")
        tensor = Changed(change, kind, shape, name)
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(kind), const_value=tensor)
        settled_from(building, fresh, value, old, key)
    return fresh[key]


def settled_from(building: Building, fresh: Fresh, value: ir.Value, old: ir.Value, key: Hashable) -> ir.Value:
    """Register `value` as the initializer that replaces `old`, and return `value`.

    If no node reads `old` any more, `settle` later gives the name of `old` to `value`.
    """
    value.metadata_props.update(old.metadata_props)
    value.meta["adapterkit.old"] = old
    building.model.graph.register_initializer(value)
    fresh[key] = value
    return value


def exchange(node: ir.Node, position: int, stored: Stored, new: ir.Value, building: Building) -> None:
    """Make a node read `new` instead of the stored tensor, through copies of the nodes in `stored.chain`."""
    value = new
    for link in stored.chain:
        out = ir.Value(name=building.name(f"{new.name}/{link.op_type}_output"), type=link.outputs[0].type)
        out.shape = link.outputs[0].shape
        # Copy the chain, because other nodes may read the originals.
        copy = ir.node(
            link.op_type, [value], {name: attribute.value for name, attribute in link.attributes.items()},
            outputs=[out], name=building.name(f"{new.name}/{link.op_type}"),
        )  # fmt: skip
        copy.metadata_props.update(link.metadata_props)
        assert node.graph is not None
        node.graph.insert_before(node, copy)
        value = out
    node.replace_input_with(position, value)
    for link in reversed(stored.chain):
        if link.graph is not None and not link.outputs[0].uses() and not link.outputs[0].is_graph_output():
            link.graph.remove(link, safe=True)


def settle(fresh: Iterable[ir.Value]) -> None:
    """Remove each old tensor that no node reads any more, and give its name to the new tensor.

    Other tools expect the tensor under its old name.
    """
    for value in fresh:
        old, graph = value.meta.pop("adapterkit.old"), value.graph
        # If two layers shared `old`, each layer has its own new tensor. Only the first new tensor gets the old name.
        stored = {} if graph is None else graph.initializers
        lost = old.name in stored and stored[old.name] is old and not old.uses()
        if lost and graph is not None and not old.is_graph_input() and not old.is_graph_output():
            name = old.name
            graph.initializers.pop(name)
            value.name = name

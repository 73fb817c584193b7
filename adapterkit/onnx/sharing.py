"""Share weights with the base's safetensors files: the graph refers to their bytes, without a second copy.

Runtimes read no files outside of a model's folder, so these files must be in it. If a file stores 16 bits and the graph
computes in 32, a Cast node is added, which runtimes evaluate when they load the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import UsageError
from ..io.checkpoint import opened as opened_base
from ..io.lazy import Lazy, as_array
from .building import Building
from .model_file import INLINE, STAYS
from .scopes import same_end


def share_weights(graph: ir.Model, weights: str | PathLike[str], out: Path) -> list[str]:
    """Replace stored tensors by references to equal tensors in safetensors files.

    Args:
        graph: an export, whose tensors have the base's names.
        weights: a safetensors file, or a folder of them.
        out: the graph's destination: in the files' folder, or above it.

    Returns:
        Names of the shared tensors.

    Raises:
        UsageError: the files are elsewhere, or none of their tensors equals one of the graph's.
    """
    held = {name: leaf for name, leaf in opened_base(weights).tensors.items() if leaf.span is not None}
    _check_place(held, out)
    building, shared = Building(graph), list[str]()
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= INLINE:
            continue
        alike = _alike(name, tuple(tensor.shape.numpy()), held)
        leaf = next((leaf for leaf in alike if _same(tensor, leaf)), None)
        if leaf is not None:
            _placed(value, leaf, out, building)
            shared.append(name)
    if not shared:
        cure = "Name the safetensors files that the model was loaded from"
        raise UsageError("no weight of the graph is one of the files'", path=weights, cure=cure)
    return shared


def _check_place(held: Mapping[str, Lazy], out: Path) -> None:
    home = out.parent.resolve()
    for leaf in held.values():
        assert leaf.span is not None
        file = Path(leaf.span.path)
        if file.suffix != ".safetensors":
            cure = "Save the model by save_pretrained, which writes safetensors files"
            raise UsageError("weights that are in no safetensors file cannot be shared", path=file, cure=cure)
        if file.is_symlink() or not file.resolve().is_relative_to(home):
            why = "weights outside of the graph's folder cannot be shared: runtimes read none there"
            raise UsageError(why, path=file, cure=f"Write the graph into {file.parent}; no link will do")


def _alike(name: str, shape: tuple[int, ...], held: Mapping[str, Lazy]) -> list[Lazy]:
    """Return tensors of the files that may equal one of the graph's: those of its name, else of its shape (ties)."""
    sized = {other: leaf for other, leaf in held.items() if leaf.shape == shape}
    named = [leaf for other, leaf in sized.items() if same_end(name, other)]
    return named or list(sized.values())


def _same(tensor: Any, leaf: Lazy) -> bool:
    """Whether the numbers are equal bit for bit; 16-bit numbers are first converted to the graph's float32."""
    theirs, ours = as_array(leaf), np.asarray(tensor.numpy(), order="C")
    if theirs.dtype != ours.dtype:
        if not leaf.dtype.floating or theirs.dtype.itemsize != 2 or ours.dtype != np.float32:
            return False
        theirs = theirs.astype(np.float32)
    return bool(np.array_equal(ours.view(np.uint8), theirs.view(np.uint8)) if ours.ndim else ours == theirs)


def _placed(value: ir.Value, leaf: Lazy, out: Path, building: Building) -> None:
    assert leaf.span is not None
    assert value.const_value is not None
    file, own = Path(leaf.span.path).resolve(), value.const_value
    kind = ir.DataType.from_numpy(leaf.dtype.array)
    place = ir.ExternalTensor(
        file.relative_to(out.parent.resolve()).as_posix(), leaf.span.offset, leaf.span.nbytes, kind,
        shape=ir.Shape(leaf.shape), name=value.name or "", base_dir=out.parent.resolve(),
    )  # fmt: skip
    place.meta[STAYS] = True
    if kind == own.dtype:
        value.const_value = place
        return
    uses = list(value.uses())
    cast = ir.node("Cast", [value], {"to": own.dtype}, name=building.name(f"{value.name}/Cast"))
    cast.outputs[0].name = building.name(f"{value.name}/Cast_output")
    cast.outputs[0].shape, cast.outputs[0].type = ir.Shape(leaf.shape), ir.TensorType(own.dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, cast.outputs[0])
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    # At the front, before all nodes that may read it.
    graph.insert_before(graph[0], cast)
    value.const_value, value.type = place, ir.TensorType(kind)

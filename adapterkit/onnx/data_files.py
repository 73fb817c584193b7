"""Check a model's external data files, before any is read: they must be inside its folder and long enough."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from ..errors import Malformed
from ..io.checkpoint import contained


def checked_data(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Return the files that hold the model's numbers, after checking each of them.

    Raises:
        Malformed: a file is missing, too short, outside of the folder, or linked from elsewhere.
    """
    files: dict[Path, int] = {}
    for tensor in external(model):
        where = tensor.name or "a tensor"
        file = contained(path.parent, str(tensor.location))
        real = _inside(file, path, where)
        offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
        # The length may be left out of a reference; then it follows from shape and dtype.
        need = offset + length
        if offset < 0 or length < tensor.nbytes:
            raise Malformed("its offset or length in the data file is invalid", path=path, where=where, cure=_AGAIN)
        files[file] = max(files.get(file, 0), need)
        if real.stat().st_size < need:
            why = f"{real.stat().st_size} bytes where {need} are needed"
            raise Malformed(why, path=file, where=where, cure="Fetch the data file again")
        # A hub's cache stores files as links. Runtimes refuse links out of the folder, so read the real file.
        tensor._base_dir, tensor._location = str(real.parent), real.name
        tensor.meta["adapterkit.location"] = file.relative_to(path.parent).as_posix()
    return tuple(files)


def _inside(file: Path, model: Path, where: str) -> Path:
    """Return the real file behind links; they may lead to the folder of the model's own real file, nowhere else."""
    try:
        real, home = file.resolve(strict=True), model.resolve(strict=True).parent
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links, before Python 3.13.
        why = f"its data file {file.name} cannot be read ({(getattr(error, 'strerror', '') or str(error)).lower()})"
        raise Malformed(why, path=model, where=where, cure="Put the data file beside the model") from None
    if not (real.is_relative_to(model.parent.resolve()) or real.is_relative_to(home)) or not real.is_file():
        why = f"its data file {file.name} is a link out of the model's folder"
        raise Malformed(why, path=model, where=where, cure="Do not use this file: repack the model")
    # An archive may contain a hard link to any file of the user who unpacks it. onnx refuses hard links, too.
    if real.stat().st_nlink > 1:
        why = f"its data file {file.name} is a hard link, possibly to another user's file"
        raise Malformed(why, path=model, where=where, cure="Copy the file in its own place, if you trust it")
    return real


def external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors with data outside of the model file, including those of node attributes and subgraphs."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for held in node.attributes.values():
                several = held.value if held.type == ir.AttributeType.TENSORS else [held.value]
                yield from (one for one in several if isinstance(one, ir.ExternalTensor))


_AGAIN = "Export the model again"

"""Models on disk: opened without their numbers, checked for what lies outside them, written whole or not at all.

Numbers that a model keeps in files beside it stay there: a rewritten model names the same bytes, and what is new lies
in a small file of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..errors import Malformed, StorageError, Unsupported, UsageError, first_line, storage_error
from ..tensors.atomic import replacing, write_bytes
from ..tensors.locations import located
from .building import OPSET
from .changes import Changed
from .data_files import checked_data, external
from .streaming import alignment, placed, streamed, worked_out
from .wellformed import check_parts

INLINE = 1024
"""Bytes of a new tensor up to which it stays in the model's own file."""

APART = 1 << 26
"""Bytes of an export's numbers from which they lie in a file beside the model."""

STAYS = "adapterkit.stays"
"""The mark of a tensor that stays in the file that holds it when all others are written anew."""

LIMIT = 2**31 - 2**20
"""Bytes of a model's own file at most: protobuf ends at 2 GB."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model and where it came from.

    Attributes:
        model: it.
        path: its file; None for one that was handed over in memory.
        data: the files beside it that hold its numbers.
        original: the bytes of its file, or of what it would be written as.
    """

    model: ir.Model
    path: Path | None
    data: tuple[Path, ...]
    original: bytes


def opened(model: ir.Model | str | os.PathLike[str]) -> Source:
    """Opens a model; no numbers of other files are read.

    Raises:
        StorageError: it cannot be read.
        NetworkError: it is on a hub and cannot be fetched.
        Malformed: it is no model, or its data is missing, too short, or outside its folder.
        Unsupported: its operators are too old to be converted, or it is in memory and larger than a file may be.
    """
    if isinstance(model, ir.Model):
        copy = model.clone()
        if _large(copy):
            cure = "Save it with its numbers in data files (onnx_ir.save with external_data=), and name the file"
            raise Unsupported("a model of more than 2 GB in memory, which no file of ONNX's holds", cure=cure)
        return Source(_modern(copy, None), None, (), ir.to_proto(copy).SerializeToString())
    path = located(model)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise storage_error(error, path) from error
    loaded = _parsed(data, path)
    files = checked_data(loaded, path)
    return Source(_modern(loaded, path), path, files, data)


def _parsed(data: bytes, path: Path) -> ir.Model:
    import onnx

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        model = ir.from_proto(proto)
    except Exception as error:  # protobuf and onnx-ir raise whatever the damage leads to.
        first = first_line(error)
        raise Malformed(f"not an ONNX model ({first})", path=path, cure="Export it again") from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise Malformed("not an ONNX model: no graph", path=path, cure="Export it again")
    check_parts(proto, path)
    return model


def _modern(model: ir.Model, path: Path | None) -> ir.Model:
    """The model in operators new enough, by ONNX's own converter."""
    version = model.graph.opset_imports.get("", OPSET)
    if version >= OPSET:
        return model
    if any(True for _ in external(model)):
        why = f"operator set {version}, with its numbers in other files"
        raise Unsupported(why, path=path, cure=f"Convert it to operator set {OPSET} or newer first")
    from onnx import version_converter

    try:
        return ir.from_proto(version_converter.convert_version(ir.to_proto(model), OPSET))
    except Exception as error:  # The converter raises RuntimeError and more.
        first = first_line(error)
        why = f"operator set {version}, and no way to {OPSET} ({first})"
        raise Unsupported(why, path=path, cure="Export it with a newer operator set") from None


def inline(model: ir.Model) -> bytes:
    """Serialize a model with all of its numbers in it."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                array = np.array(tensor.numpy())
                value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def save(model: ir.Model, source: Source, out: Path, fresh: Iterable[ir.Value]) -> list[Path]:
    """Writes a model; the data files that it shares are copied only where `out` is in another folder.

    Args:
        model: the model.
        source: what it was made from.
        out: where to; replaced by rename.
        fresh: values whose tensors are new.

    Returns:
        the files that were written, the model last.

    Raises:
        StorageError: it cannot be written.
        UsageError: `out` is the model itself, or one of its data files.
    """
    _check_out(source, out)
    written: list[Path] = []
    try:
        written += _carried(source, out)
        written += _apart(fresh, out, bool(source.data) or _large(model))
        for tensor in external(model):
            if "adapterkit.location" in tensor.meta:
                tensor._location = tensor.meta["adapterkit.location"]
        data = ir.to_proto(model).SerializeToString()
        write_bytes(out, data)
    except BaseException:
        _unlink(written)
        raise
    return [*written, out]


def save_merged(
    model: ir.Model, source: Source, out: Path, fresh: Iterable[ir.Value], apart: bool = False
) -> list[Path]:
    """Writes a model whose numbers changed: all of them anew, some blocks in memory at a time; see `save`.

    A model that kept numbers in data files, or is to keep them `apart`, keeps them in one new file, and nothing in it
    that no node reads.
    """
    _check_out(source, out)
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                graph.initializers.pop(name)
    stored = [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
    written: list[Path] = []
    try:
        moving = [value for value in stored if _moves(value.const_value)]
        if moving and (apart or source.data or _large(model)):
            written += streamed(moving, out)
        _take_in(stored, out)
        worked_out(value for value in fresh if isinstance(value.const_value, Changed))
        write_bytes(out, ir.to_proto(model).SerializeToString())
    except BaseException:
        _unlink(written)
        raise
    return [*written, out]


def save_fresh(graph: ir.Model, out: Path) -> list[Path]:
    """Writes a model that lay elsewhere, or nowhere; many numbers in one data file beside it."""
    held = [v.const_value for g in graph.graphs() for v in g.initializers.values() if v.const_value is not None]
    apart = sum(tensor.nbytes for tensor in held if STAYS not in tensor.meta) > APART
    return save_merged(graph, Source(graph, None, (), b""), out, (), apart)


@contextlib.contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A hidden folder in an output's own, for files on the way; gone at the end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise storage_error(error, out) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def kept(*outs: Path) -> Iterator[list[Path]]:
    """Put back what was at `outs` if the block raises.

    The block appends the files that it writes to the list that it gets; after an error they are removed.
    """
    written: list[Path] = []
    with contextlib.ExitStack() as stack:
        there = [out for out in outs if out.is_file()]
        folder = stack.enter_context(folder_beside(there[0])) if there else None
        before = {out: folder / out.name for out in there if folder is not None}
        for out, copy in before.items():
            try:
                os.link(out, copy)
            except OSError:  # Not every file system has hard links.
                shutil.copy2(out, copy)
        try:
            yield written
        except BaseException:
            _unlink([*written, *(out for out in outs if out not in before)])
            for out, copy in before.items():
                os.replace(copy, out)
            raise


def _take_in(values: Iterable[ir.Value], out: Path) -> None:
    """Has numbers that other files hold lie in the model's own, but for those of its new file, and those that stay."""
    for value in values:
        tensor = value.const_value
        own = out.with_name(f"{out.name}.data")
        if isinstance(tensor, ir.ExternalTensor) and STAYS not in tensor.meta and Path(tensor.path) != own:
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)


def _moves(tensor: Any) -> bool:
    return tensor.nbytes > INLINE and STAYS not in tensor.meta


def _unlink(files: Iterable[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def _check_out(source: Source, out: Path) -> None:
    if out.is_dir():
        raise UsageError("a folder where a file is to be written", path=out, cure="Name a .onnx file")
    for file in (source.path, *source.data):
        if file is not None and out.exists() and file.exists() and out.samefile(file):
            raise UsageError("the output is one of the model's own files", path=out, cure="Write another file")
    if not out.parent.is_dir():
        raise StorageError("no such folder", path=out.parent, cure="Make the folder first")


def _carried(source: Source, out: Path) -> list[Path]:
    """Data files copied to the output's folder, where that is another one."""
    if source.path is None or source.path.parent.resolve() == out.parent.resolve():
        return []
    copied = []
    for file in source.data:
        there = out.parent / file.relative_to(source.path.parent)
        if there.exists():
            if there.stat().st_size == file.stat().st_size and _same(there, file):
                continue
            raise StorageError("already there, with other contents", path=there, cure="Write to another folder")
        there.parent.mkdir(parents=True, exist_ok=True)
        with replacing(there) as target, open(file, "rb") as held:
            shutil.copyfileobj(held, target, 1 << 22)
        copied.append(there)
    return copied


def _same(one: Path, other: Path) -> bool:
    with open(one, "rb") as a, open(other, "rb") as b:
        return hashlib.file_digest(a, "sha256").digest() == hashlib.file_digest(b, "sha256").digest()


def _large(model: ir.Model) -> bool:
    held = (v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None)
    return sum(tensor.nbytes for tensor in held if not isinstance(tensor, ir.ExternalTensor)) > LIMIT


def _apart(fresh: Iterable[ir.Value], out: Path, wanted: bool) -> list[Path]:
    """New tensors in a file of their own; its name tells its contents, so that it never takes another's place."""
    held = [(v, v.const_value) for v in fresh if v.const_value is not None and v.const_value.nbytes > INLINE]
    if not wanted or not held:
        return []
    digest = hashlib.sha256()
    for value, tensor in held:
        digest.update(f"{value.name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.tobytes())
    file = out.with_name(f"{out.name}.{digest.hexdigest()[:12]}.data")
    there = file.exists()
    with replacing(file) as target:
        for value, tensor in held:
            value.const_value = _placed(target, tensor, file)
    return [] if there else [file]


def _placed(target: Any, tensor: Any, file: Path) -> ir.ExternalTensor:
    target.write(b"\0" * (-target.tell() % alignment(tensor.nbytes)))
    offset = target.tell()
    target.write(tensor.tobytes())
    return placed(tensor, file, offset)

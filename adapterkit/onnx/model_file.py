"""Open and check ONNX model files without reading their external data; write model files completely or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
from threadpoolctl import threadpool_limits

from ..errors import AdapterkitError, Malformed, StorageError, Unsupported, UsageError, first_line, storage_error
from ..io.atomic import replacing, write_bytes
from ..io.checkpoint import contained
from ..io.inputs import open_input
from ..io.locations import located
from ..io.staging import Staging, check_free, check_inputs, clear, files_below, staged
from ..merging.arrays import NumpyArrays
from ..merging.execute import execute
from ..merging.options import most_workers
from ..merging.planned import Output, OutputFile
from ..merging.staging_dir import StagingDir
from .building import INLINE
from .changes import Changed, bytes_of
from .conversion import modern
from .validating import check_model


def checked_data(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Check the files that hold the model's external data; return their paths.

    Raises:
        Malformed: a data file is missing, too short, outside of the model's folder, or a hard link; or the offset or
            the length of a tensor in its data file is invalid.
    """
    files: dict[Path, int] = {}
    for tensor in external(model):
        where = tensor.name or "a tensor"
        file = contained(path.parent, str(tensor.location))
        real = _inside(file, path, where)
        # ONNX allows a reference to external data without a length; the shape and the dtype then determine the length.
        offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
        need = offset + length
        if offset < 0 or length < tensor.nbytes:
            raise Malformed(
                "the tensor's offset or length in the data file is invalid", path=path, where=where, cure=_AGAIN
            )
        files[file] = max(files.get(file, 0), need)
        if real.stat().st_size < need:
            why = f"the data file has {real.stat().st_size} bytes, but {need} are needed to read the model's tensors"
            raise Malformed(why, path=file, where=where, cure="Download the data file again")
        # Make the tensor refer to the real file: a hub's cache stores files as links, and runtimes refuse links that
        # lead out of the model's folder.
        tensor._base_dir, tensor._location = str(real.parent), real.name
        tensor.meta["adapterkit.location"] = file.relative_to(path.parent).as_posix()
    return tuple(files)


def _inside(file: Path, model: Path, where: str) -> Path:
    """Return a data file's path with all links resolved; refuse hard links, and files outside of the model's folder.

    If the model file is itself a link, the data file may also be in the folder of the file that the link points to.
    """
    try:
        real, home = file.resolve(strict=True), model.resolve(strict=True).parent
    except (OSError, RuntimeError) as error:  # RuntimeError: circular links, before Python 3.13.
        why = f"the data file {file.name} cannot be read ({(getattr(error, 'strerror', '') or str(error)).lower()})"
        raise Malformed(why, path=model, where=where, cure="Put the data file beside the model") from None
    if not (real.is_relative_to(model.parent.resolve()) or real.is_relative_to(home)) or not real.is_file():
        why = f"the data file {file.name} is a link out of the model's folder, or is not a regular file"
        raise Malformed(why, path=model, where=where, cure="If you trust the file, replace the link by a copy")
    # Refuse hard links, as onnx does: a hard link in an archive can refer to any file of the user who unpacks it.
    if real.stat().st_nlink > 1:
        why = f"the data file {file.name} is a hard link, possibly to another user's file"
        raise Malformed(why, path=model, where=where, cure="If you trust the file, replace the hard link by a copy")
    return real


def external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yield the tensors with external data, including those in node attributes and subgraphs."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                several = attribute.value if attribute.type == ir.AttributeType.TENSORS else [attribute.value]
                yield from (one for one in several if isinstance(one, ir.ExternalTensor))


_AGAIN = "Export the model again"


# Write a merged model's tensors to one data file. The merge engine's workers compute changed tensors and copy the rest.


PAGE = 4096
"""Alignment of large tensors in bytes, so that runtimes can memory-map them."""


def streamed(values: Sequence[ir.Value], out: Path) -> list[Path]:
    """Write the values' tensors atomically to a new data file beside `out`, and make the values refer to this file.

    Raises:
        StorageError: the data file exists already, or cannot be written.
        Malformed: merging gives values that are too large for a tensor's dtype.
    """
    file = out.with_name(f"{out.name}.data")
    if file.exists():
        raise StorageError("already there", path=file, cure="Remove the file, or write to another path")
    planned = OutputFile(file.name, b"", tuple(_outputs(values)))
    # Give the staging folder a random name, because a later run cannot continue a partial data file.
    stage = StagingDir(file, secrets.token_hex(16), [file.name], single=True)
    with stage.locked():
        try:
            execute([planned], stage, [NumpyArrays()], None, most_workers(), checksums=False)
            stage.publish_all()
        except BaseException:
            stage.discard()
            raise
    for value, output in zip(values, planned.outputs, strict=True):
        assert value.const_value is not None
        value.const_value = placed(value.const_value, file, output.offset)
    return [file]


def _outputs(values: Iterable[ir.Value]) -> Iterable[Output]:
    end = 0
    for value in values:
        tensor = value.const_value
        assert tensor is not None
        offset = end + -end % alignment(tensor.nbytes)
        end = offset + tensor.nbytes
        if isinstance(tensor, Changed):
            yield tensor.change.output(offset)
        else:
            source = bytes_of(tensor)
            yield Output(value.name or "", source.dtype, source.shape, offset, source, ())


def worked_out(values: Iterable[ir.Value]) -> None:
    """Compute the changed tensors that will be written to the model file itself; keep their arrays in memory."""

    def compute(value: ir.Value) -> None:
        tensor = value.const_value
        assert isinstance(tensor, Changed)
        value.const_value = ir.Tensor(tensor.change.array(), dtype=tensor.dtype, name=value.name)

    # Use one BLAS thread per worker, because the workers together already use all cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(most_workers()) as pool:
        list(pool.map(compute, values))


def alignment(nbytes: int) -> int:
    """Return the alignment, in bytes, that a tensor of `nbytes` bytes gets in a data file."""
    return PAGE if nbytes > 1 << 20 else 64


def placed(tensor: ir.TensorProtocol, file: Path, offset: int) -> ir.ExternalTensor:
    """Return an external tensor like `tensor`. The data of the external tensor are the bytes at `offset` in `file`."""
    return ir.ExternalTensor(
        file.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        base_dir=file.parent,
    )


# If the original model has external data, the rewritten model's unchanged tensors stay in the original's data files.
# Only new tensors are written: small ones to the model file, large ones to a new data file.


APART = 1 << 26
"""Limit in bytes. If the tensors of a newly created model are larger in total, they are written to a data file."""

STAYS = "adapterkit.stays"
"""Metadata key. `save_merged` and `save_fresh` leave each tensor that has this key in its current data file."""

LIMIT = 2**31 - 2**20
"""Largest total size in bytes of the tensors inside a model file. Protobuf limits the whole file to 2 GiB."""


@dataclass(frozen=True, slots=True, eq=False)
class GraphSource:
    """An opened model, and the files that it was read from.

    Attributes:
        model: the model.
        path: the path of the model file; None for an in-memory model.
        data: the paths of the files with the model's external data.
        original: the content of the model file; for an in-memory model, the serialized model.
    """

    model: ir.Model
    path: Path | None
    data: tuple[Path, ...]
    original: bytes


def opened(model: ir.Model | str | os.PathLike[str]) -> GraphSource:
    """Open a model without reading its external data.

    Raises:
        StorageError: the model cannot be read.
        NetworkError: the model is on a hub and cannot be downloaded.
        Malformed: the file is not a model, or its external data is missing, too short, or outside of the
            model's folder.
        Unsupported: the opset is too old to be converted, or an in-memory model is too large for a file.
    """
    if isinstance(model, ir.Model):
        # Copy the caller's model, because it must not change.
        copy = model.clone()
        if _large(copy):
            cure = "Save the model with external data (onnx_ir.save with external_data=), and pass the file's path"
            raise Unsupported("the model has more than 2 GB in memory, which is too large for one ONNX file", cure=cure)
        _store_constants(copy)
        return GraphSource(modern(copy, None), None, (), ir.to_proto(copy).SerializeToString())
    path = located(model)
    try:
        with open_input(path) as file:
            data = file.read()
    except OSError as error:
        raise storage_error(error, path) from error
    loaded = _parsed(data, path)
    files = checked_data(loaded, path)
    _store_constants(loaded)
    return GraphSource(modern(loaded, path), path, files, data)


def _store_constants(model: ir.Model) -> None:
    """Turn Constant nodes with external data into initializers, which the rest of this package can read and move."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            value = (
                node.attributes.get("value") if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
            )
            if value is None or not isinstance(value.value, ir.ExternalTensor):
                continue
            old = node.outputs[0]
            name, old.name = old.name, None
            tensor = value.value
            new = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            new.metadata_props.update(old.metadata_props)
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            graph.register_initializer(new)


def _parsed(data: bytes, path: Path) -> ir.Model:
    import onnx

    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        if not proto.HasField("graph") or not proto.opset_import:
            raise Malformed("not an ONNX model: no graph, or no opset", path=path, cure="Export the model again")
        check_model(proto, path)
        return ir.from_proto(proto)
    except AdapterkitError:
        raise
    except Exception as error:  # protobuf and onnx-ir raise many types of errors for damaged files.
        first = first_line(error)
        raise Malformed(f"not an ONNX model ({first})", path=path, cure="Export the model again") from None


def inline(model: ir.Model) -> bytes:
    """Return a model as the bytes of one ONNX file that contains all tensors; this loads the model's external data."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
                # Copy the array, because an external tensor's array is a view of its memory-mapped file.
                array = np.array(tensor.numpy())
                value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=value.name)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def save(model: ir.Model, source: GraphSource, out: Path, fresh: Iterable[ir.Value]) -> None:
    """Write a model that shares the data files of its source.

    Args:
        model: the model.
        source: the opened model that the new model was made from.
        out: the path to write to. Callers pass the `path` of the `WrittenModel` that `placing` yields.
        fresh: the values whose tensors are not in the source's data files.

    Raises:
        StorageError: the file cannot be written.
    """
    _apart(fresh, out, bool(source.data) or _large(model))
    # Restore the names of the data files, because `checked_data` made tensors refer to the real files behind links.
    for tensor in external(model):
        if "adapterkit.location" in tensor.meta:
            tensor._location = tensor.meta["adapterkit.location"]
    write_bytes(out, _serialized(model, out))


def _serialized(model: ir.Model, out: Path) -> bytes:
    """Return the bytes of a model file, without external data.

    Raises:
        Malformed: onnx-ir could read the model, but cannot write it.
    """
    try:
        data: bytes = ir.to_proto(model).SerializeToString()
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        cure = "Correct the model, or write it again with the tool that wrote it"
        raise Malformed(f"the graph cannot be written ({first_line(cause)})", path=out, cure=cure) from None
    return data


def save_merged(
    model: ir.Model, source: GraphSource, out: Path, fresh: Iterable[ir.Value], apart: bool = False
) -> None:
    """Compute the changed tensors of a model, and write the model; for the arguments, see `save`.

    If the model has external data or is large, or if `apart` is set, all tensors except small ones are written to one
    new data file, with only a few blocks in memory at a time. Tensors that no node reads are dropped.
    """
    for graph in model.graphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                graph.initializers.pop(name)
    stored = [v for g in model.graphs() for v in g.initializers.values() if v.const_value is not None]
    moving = [value for value in stored if _moves(value.const_value)]
    if moving and (apart or source.data or _large(model)):
        streamed(moving, out)
    # Load external tensors into memory, except tensors in the new data file and tensors with the key `STAYS`.
    data_file = out.with_name(f"{out.name}.data")
    for value in stored:
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and STAYS not in tensor.meta and Path(tensor.path) != data_file:
            value.const_value = ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=value.name)
    worked_out(value for value in fresh if isinstance(value.const_value, Changed))
    write_bytes(out, _serialized(model, out))


def save_fresh(graph: ir.Model, out: Path) -> None:
    """Write a newly created model; if its tensors are large in total, write them to a data file beside the model."""
    tensors = [v.const_value for g in graph.graphs() for v in g.initializers.values() if v.const_value is not None]
    apart = sum(tensor.nbytes for tensor in tensors if STAYS not in tensor.meta) > APART
    save_merged(graph, GraphSource(graph, None, (), b""), out, (), apart)


@dataclass(slots=True)
class WrittenModel:
    """A model that is being written.

    Attributes:
        path: the path at which the model is written and checked.
        scratch: a folder for temporary files, which is removed at the end.
        files: all written files, the model file last; set when the model is in place.
    """

    path: Path
    scratch: Path
    files: tuple[Path, ...] = ()


@contextlib.contextmanager
def placing(
    out: Path, source: GraphSource | None = None, *, shares: bool = False, stays: Iterable[Path] = (),
    inputs: Iterable[Path] = (), overwrite: bool = True, made_from: str | None = None,
) -> Iterator[WrittenModel]:  # fmt: skip
    """Prepare a path to which a `with` block writes a model; after the block, move the written files into place.

    The context manager yields a `WrittenModel`, which contains the path. Usually, the path is in a staging folder. If
    the model refers to data files that are already in the folder of `out`, the path is `out` itself. In a
    staging folder, the model could not be checked: the folder would contain links to these data files, and onnx and
    onnxruntime do not follow such links. While the model is written to `out`, the old file at `out` is kept in the
    staging folder. After an error, the old file is restored; if the process was killed, the next run restores it.

    Args:
        out: the model's destination.
        source: the model that the new model is made from.
        shares: True if the new model refers to the data files of `source`; these files are copied if `out` is in
            another folder.
        stays: other data files in the folder of `out` that the new model refers to.
        inputs: other input files, which must not be replaced.
        overwrite: replace an existing model.
        made_from: a digest of everything that determines the output; see `adapterkit.io.staging`.

    Raises:
        UsageError: `out` is a folder, a file of `source`, or another input.
        StorageError: the model cannot be written, or it would replace a file that belongs to another model.
    """
    _check_out(source, out)
    named = {}
    if shares and source is not None and source.path is not None:
        named = {file.relative_to(source.path.parent): file for file in source.data}
    read = [] if source is None or source.path is None else [source.path, *source.data]
    read += inputs
    if any(True for _ in stays) or any((out.parent / name).exists() for name in named):
        with _in_place(out, named, read, overwrite, made_from) as place:
            yield place
        return
    with staged(out, overwrite=overwrite, inputs=read, made_from=made_from) as path:
        place = WrittenModel(path, path.parent.parent / "scratch")
        place.scratch.mkdir()
        for name, file in named.items():
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, path.parent / name)
        yield place
        names = [file.relative_to(path.parent) for file in files_below(path.parent) if file != path]
        _check_unshared(path.parent, names, out)
        place.files = (*(out.parent / name for name in names), out)


@contextlib.contextmanager
def _in_place(
    out: Path, named: Mapping[Path, Path], read: Sequence[Path], overwrite: bool, made_from: str | None
) -> Iterator[WrittenModel]:
    """Write a model beside existing data files; after an error, remove the new files and restore the old file."""
    check_free(out, overwrite)
    check_inputs([out], read)
    stage = Staging(out)
    with stage.locked():
        clear(stage.folder, keep={"lock"})
        place = WrittenModel(out, stage.folder / "scratch")
        place.scratch.mkdir()
        before = set(files_below(out.parent))
        try:
            stage.set_aside()
            for name, file in named.items():
                _copied(file, out.parent / name)
            yield place
            fresh = [file for file in files_below(out.parent) if file not in before and _is_of(file, out)]
            fresh = [file for file in fresh if file != out]
            place.files = (*fresh, out)
            stage.keep_new(made_from, place.files)
        except BaseException:
            for file in set(files_below(out.parent)) - before - {out}:
                if _is_of(file, out) or file in {out.parent / name for name in named}:
                    file.unlink()
            raise
        finally:
            stage.discard()


def _is_of(file: Path, out: Path) -> bool:
    """Whether a file belongs to the model at `out`: it is beside `out`, and its name begins with the model's name."""
    return file.parent == out.parent and file.name.startswith((f"{out.name}.", f"{out.stem}.onnx_adapter"))


def _copied(file: Path, there: Path) -> None:
    if there.exists():
        if there.samefile(file) or _same(there, file):
            return
        raise StorageError("a file with different content exists already", path=there, cure="Write to another folder")
    there.parent.mkdir(parents=True, exist_ok=True)
    with replacing(there) as target, open(file, "rb") as source_file:
        shutil.copyfileobj(source_file, target, 1 << 22)


def _check_unshared(stage: Path, names: Iterable[Path], out: Path) -> None:
    """Refuse to replace data files that another model in the folder refers to."""
    for name in names:
        there = out.parent / name
        if not there.exists() or _same(there, stage / name):
            continue
        # Search the bytes of the other models for the data file's name: protobuf stores names as plain bytes.
        for other in out.parent.glob("*.onnx"):
            if other.name != out.name and os.fsencode(name.as_posix()) in other.read_bytes():
                why = f"the file exists already, as a data file of the model {other.name}"
                raise StorageError(why, path=there, cure="Write to another path")


def _moves(tensor: ir.TensorProtocol | None) -> bool:
    return tensor is not None and tensor.nbytes > INLINE and STAYS not in tensor.meta


def _check_out(source: GraphSource | None, out: Path) -> None:
    if out.is_dir():
        raise UsageError("the output is a folder, but must be a file", path=out, cure="Pass the path of a .onnx file")
    for file in () if source is None else (source.path, *source.data):
        if file is not None and out.exists() and file.exists() and out.samefile(file):
            raise UsageError("the output is one of the model's own files", path=out, cure="Write to another file")
    if not out.parent.is_dir():
        raise StorageError("no such folder", path=out.parent, cure="Make the folder first")


def _same(one: Path, other: Path) -> bool:
    with open(one, "rb") as a, open(other, "rb") as b:
        return hashlib.file_digest(a, "sha256").digest() == hashlib.file_digest(b, "sha256").digest()


def _large(model: ir.Model) -> bool:
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values() if v.const_value is not None)
    return sum(tensor.nbytes for tensor in tensors if not isinstance(tensor, ir.ExternalTensor)) > LIMIT


def _apart(fresh: Iterable[ir.Value], out: Path, wanted: bool) -> None:
    """Write large new tensors to a data file if `wanted`.

    The name of the data file contains a hash of the tensors, so that no other data file is replaced.
    """
    large = [(v, v.const_value) for v in fresh if v.const_value is not None and v.const_value.nbytes > INLINE]
    if not wanted or not large:
        return
    digest = hashlib.sha256()
    for value, tensor in large:
        digest.update(f"{value.name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.tobytes())
    file = out.with_name(f"{out.name}.{digest.hexdigest()[:12]}.data")
    with replacing(file) as target:
        for value, tensor in large:
            value.const_value = _placed(target, tensor, file)


def _placed(target: BinaryIO, tensor: ir.TensorProtocol, file: Path) -> ir.ExternalTensor:
    target.write(b"\0" * (-target.tell() % alignment(tensor.nbytes)))
    offset = target.tell()
    target.write(tensor.tobytes())
    return placed(tensor, file, offset)

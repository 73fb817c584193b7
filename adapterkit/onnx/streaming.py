"""Write the numbers of a merged model: computed and copied into one data file by the workers of the merge engine."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
from threadpoolctl import threadpool_limits

from ..errors import StorageError
from ..merging.arrays import NumpyArrays
from ..merging.execute import execute
from ..merging.memory import most_workers
from ..merging.planned import Output, OutputFile
from ..merging.stage import Stage
from .changes import Changed, bytes_of

PAGE = 4096
"""Alignment of large tensors in bytes, so that runtimes can memory-map them."""


def streamed(values: Sequence[ir.Value], out: Path) -> list[Path]:
    """Write tensors into a new data file beside `out`, atomically; the tensors then refer to it.

    Raises:
        StorageError: the file exists, or cannot be written.
        Malformed: a result does not fit its dtype.
    """
    file = out.with_name(f"{out.name}.data")
    if file.exists():
        raise StorageError("already there", path=file, cure="Remove it, or write to another name")
    planned = OutputFile(file.name, b"", tuple(_outputs(values)))
    # A later run cannot continue half a data file, so the stage's random name is never reused.
    stage = Stage(file, secrets.token_hex(16), [file.name], single=True)
    with stage.locked():
        try:
            execute([planned], stage, [NumpyArrays()], None, most_workers(), checksums=False)
            stage.publish_all()
        except BaseException:
            stage.discard()
            raise
    for value, output in zip(values, planned.outputs, strict=True):
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
    """Compute tensors that stay in the model's own file."""

    def compute(value: ir.Value) -> None:
        tensor = value.const_value
        assert isinstance(tensor, Changed)
        value.const_value = ir.Tensor(tensor.change.array(), dtype=tensor.dtype, name=value.name)

    # One BLAS thread per worker, because the workers together already use all cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(most_workers()) as pool:
        list(pool.map(compute, values))


def alignment(nbytes: int) -> int:
    """Return the alignment of a tensor in a data file, in bytes."""
    return PAGE if nbytes > 1 << 20 else 64


def placed(tensor: Any, file: Path, offset: int) -> ir.ExternalTensor:
    """Return a tensor that refers to a run of bytes in a file."""
    return ir.ExternalTensor(
        file.name, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name, base_dir=file.parent
    )

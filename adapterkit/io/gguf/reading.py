"""Read GGUF adapters: key-values at once, tensors when they are fetched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import AdapterkitError, Unsupported, storage_error
from ..dtypes import DTYPES
from ..ggml_blocks import decoded
from ..inputs import open_input
from ..lazy import Lazy, Span, read_span
from ..written import source_of
from .headers import Reader, check_apart, check_place, read_entries, read_keys
from .layout import PLAIN, Q8_0, Value, size_of


@dataclass(frozen=True, slots=True, eq=False)
class Gguf:
    """The content of a file.

    Attributes:
        values: key -> value, in the file's order.
        tensors: name -> tensor in numpy's axis order, in the file's order; Q8_0 tensors appear as F32.
        types: name -> name of the tensor's type in the file.
        version: the version of the container.
    """

    values: Mapping[str, Value]
    tensors: Mapping[str, Lazy]
    types: Mapping[str, str]
    version: int = 3


def read_gguf(path: str | os.PathLike[str], *, tensors: bool = True) -> Gguf:
    """Read a header.

    Args:
        path: the file.
        tensors: False to stop after the key-values.

    Raises:
        Malformed: data lies outside of the file, or a size is larger than the file could hold.
        Unsupported: another version or byte order, or a quantization other than Q8_0.
        StorageError: the file cannot be read.
    """
    try:
        with open_input(path) as file:
            return _read(Reader(file, os.fspath(path), os.fstat(file.fileno()).st_size), tensors)
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        raise error.at(path=path) from None


def _read(reader: Reader, tensors: bool) -> Gguf:
    values, count, version, _ = read_keys(reader)
    for key, value in values.items():
        if value.type.startswith("[") and not isinstance(value.value, list):
            why, cure = f"an array of {len(value.value):,} numbers in the header of an adapter", "Leave it out"
            raise Unsupported(why, path=reader.path, where=key, cure=cure)
    return _with_tensors(reader, values, count if tensors else 0, version)


def _with_tensors(reader: Reader, values: dict[str, Value], count: int, version: int) -> Gguf:
    found, _, start, alignment = read_entries(reader, values, count)
    tensors = {name: _tensor(reader, name, start, alignment, *found[name]) for name in found}
    check_apart(reader, found)
    types = {name: PLAIN.get(number, "Q8_0") for name, (_, number, _) in found.items()}
    return Gguf(values, tensors, types, version)


def _tensor(
    reader: Reader, name: str, start: int, alignment: int, shape: tuple[int, ...], number: int, offset: int
) -> Lazy:
    if number not in PLAIN and number != Q8_0:
        why, cure = f"a tensor of GGUF's type {number}", "Write the adapter in F32, F16, BF16 or Q8_0"
        raise Unsupported(why, path=reader.path, where=name, cure=cure)
    check_place(reader, name, start, alignment, shape, number, offset)
    span = Span(reader.path, start + offset, size_of(shape, number))
    if number == Q8_0:
        return Lazy(shape, DTYPES["F32"], lambda: decoded("Q8_0", read_span(span)).tobytes())
    dtype = DTYPES[PLAIN[number]]
    source = source_of(reader.path, name, dtype, span.nbytes)
    if source is not None and source.shape == shape:
        return source
    return Lazy(shape, dtype, None, span)

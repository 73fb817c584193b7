"""Read and write HDF5 files of plain tensors, such as the weights that Keras saves.

h5py reads only the headers. Each tensor must be one contiguous run of bytes in the file, and is read without h5py.
Soft links, external links, external storage, virtual tensors and compressed tensors are refused. With such features, a
file can refer to other files, or can expand to much more data than it stores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import WRITE_AGAIN, AdapterkitError, Corrupt, Malformed, Unsupported, storage_error
from .atomic import replacing
from .inputs import open_input
from .lazy import DTYPES, Lazy, Span, as_array

if TYPE_CHECKING:
    from types import ModuleType

MAGIC = b"\x89HDF\r\n\x1a\n"

MOST_OBJECTS = 1 << 16
"""The largest number of groups and tensors in a file."""

LONGEST_TEXT = 256
"""The largest size, in bytes, of a text attribute that is read."""

_KINDS = {DTYPES[name].numpy: DTYPES[name] for name in ("F16", "F32", "F64", "I32", "I64", "U8")}


def is_hdf5(path: Path) -> bool:
    """Whether a file starts like an HDF5 file. This does not need h5py."""
    try:
        with open_input(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, AdapterkitError):
        return False


def read_hdf5(path: Path, attribute: str = "") -> tuple[dict[str, Lazy], str]:
    """Read the tensors of an HDF5 file lazily.

    Args:
        path: the file.
        attribute: the name of a text attribute of the root group.

    Returns:
        Two values. The first maps each tensor's path in the file, such as `lora/9/vars/lora_kernel_a`, to the tensor.
        The second is the text of the attribute; it is empty if the file lacks the attribute.

    Raises:
        Malformed: the path is not a regular file, or the attribute is not a short text of fixed length.
        Corrupt: the file is damaged, or a tensor extends beyond the end of the file.
        Unsupported: h5py is not installed, or the file has soft or external links, a group with two names, compressed,
            chunked or external tensors, an unknown dtype, or more than `MOST_OBJECTS` groups and tensors.
        StorageError: the file cannot be read.
    """
    h5py = _h5py()
    try:
        with open_input(path) as file:
            size = os.fstat(file.fileno()).st_size
            with h5py.File(file, "r") as root:
                tensors = {name: _tensor(h5py, path, name, node, size) for name, node in _walk(h5py, root)}
                return tensors, _text(root, attribute)
    except AdapterkitError as error:
        raise error.at(path=path) from None
    except OSError as error:
        if error.errno is not None:
            raise storage_error(error, path) from error
        raise _corrupt(path, error) from error
    except (RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise _corrupt(path, error) from error


def _walk(h5py: ModuleType, root: Any) -> Iterator[tuple[str, Any]]:
    """Yield all tensors with their paths. Refuse links other than hard links, and a group that has two names."""
    waiting, seen, count = [("", root)], set[int](), 0
    while waiting:
        where, group = waiting.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:  # Another hard link leads to the same group, so the links could form a cycle.
            raise Unsupported("this group has two names (hard links)", where=where, cure=WRITE_AGAIN)
        seen.add(address)
        for name in group:
            place, count = f"{where}/{name}" if where else name, count + 1
            if count > MOST_OBJECTS:
                why = f"the file has more than {MOST_OBJECTS} groups and tensors"
                raise Unsupported(why, where=where, cure=WRITE_AGAIN)
            link = group.get(name, getlink=True)
            if type(link) is not h5py.HardLink:
                kind = "a link to another file" if type(link) is h5py.ExternalLink else "a soft link"
                raise Unsupported(f"this is {kind}", where=place, cure=WRITE_AGAIN)
            node = group[name]
            if isinstance(node, h5py.Group):
                waiting.append((place, node))
            elif isinstance(node, h5py.Dataset):
                yield place, node
            else:
                raise Unsupported("this is neither a group nor a tensor", where=place, cure=WRITE_AGAIN)


def _tensor(h5py: ModuleType, path: Path, where: str, node: Any, size: int) -> Lazy:
    """Return a lazy tensor that reads the bytes of a dataset from the file."""
    if node.is_virtual or node.external or node.id.get_create_plist().get_layout() != h5py.h5d.CONTIGUOUS:
        why = "the tensor is compressed, in chunks, or in another file"
        raise Unsupported(why, where=where, cure="Save it as a contiguous, uncompressed dataset, as Keras does")
    dtype = _KINDS.get(node.dtype.str if node.dtype.itemsize > 1 else f"|{node.dtype.str[1:]}")
    why = f"the tensor has dtype {node.dtype}"
    stored = node.id.get_type()
    # The bytes are read without h5py. If numpy lacks a float type, h5py shows a larger one: bfloat16 becomes float32.
    if _is_bfloat16(h5py, stored, node):
        dtype = DTYPES["BF16"]
    elif dtype is not None and stored != h5py.h5t.py_create(node.dtype):
        dtype, why = None, f"the tensor's numbers have {stored.get_size()} bytes and a layout that numpy lacks"
    if dtype is None or node.shape is None:
        raise Unsupported(why, where=where, cure=f"Save it as {', '.join(_NAMES)}")
    count = 1
    for length in node.shape:
        count *= int(length)
    offset = node.id.get_offset()
    if offset is None or offset < 0 or offset + count * dtype.itemsize > size:
        raise Corrupt("the tensor extends beyond the end of the file", where=where, cure=WRITE_AGAIN)
    return Lazy(tuple(map(int, node.shape)), dtype, None, Span(os.fspath(path), offset, count * dtype.itemsize))


def _is_bfloat16(h5py: ModuleType, stored: Any, node: Any) -> bool:
    """Whether an HDF5 type is bfloat16.

    Keras writes bfloat16 as two opaque bytes, with the attribute `dtype`. HDF5 can also describe it as a float with the
    sign at bit 15, 8 bits of exponent from bit 7, and 7 bits of mantissa from bit 0.
    """
    if stored.get_size() != 2:
        return False
    if isinstance(stored, h5py.h5t.TypeOpaqueID):
        return "dtype" in node.attrs and node.attrs["dtype"] == "bfloat16"
    return (
        isinstance(stored, h5py.h5t.TypeFloatID)
        and stored.get_order() == h5py.h5t.ORDER_LE
        and stored.get_fields() == (15, 7, 8, 0, 7)
        and stored.get_ebias() == 127
    )


def _text(root: Any, name: str) -> str:
    """Return a text attribute of the root group; empty if the attribute is absent.

    Raises:
        Malformed: the attribute is not a short text of fixed length.
    """
    if not name or name not in root.attrs:
        return ""
    attribute = root.attrs.get_id(name)
    if attribute.dtype.kind != "S" or attribute.shape != () or attribute.dtype.itemsize > LONGEST_TEXT:
        raise Malformed("the attribute is not a short text", where=name, cure=WRITE_AGAIN)
    return bytes(root.attrs[name]).decode("ascii", "replace")


def write_hdf5(path: Path, tensors: Mapping[str, Lazy], attributes: Mapping[str, str]) -> None:
    """Write an HDF5 file atomically.

    Args:
        path: the file.
        tensors: the tensors by their path in the file; groups are created as needed.
        attributes: ASCII texts to store as attributes of the root group, keyed by name.

    Raises:
        Unsupported: h5py is not installed.
        StorageError: the file cannot be written.
    """
    import numpy as np

    h5py = _h5py()
    with replacing(path) as file, h5py.File(file, "w") as root:
        for name, text in attributes.items():
            root.attrs[name] = np.bytes_(text)
        for name, leaf in tensors.items():
            root.create_dataset(name, data=as_array(leaf))


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise Unsupported("HDF5 files need h5py, which is not installed", cure="pip install h5py") from None
    return cast("ModuleType", h5py)


def _corrupt(path: Path, error: Exception) -> Corrupt:
    return Corrupt(f"h5py cannot read the file: {error}", path=path, cure=WRITE_AGAIN)


_NAMES = ("BF16", "F16", "F32", "F64")

"""Read state dicts from torch's `.bin`, `.pt` and `.pth` files without torch and without running any code in them.

`torch_containers` has the two containers of `torch.save`, and `torch_state_dict` turns their values into tensors. Both
are imported only for actual torch files.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import AdapterkitError, Path, storage_error
from .inputs import kept, open_input

if TYPE_CHECKING:
    from collections.abc import Callable

    from .lazy import Lazy

T = TypeVar("T")

MAGIC = 0x1950A86A20F9469CFC6C
"""The value of the first pickle in a file before torch 1.6."""

HEAD = 64
"""Bytes at the start of a file that identify its container."""


def is_torch_file(path: Path) -> bool:
    """Whether `torch.save` wrote `path`; looks at its first bytes and at an archive's directory.

    Raises:
        StorageError: the file cannot be read.
    """
    return os.path.isfile(path) and kept("torch", path, lambda: _is_torch_file(path))


def _is_torch_file(path: Path) -> bool:
    try:
        with open_input(path) as file:
            head = file.read(HEAD)
        return _is_legacy(head) or (head[:2] == b"PK" and _is_archive(path))
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError:
        return False


def read_torch_file(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a saved state dict, by name in the file's order; no tensor data is read yet.

    A lone `state_dict`, `model` or `model_state_dict` entry around the state dict is unwrapped. A module's `_metadata`
    is dropped: it holds code versions, not weights. Names that share a storage are all returned. A contiguous tensor
    has a `span`; any other view is gathered by its `fetch`. Files are closed between fetches.

    Raises:
        Malformed: the file breaks the rules of its container, a view leaves its storage, or an entry is not a tensor.
        Unsupported: the pickle uses a global or an opcode that no state dict needs, or data is compressed or
            big-endian.
        StorageError: the file cannot be read. A `fetch` raises it too, and `Corrupt` if the file has shrunk.
    """
    from .torch_state_dict import state_dict

    def read() -> dict[str, Lazy]:
        return _opened(path, lambda value, places: state_dict(os.fspath(path), value, places))

    return dict(kept("state dict", path, read))


def read_torch_value(path: Path) -> Any:
    """Return a saved value that is more than a state dict: dicts and plain values, with lazy tensors in them.

    Raises:
        Malformed: as `read_torch_file`; here entries need not be tensors.
        Unsupported: likewise.
        StorageError: likewise.
    """
    from .torch_state_dict import nested

    return _opened(path, lambda value, places: nested(os.fspath(path), value, places))


def _opened(path: Path, made: Callable[[object, dict[str, int]], T]) -> T:
    from .torch_containers import Capped, read_legacy, read_zip
    from .torch_values import damaged

    try:
        # `Capped` does its own buffering, so it needs the unbuffered file.
        with Capped(open_input(path, 0)) as file:  # type: ignore[arg-type]
            head = file.read(HEAD)
            container = read_zip if head[:2] == b"PK" else read_legacy if _is_legacy(head) else None
            if container is None:
                raise damaged("not a file that torch.save writes", "first bytes")
            return made(*container(file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise storage_error(error, path) from error
    except AdapterkitError as error:
        error.at(path)
        raise


def _is_legacy(head: bytes) -> bool:
    return head[:1] == b"\x80" and MAGIC.to_bytes(10, "little") in head[:32]


def _is_archive(path: Path) -> bool:
    from .torch_containers import Capped, is_archive

    with Capped(open_input(path, 0)) as file:  # type: ignore[arg-type]
        return is_archive(file)

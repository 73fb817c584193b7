"""Read and create adapter folders with a config and one tensor file, as several libraries write them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Malformed, UsageError, storage_error
from ..io import safetensors
from ..io.torch_file import is_torch_file, read_torch_file
from ._format import TENSORS

if TYPE_CHECKING:
    from ..io.lazy import Lazy


def folder_of(path: Path) -> Path:
    """Return the adapter's folder, given the folder or one of its files."""
    return path if path.is_dir() else path.parent


def read_tensors(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a safetensors file or a torch file, by key.

    Raises:
        Malformed: the file is damaged, or `path` is a folder.
    """
    if path.is_dir():
        raise Malformed("this is a folder; a tensor file is expected here", path=path, cure="Fetch the adapter again")
    if path.suffix == ".bin" or is_torch_file(path):
        return read_torch_file(path)
    return safetensors.read(path)


def make_folder(folder: Path) -> None:
    """Create the folder of an adapter, with its parents.

    Raises:
        UsageError: the path has the suffix of a tensor file.
        StorageError: the folder cannot be created.
    """
    if folder.suffix.lower() in TENSORS and not folder.is_dir():
        why = "this format writes a folder, but the path ends like a file"
        cure = "Name a folder, or choose a format that writes one file, such as --to adapterkit (format='adapterkit')"
        raise UsageError(why, path=folder, cure=cure)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(error, folder) from error
